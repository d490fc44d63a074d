"""The runner of a GPU: short passes captured into CUDA graphs, one a slice and size.

A step of a 30B model is some 140 kernels of a few microseconds; launched one by one from Python
they would wait for the host most of the time. Captured once, they are one launch.
"""

from __future__ import annotations

import weakref
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from cascade.architecture import Architecture
from cascade.buckets import bucket_of_length, bucket_of_rows
from cascade.cache import Cache
from cascade.decode import Arena, Buffers, Row, Table, limits, runs_short, short_pass
from cascade.forward import Feed
from cascade.kernels.plan import Plan
from cascade.runner import Runner
from cascade.weights import ModelWeights

MOST_TOKENS = 320  # rows * length of a short pass; longer ones are run by `forward`
MOST_GRAPHS = 96  # kept at once; the one that was not used for longest goes first


class GraphRunner(Runner):
    """Short passes by graphs, everything else as `Runner` does."""

    prefill_tokens = 4096

    def __init__(
        self, views: Sequence[ModelWeights], arch: Architecture, kernels: ModuleType
    ) -> None:
        super().__init__(views)
        self.arch, self.kernels = arch, kernels
        self._decoders: weakref.WeakKeyDictionary[Cache, Decoder | None] = (
            weakref.WeakKeyDictionary()
        )

    @torch.inference_mode(False)  # it lives as long as the cache
    def decoder(self, cache: Cache) -> Decoder | None:
        """What runs short passes over this cache; None where no kernel fits the model."""
        if cache not in self._decoders:
            parent = max(self.views, key=lambda view: view.hidden)
            needs = self.arch, parent.dtype, cache.journal.entries
            fits = (
                runs_short(parent, self.arch) and self.kernels.short_pass_obstacle(*needs) is None
            )
            self._decoders[cache] = Decoder(self, cache, parent) if fits else None
        return self._decoders[cache]

    def chain(self, cache: Cache, rows: int) -> Decoder | None:
        decoder = self.decoder(cache)
        return decoder if decoder is not None and decoder.holds(rows, 1) else None

    def verify(self, writer: int, cache: Cache, feeds: Sequence[Feed]) -> Tensor:
        decoder = self.decoder(cache)
        length = max(len(feed.ids) for feed in feeds)
        if decoder is None or not decoder.holds(len(feeds), length):
            return super().verify(writer, cache, feeds)
        rows = [(feed.slot, feed.start, feed.entry, feed.ids) for feed in feeds]
        return decoder.run(writer, rows).packed(rows)

    decode = verify


@dataclass(slots=True)
class Captured:
    """One slice at one size: its table, what it writes, and the graph that does it."""

    table: Table
    buffers: Buffers
    plans: list[Plan]  # one a MoE layer: which experts the last pass chose
    picked: Tensor  # [R], the likeliest id after each row's last token, where length is 1
    graph: torch.cuda.CUDAGraph | None = None

    @property
    def logits(self) -> Tensor:
        """[R, length, V] fp32, until the next pass of any size."""
        table = self.table
        return self.buffers.logits.view(table.rows, table.length, -1)

    def packed(self, rows: Sequence[Row]) -> Tensor:
        """A copy of the logits [n, V] of the tokens that count."""
        counts = [len(ids) for *_, ids in rows]
        if min(counts) == self.table.length:
            return self.logits[: len(rows)].flatten(0, 1).clone()
        length = self.table.length
        places = [r * length + t for r, count in enumerate(counts) for t in range(count)]
        logits = self.buffers.logits
        return logits[torch.tensor(places, device=logits.device)]


class Decoder:
    """Short passes over one cache."""

    def __init__(self, runner: GraphRunner, cache: Cache, parent: ModelWeights) -> None:
        self._views, self._arch, self._kernels = runner.views, runner.arch, runner.kernels
        self._cache = weakref.ref(cache)  # which owns this decoder's lifetime
        self._parent = parent
        self._arena: Arena | None = None
        self._captured: OrderedDict[tuple[int, int, int], Captured] = OrderedDict()
        self._pool: Any = None
        self.latest = torch.zeros(cache.num_slots, dtype=torch.int64, device=cache.device)
        most = limits(parent, self._arch, self._kernels, self.latest.device).tokens
        self._most_tokens = min(MOST_TOKENS, most)

    def holds(self, rows: int, length: int) -> bool:
        return bucket_of_rows(rows) * bucket_of_length(length) <= self._most_tokens

    def run(self, writer: int, rows: Sequence[Row]) -> Captured:
        """One pass of rows of about equal length; nothing is waited for."""
        key = (
            writer,
            bucket_of_rows(len(rows)),
            bucket_of_length(max(len(ids) for *_, ids in rows)),
        )
        captured = self._captured.get(key)
        if captured is None:
            captured = self._capture(key, rows)
        else:
            self._captured.move_to_end(key)
            captured.table.fill(rows)
            if captured.graph is None:
                self._pass(captured, writer)
            else:
                captured.graph.replay()
        if captured.table.length == 1:
            captured.table.moved_on(rows)
        return captured

    def pick(self, logits: Tensor, picked: Tensor, slots: Tensor) -> None:
        """The likeliest id of each row of logits [R, V], where the next pass will find it."""
        self._kernels.pick_tokens(logits, picked, self.latest, slots)

    @property
    def graphs(self) -> int:
        return len(self._captured)

    # ---- inside ----

    @torch.inference_mode(False)  # later passes write where this one does, in that mode or not
    @torch.no_grad()
    def _capture(self, key: tuple[int, int, int], rows: Sequence[Row]) -> Captured:
        writer, height, length = key
        device, tokens = self.latest.device, height * length
        if self._arena is None or self._arena.tokens < tokens:
            self._captured.clear()
            self._pool = None  # a pool whose graphs are all gone cannot be captured into
            self._arena = Arena(_arena_size(tokens), device)
        arch, weights = self._arch, self._views[writer]
        pairs = limits(weights, arch, self._kernels, device).pairs
        captured = Captured(
            Table(height, length, device),
            Buffers.over(self._arena, weights, self._parent, arch, tokens),
            [
                Plan.empty(tokens, arch.experts, arch.top_k, device, pairs)
                for _ in range(arch.kinds.count("moe"))
            ],
            torch.zeros(height, dtype=torch.int64, device=device),
        )
        captured.table.fill(rows)
        self._pass(captured, writer)  # compiles what is missing, and is the pass asked for
        if device.type == "cuda":
            if self._pool is None:
                self._pool = torch.cuda.graph_pool_handle()
            captured.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(
                captured.graph, pool=self._pool, capture_error_mode="thread_local"
            ):
                self._pass(captured, writer)
        self._captured[key] = captured
        if len(self._captured) > MOST_GRAPHS:
            self._captured.popitem(last=False)
        return captured

    def _pass(self, captured: Captured, writer: int) -> None:
        table, kernels, cache = captured.table, self._kernels, self._cache()
        assert cache is not None  # somebody asked for a pass over it
        short_pass(
            self._views[writer],
            self._arch,
            kernels,
            cache,
            table,
            self.latest,
            captured.buffers,
            captured.plans,
        )
        if table.length == 1:
            numbers = table.numbers.view(-1, table.rows)
            logits, picked = captured.buffers.logits, captured.picked
            kernels.pick_tokens(logits, picked, self.latest, table.slots, numbers)


def _arena_size(tokens: int) -> int:
    return next(size for size in (8, 72, MOST_TOKENS) if tokens <= size)
