"""The cache: one set of slots that every slice of a model reads and writes.

A slot holds one sequence: K and V by position, the convolution windows and the SSM states of its
committed tokens, and a *journal* of the tokens that were run but not committed. The law that keeps
them consistent:

    A forward pass never touches what is committed. It reads windows and states, reads and
    appends journal entries, and writes K and V at positions that are not committed yet.
    `commit` replays journal entries into windows and states.

So a pass that fails, or whose tokens are rejected, leaves nothing to undo, and no state is stored
per drafted token. The last committed token is never folded: it stays in the journal, or was not
run at all (a bonus token), because the next pass may belong to another slice, which needs that
token's logits of its own and therefore runs it again. The promises about "the cache of n committed
tokens" are about the first n - 1 of them; the last one enters with the next pass.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from types import ModuleType
from typing import Literal

import torch
from torch import Tensor

from cascade.architecture import Architecture
from cascade.buckets import bucket_of_rows
from cascade.errors import CacheFull, RequestError, unknown
from cascade.threads import threads_for

DraftCache = Literal["shared", "own"]
DRAFT_CACHES: tuple[DraftCache, ...] = ("shared", "own")
NOTHING = (-1, -1, 0, 0, 0)  # a fold of no slot, which fills up a graph's rows


class Journal:
    """What the scan of uncommitted tokens needs to be replayed, for every Mamba layer.

    inputs  [L, R, J, C]             before the convolution
    scanned [L, R, J, H * P + G * N] x and B, after the convolution
    dt      [L, R, J, H] fp32        after softplus
    """

    def __init__(
        self, arch: Architecture, rows: int, entries: int, device: torch.device, dtype: torch.dtype
    ) -> None:
        shape = (arch.num_mamba, rows, entries)
        self.inputs = torch.zeros(*shape, arch.conv_channels, device=device, dtype=dtype)
        self.scanned = torch.zeros(*shape, arch.scanned_channels, device=device, dtype=dtype)
        self.dt = torch.zeros(*shape, arch.heads, device=device, dtype=torch.float32)

    @property
    def entries(self) -> int:
        return self.dt.shape[2]

    def tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.inputs, self.scanned, self.dt


@dataclass(frozen=True, slots=True)
class Snapshot:
    """Windows and states after `position` tokens. Never written, so forks may share it."""

    position: int
    window: Tensor  # [L, K - 1, C]
    state: Tensor  # [L, H, P, N]


@dataclass(slots=True)
class Slot:
    """The bookkeeping of one slot.

    `folded` tokens are in windows and states; the journal holds the `entries` tokens after them,
    all run by `entry_slice`, the slice that ran last. `tail` is the provenance of the last
    committed token until the next pass takes it in. `pure` says that the first `pure_length`
    folded tokens were all written by slice `pure` over a prefix written by it: what a from-scratch
    prefill would hold.
    """

    index: int
    folded: int = 0
    entries: int = 0
    entry_slice: int = -1
    tail: int = -1
    pure: int = -1
    pure_length: int = 0
    snapshot: Snapshot | None = None

    def exact_length(self, writer: int) -> int:
        """How many leading tokens hold exactly what `writer` alone would have written."""
        return self.pure_length if self.pure == writer else 0

    def usable(self, writer: int) -> int:
        """Journal entries that a pass of `writer` may keep."""
        return self.entries if self.entry_slice == writer else 0


@dataclass(slots=True)
class Saved:
    """A copy of a slot from position `start` on, to put back when a longer operation fails."""

    slot: Slot
    start: int
    window: Tensor | None  # None where nothing was folded
    state: Tensor | None
    keys: Tensor
    values: Tensor
    provenance: Tensor


@dataclass(frozen=True, slots=True)
class Fold:
    """Replay `count` entries of journal row `source` into `slot`, written by slice `writer`.

    With `keep`, the entry after them becomes entry 0 of the slot's own journal.
    """

    slot: Slot
    source: int
    count: int
    writer: int
    keep: bool


@dataclass(slots=True, eq=False, weakref_slot=True)
class Cache:
    """Slots for `max_batch` sequences of `max_length` tokens, allocated once.

    keys, values [La, S, M, kv_heads, D]; window [Lm, S, K - 1, C]; state [Lm, S, H, P, N];
    provenance [S, M] int8, the index of the slice that wrote a folded position, -1 where none did.

    With draft_cache="own" there are as many slots again behind those: slot `max_batch + i` is the
    draft slice's own for the sequence in slot i.
    """

    arch: Architecture
    decay: Tensor  # [Lm, H] fp32: A of every Mamba layer, a weight that all slices share
    max_batch: int
    max_length: int
    max_draft: int
    device: torch.device
    dtype: torch.dtype
    state_dtype: torch.dtype
    kernels: ModuleType
    draft_cache: DraftCache = "shared"
    keys: Tensor = field(init=False, repr=False)
    values: Tensor = field(init=False, repr=False)
    window: Tensor = field(init=False, repr=False)
    state: Tensor = field(init=False, repr=False)
    provenance: Tensor = field(init=False, repr=False)
    journal: Journal = field(init=False, repr=False)
    _free: list[int] = field(init=False, repr=False)
    _graphs: dict[int, tuple[torch.cuda.CUDAGraph, Tensor]] = field(
        init=False, repr=False, default_factory=dict
    )

    @torch.inference_mode(False)  # a cache may outlive the block that opened it
    def __post_init__(self) -> None:
        for name in ("max_batch", "max_length", "max_draft"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise RequestError(f"{name}={value!r} of a cache must be an integer of at least 1")
        if self.draft_cache not in DRAFT_CACHES:
            raise RequestError(unknown("draft_cache", self.draft_cache, DRAFT_CACHES))
        arch, slots = self.arch, self.num_slots
        kv = (arch.num_attention, slots, self.max_length, arch.kv_heads, arch.attention_dim)
        self.keys = torch.zeros(kv, device=self.device, dtype=self.dtype)
        self.values = torch.zeros(kv, device=self.device, dtype=self.dtype)
        window = (arch.num_mamba, slots, arch.conv_taps - 1, arch.conv_channels)
        self.window = torch.zeros(window, device=self.device, dtype=self.dtype)
        state = (arch.num_mamba, slots, arch.heads, arch.head_dim, arch.state_size)
        self.state = torch.zeros(state, device=self.device, dtype=self.state_dtype)
        self.provenance = torch.full(
            (slots, self.max_length), -1, device=self.device, dtype=torch.int8
        )
        # One entry for the last committed token, one per drafted token.
        self.journal = Journal(arch, slots, self.max_draft + 1, self.device, self.dtype)
        self._free = list(reversed(range(self.max_batch)))

    @property
    def num_slots(self) -> int:
        return self.max_batch * (2 if self.draft_cache == "own" else 1)

    @property
    def nbytes(self) -> int:
        """Bytes of all slots, journal and the draft slices' own included.

        The state that rollback restarts from comes on top, one a slot once it holds 256 tokens.
        """
        parts = (self.keys, self.values, self.window, self.state, self.provenance)
        return sum(part.nbytes for part in (*parts, *self.journal.tensors()))

    @property
    def free_slots(self) -> int:
        return len(self._free)

    def allocate(self) -> Slot:
        """A slot in the state before the first token. Raises CacheFull where none is left."""
        if not self._free:
            raise CacheFull(
                f"all {self.max_batch} slots of the cache are in use: close a sequence, "
                "or build the cache with a larger max_batch"
            )
        self._empty(self._free[-1])
        return Slot(self._free.pop())

    def companion_slot(self, slot: Slot) -> Slot:
        """The draft slice's own slot beside `slot`, before the first token.

        Raises RequestError where the cache was built without.
        """
        self.check_draft_cache("own")
        companion = Slot(self.max_batch + slot.index)
        self._empty(companion.index)
        self.forget(companion, 0)  # what was there may have failed
        return companion

    def check_draft_cache(self, wanted: DraftCache) -> None:
        """Raises RequestError where a sequence cannot have the draft cache it asks for."""
        if wanted not in DRAFT_CACHES:
            raise RequestError(unknown("draft_cache", wanted, DRAFT_CACHES))
        if wanted == "own" and self.draft_cache != "own":
            raise RequestError(
                "this cache has no slots for draft slices; build it with "
                'model.cache(draft_cache="own")'
            )

    def release(self, slot: Slot) -> None:
        if slot.index < self.max_batch:  # a companion's stays with the slot it is beside
            self._free.append(slot.index)

    def _empty(self, index: int) -> None:
        self.window[:, index] = 0
        self.state[:, index] = 0
        self.provenance[index] = -1

    def forget(self, slot: Slot, start: int) -> None:
        """Drop the journal's entries, and zero K and V from position `start` on.

        A failed pass may have left NaN in either, and no mask keeps NaN out of a sum.
        """
        self.keys[:, slot.index, start:] = 0
        self.values[:, slot.index, start:] = 0
        for part in self.journal.tensors():
            part[:, slot.index] = 0
        slot.entries = 0

    def fold(self, folds: list[Fold], journal: Journal) -> None:
        """Commit: replay journal entries into windows and states, and record who wrote them."""
        with threads_for(self.device, sum(fold.count + 1 for fold in folds), self.window.shape[-1]):
            self._fold(folds, journal)
        for fold in folds:
            self._book(fold)

    def _fold(self, folds: list[Fold], journal: Journal) -> None:
        numbers = [(f.slot.index, f.source, f.count, f.slot.folded, f.writer) for f in folds]
        resident = journal is self.journal
        if resident and self.kernels.CAPTURABLE:
            idle = bucket_of_rows(len(numbers)) - len(numbers)
            self._replay([*numbers, *[NOTHING] * idle])
            return
        rows, sources, counts, starts, writers = self.index(*numbers)
        if any(fold.count for fold in folds):
            self._advance(journal, rows, sources, counts)
        self.kernels.provenance_stamp(self.provenance, rows, starts, counts, writers)
        moved = [f for f in folds if f.keep and (f.count or not resident)]
        if moved:
            if len(moved) < len(folds):
                rows, sources, counts = self.index(
                    *((f.slot.index, f.source, f.count) for f in moved)
                )
            self.kernels.journal_keep(
                self.journal.tensors(), journal.tensors(), rows, sources, counts
            )

    def _advance(self, journal: Journal, rows: Tensor, sources: Tensor, counts: Tensor) -> None:
        self.kernels.ssm_commit(
            self.state, journal.scanned, journal.dt, self.decay, rows, sources, counts
        )
        self.kernels.conv_commit(self.window, journal.inputs, rows, sources, counts)

    def _replay(self, numbers: Sequence[tuple[int, ...]]) -> None:
        """A commit from the resident journal, as one CUDA graph a number of rows.

        Whatever the rows keep: an entry 0 that none was kept for does not count.
        """
        known = self._graphs.get(len(numbers))
        if known is None:
            self._capture(numbers)
            return
        graph, table = known
        table.copy_(_pinned(numbers), non_blocking=True)
        graph.replay()

    @torch.inference_mode(False)  # later commits fill this table, in that mode or not
    def _capture(self, numbers: Sequence[tuple[int, ...]]) -> None:
        table = _pinned(numbers).to(self.device)
        self._launch(table)  # compiles what is missing; and this commit is done
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            self._launch(table)
        self._graphs[len(numbers)] = graph, table

    def _launch(self, table: Tensor) -> None:
        rows, sources, counts, starts, writers = table.unbind()
        self._advance(self.journal, rows, sources, counts)
        self.kernels.provenance_stamp(self.provenance, rows, starts, counts, writers)
        parts = self.journal.tensors()
        self.kernels.journal_keep(parts, parts, rows, sources, counts)

    def _book(self, fold: Fold) -> None:
        slot = fold.slot
        if fold.count:
            if slot.pure_length == slot.folded and slot.pure in (-1, fold.writer):
                slot.pure, slot.pure_length = fold.writer, slot.folded + fold.count
            slot.folded += fold.count
        slot.entries = int(fold.keep)
        slot.entry_slice = fold.writer

    # ---- snapshots, copies ----

    def take_snapshot(self, slot: Slot) -> None:
        """Remember windows and states as they are now, in place of an earlier snapshot."""
        slot.snapshot = Snapshot(
            slot.folded, self.window[:, slot.index].clone(), self.state[:, slot.index].clone()
        )

    def rewind_target(self, slot: Slot, limit: int) -> int:
        """The length that `rewind(slot, limit)` would go back to."""
        snapshot = slot.snapshot
        return snapshot.position if snapshot and snapshot.position <= limit else 0

    def rewind(self, slot: Slot, limit: int) -> None:
        """Go back to the newest stored state of at most `limit` tokens (zero tokens at worst).

        K and V stay: positions from the new `folded` on count as not committed.
        """
        snapshot = slot.snapshot
        if snapshot is not None and snapshot.position <= limit:
            self.window[:, slot.index] = snapshot.window
            self.state[:, slot.index] = snapshot.state
            slot.folded = snapshot.position
        else:
            self.window[:, slot.index] = 0
            self.state[:, slot.index] = 0
            slot.folded, slot.snapshot = 0, None
        slot.entries = 0
        slot.pure_length = min(slot.pure_length, slot.folded)
        if slot.pure_length == 0:
            slot.pure = -1

    def unfold(self, slot: Slot, earlier: Slot) -> None:
        """After a fold that failed anywhere: the newest stored state before it.

        earlier: a copy of the slot's bookkeeping from before the fold.
        """
        slot.folded, slot.entry_slice = earlier.folded, earlier.entry_slice
        slot.pure, slot.pure_length = earlier.pure, earlier.pure_length
        slot.snapshot = earlier.snapshot
        self.rewind(slot, slot.folded)

    def save(self, slot: Slot, start: int, end: int) -> Saved:
        """Copy what an operation on positions `[start, end)` of a slot may overwrite."""
        row, empty = slot.index, slot.folded == 0
        return Saved(
            replace(slot),
            start,
            None if empty else self.window[:, row].clone(),
            None if empty else self.state[:, row].clone(),
            self.keys[:, row, start:end].clone(),
            self.values[:, row, start:end].clone(),
            self.provenance[row].clone(),
        )

    def put_back(self, slot: Slot, saved: Saved) -> None:
        """Undo everything since `save`, except the journal's entries, which are dropped."""
        row, end, earlier = slot.index, saved.start + saved.keys.shape[1], saved.slot
        self.window[:, row] = 0 if saved.window is None else saved.window
        self.state[:, row] = 0 if saved.state is None else saved.state
        self.keys[:, row, saved.start : end] = saved.keys
        self.values[:, row, saved.start : end] = saved.values
        self.provenance[row] = saved.provenance
        slot.folded, slot.entries, slot.entry_slice = earlier.folded, 0, earlier.entry_slice
        slot.pure, slot.pure_length = earlier.pure, earlier.pure_length
        slot.snapshot = earlier.snapshot

    def copy(self, source: Slot, targets: list[Slot], length: int) -> None:
        """Fork: the first `length` positions and everything of `source`, into fresh slots."""
        (rows,) = self.index(*((slot.index,) for slot in targets))
        self.kernels.fork_copy(
            self.keys, self.values, self.window, self.state, source.index, rows, length
        )
        self.provenance[rows] = self.provenance[source.index].clone()
        if source.entries:
            origin = torch.full_like(rows, source.index)
            parts = self.journal.tensors()
            self.kernels.journal_keep(parts, parts, rows, origin, torch.zeros_like(rows))
        for slot in targets:
            slot.folded, slot.entries = source.folded, min(source.entries, 1)
            slot.entry_slice, slot.tail = source.entry_slice, source.tail
            slot.pure, slot.pure_length = source.pure, source.pure_length
            slot.snapshot = source.snapshot

    def index(self, *rows: tuple[int, ...]) -> tuple[Tensor, ...]:
        """The columns of a table of numbers, int64 on the device, by one copy."""
        if self.device.type == "cuda":
            return _pinned(rows).to(self.device, non_blocking=True).unbind()
        return torch.tensor(rows, dtype=torch.int64, device=self.device).T.contiguous().unbind()


def _pinned(rows: Iterable[tuple[int, ...]]) -> Tensor:
    """The columns [k, R] of a table in pinned memory, which torch keeps until a copy is done."""
    return torch.tensor(list(zip(*rows, strict=True)), dtype=torch.int64, pin_memory=True)
