"""Short passes on a processor: row by row, in NumPy, with the drafted tokens' states at hand.

A small model spends its time in starting operations, and NumPy starts them faster than PyTorch.
When decoding, the plain pass replays the journal on top of what is committed for every token; here
the replayed windows and states are kept from one token to the next, outside the cache, so that a
token costs one step of the recurrence. Results of a row do not depend on the few beside it.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from cascade.architecture import Architecture
from cascade.cache import Cache, Journal
from cascade.forward import Feed
from cascade.kernels.cpu_spans import LONGEST
from cascade.kernels.cpu_steps import Array, Matrix
from cascade.runner import Runner
from cascade.threads import threads_for
from cascade.weights import AttentionWeights, MambaWeights, MLPWeights, ModelWeights, MoEWeights

MOST_ROWS = 8  # decoded one after the other; more share the products of a plain pass


class CpuRunner(Runner):
    """Runs one row's tokens, and one token of a few rows, in float32 by `kernels.cpu`'s steps and
    spans; all else takes the plain route.
    """

    def __init__(self, views: Sequence[ModelWeights]) -> None:
        super().__init__(views)
        self._slices: dict[int, _Slice] = {}
        self._ahead = _Ahead()

    def hidden(
        self, writer: int, cache: Cache, journal: Journal, feeds: Sequence[Feed]
    ) -> list[Tensor]:
        tokens = len(feeds[0].ids)
        if len(feeds) > 1 or tokens > LONGEST or not _is_float32(cache):
            return super().hidden(writer, cache, journal, feeds)
        weights = self._slice(writer, cache.arch)
        self._ahead = _Ahead()
        with threads_for(cache.device, tokens, weights.width), np.errstate(all="ignore"):
            [row] = _rows(cache, journal, feeds, own=False)
            return [torch.from_numpy(weights.span(row))]

    def decode(self, writer: int, cache: Cache, feeds: Sequence[Feed]) -> Tensor:
        if len(feeds) > MOST_ROWS or not _is_float32(cache):
            return super().decode(writer, cache, feeds)
        weights = self._slice(writer, cache.arch)
        with threads_for(cache.device, 1, weights.width), np.errstate(all="ignore"):
            rows = self._ahead.take(cache, feeds)
            table = np.stack([weights.step(row) for row in rows])
            self._ahead.put(cache, rows)
            return torch.from_numpy(table)

    def _slice(self, writer: int, arch: Architecture) -> _Slice:
        if writer not in self._slices:
            self._slices[writer] = _Slice(self.views[writer], arch)
        return self._slices[writer]


def _is_float32(cache: Cache) -> bool:
    return cache.dtype == cache.state_dtype == torch.float32


class _Row:
    """Tokens of one row on their way through the layers, and what its journal amounts to.

    history: [Lm, K - 1 + J, C], the window and behind it the journal's inputs
    state:   [Lm, H, P, N], after the journal entries before `entry`; a step advances it
    """

    def __init__(
        self, cache: Cache, journal: Journal, feed: Feed, history: Array, state: Array
    ) -> None:
        self.arch, self.kernels = cache.arch, cache.kernels
        self.history, self.state = history, state
        self.slot, self.source = feed.slot, feed.source
        self.keys, self.values = cache.keys[:, feed.slot], cache.values[:, feed.slot]
        # [Lm, J, ...]
        self.inputs, self.scanned, self.dt = (
            part[:, feed.source].numpy() for part in journal.tensors()
        )
        self.move(feed)

    def move(self, feed: Feed) -> None:
        self.ids, self.start, self.entry = feed.ids, feed.start, feed.entry


class _Ahead:
    """Rows that stand at their next journal entry already.

    A replay would give the same only while nothing that they were made of has been written by
    anyone else: torch counts the writes to a tensor. Writes through NumPy, which are this
    module's alone, do not count.
    """

    def __init__(self) -> None:
        self._rows: dict[int, _Row] = {}  # by slot
        self._seen: list[tuple[weakref.ref[Tensor], int]] = []

    def take(self, cache: Cache, feeds: Sequence[Feed]) -> list[_Row]:
        """A row for each feed. None is known any more until `put`."""
        known, self._rows = self._rows, {}
        if not self._is_current(cache):
            known = {}
        missing = []
        for feed in feeds:
            row = known.get(feed.slot)
            if row is not None and row.entry + 1 == feed.entry:
                row.move(feed)
            else:
                missing.append(feed)
        if missing:
            new = _rows(cache, cache.journal, missing, own=True)
            known |= {row.slot: row for row in new}
        return [known[feed.slot] for feed in feeds]

    def put(self, cache: Cache, rows: Sequence[_Row]) -> None:
        """Know rows again that have run their token."""
        self._rows = {row.slot: row for row in rows}
        self._seen = [(weakref.ref(tensor), tensor._version) for tensor in _sources(cache)]

    def _is_current(self, cache: Cache) -> bool:
        return bool(self._seen) and all(
            source() is tensor and tensor._version == writes
            for (source, writes), tensor in zip(self._seen, _sources(cache), strict=True)
        )


def _sources(cache: Cache) -> tuple[Tensor, ...]:
    return (cache.state, cache.window, *cache.journal.tensors())


def _rows(cache: Cache, journal: Journal, feeds: Sequence[Feed], *, own: bool) -> list[_Row]:
    """Rows at their first entry, the entries before it replayed.

    own: the states may be advanced; otherwise they may be the cache's own
    """
    states: Sequence[Tensor] = [cache.state[:, feed.slot] for feed in feeds]
    if own or any(feed.entry for feed in feeds):
        slots, sources, entries = cache.index(*((f.slot, f.source, f.entry) for f in feeds))
        state, order = cache.state[:, slots], torch.arange(len(feeds))
        if any(feed.entry for feed in feeds):
            cache.kernels.ssm_commit(
                state, journal.scanned, journal.dt, cache.decay, order, sources, entries
            )
        states = [one.contiguous() for one in state.unbind(1)]
    rows, taps = [], cache.window.shape[2]
    for feed, one in zip(feeds, states, strict=True):
        history = cache.window.new_empty(len(one), taps + journal.entries, cache.window.shape[3])
        history[:, :taps] = cache.window[:, feed.slot]
        if feed.entry:
            history[:, taps : taps + feed.entry] = journal.inputs[:, feed.source, : feed.entry]
        rows.append(_Row(cache, journal, feed, history.numpy(), one.numpy()))
    return rows


class _Layer(Protocol):
    """A layer's output for normed hidden states, of one token [H] or of several [T, H]."""

    def step(self, x: Array, row: _Row) -> Array: ...
    def span(self, x: Array, row: _Row) -> Array: ...


class _Slice:
    """The weights of one slice: views, and copies of vectors alone."""

    def __init__(self, weights: ModelWeights, arch: Architecture) -> None:
        self.width = weights.embeddings.shape[1]
        self.embeddings: Array = weights.embeddings.numpy()
        self.norm, self.head = _gain(weights.norm), Matrix(weights.head)
        self.floor = self.width * arch.eps
        self.layers: list[tuple[Array, _Layer]] = []
        mamba = attention = 0
        for layer in weights.layers:
            run: _Layer
            mixer = layer.mixer
            match mixer:
                case MambaWeights():
                    run = _Mamba(mixer, arch, mamba)
                    mamba += 1
                case AttentionWeights():
                    run = _Attention(mixer, attention)
                    attention += 1
                case MoEWeights():
                    run = _MoE(mixer)
                case MLPWeights():
                    run = _MLP(mixer)
            self.layers.append((_gain(layer.norm), run))

    def step(self, row: _Row) -> Array:
        """Logits [V] after a row's one token."""
        norm, floor = row.kernels.rms_norm_step, self.floor
        hidden = self.embeddings[row.ids[0]].copy()
        for gain, layer in self.layers:
            hidden += layer.step(norm(hidden, gain, floor), row)
        return self.head.vector(norm(hidden, self.norm, floor))

    def span(self, row: _Row) -> Array:
        """Hidden states [T, H] of a row's tokens after the final norm."""
        norm, floor = row.kernels.rms_norm_span, self.floor
        hidden = self.embeddings[list(row.ids)]
        for gain, layer in self.layers:
            hidden += layer.span(norm(hidden, gain, floor), row)
        out: Array = norm(hidden, self.norm, floor)
        return out


def _gain(weight: Tensor, groups: int = 1) -> Array:
    """What a norm multiplies by: weight * sqrt(n)."""
    gain: Array = (weight * (len(weight) // groups) ** 0.5).numpy()
    return gain


class _Mamba:
    def __init__(self, w: MambaWeights, arch: Architecture, number: int) -> None:
        self.number = number
        self.in_proj, self.out_proj = Matrix(w.in_proj, w.in_bias), Matrix(w.out_proj, w.out_bias)
        self.taps: Array = w.conv.t().contiguous().numpy()
        self.conv_bias = None if w.conv_bias is None else w.conv_bias.numpy()
        self.dt_bias, self.decay, self.skip = (v.numpy() for v in (w.dt_bias, w.decay, w.skip))
        self.gain, self.floor = _gain(w.norm, arch.groups), len(w.norm) // arch.groups * arch.eps

    def step(self, x: Array, row: _Row) -> Array:
        arch, kernels, place = row.arch, row.kernels, (self.number, row.entry)
        projected = self.in_proj.vector(x)
        gate, inputs = projected[: arch.inner], projected[arch.inner : -arch.heads]
        dt = kernels.dt_step(projected[-arch.heads :], self.dt_bias, arch.min_step)
        history, end = row.history[self.number], row.entry + len(self.taps)
        history[end - 1] = inputs
        mixed = kernels.causal_conv_step(history[row.entry : end], self.taps, self.conv_bias)
        row.inputs[place], row.scanned[place] = inputs, mixed[: arch.scanned_channels]
        row.dt[place] = dt
        state = row.state[self.number]
        y = kernels.ssm_scan_step(state, mixed, dt, self.decay, self.skip, arch.groups)
        y = kernels.gated_norm_step(y, gate, self.gain, arch.groups, self.floor)
        return self.out_proj.vector(y)

    def span(self, x: Array, row: _Row) -> Array:
        arch, kernels, end = row.arch, row.kernels, row.entry + len(x)
        place = (self.number, slice(row.entry, end))
        projected = self.in_proj.rows(x)
        gate, inputs = projected[:, : arch.inner], projected[:, arch.inner : -arch.heads]
        dt = kernels.dt_step(projected[:, -arch.heads :], self.dt_bias, arch.min_step)
        history = row.history[self.number, row.entry : end + len(self.taps) - 1]
        history[-len(x) :] = inputs
        mixed = kernels.causal_conv_span(history, self.taps, self.conv_bias)
        row.inputs[place], row.scanned[place] = inputs, mixed[:, : arch.scanned_channels]
        row.dt[place] = dt
        state = row.state[self.number]
        y = kernels.ssm_scan_span(state, mixed, dt, self.decay, self.skip, arch.groups)
        y = kernels.gated_norm_span(y, gate, self.gain, arch.groups, self.floor)
        return self.out_proj.rows(y)


class _Attention:
    def __init__(self, w: AttentionWeights, number: int) -> None:
        self.number = number
        self.query, self.key, self.value, self.out = (
            Matrix(weight) for weight in (w.q_proj, w.k_proj, w.v_proj, w.o_proj)
        )

    def step(self, x: Array, row: _Row) -> Array:
        keys, values = row.keys[self.number], row.values[self.number]
        keys.numpy()[row.start].flat = self.key.vector(x)
        values.numpy()[row.start].flat = self.value.vector(x)
        end, query = row.start + 1, self.query.vector(x)
        return self.out.vector(
            row.kernels.attention_step(query, keys[:end], values[:end], row.arch.query_heads)
        )

    def span(self, x: Array, row: _Row) -> Array:
        end = row.start + len(x)
        keys, values = row.keys[self.number, :end], row.values[self.number, :end]
        keys.numpy()[row.start :].reshape(len(x), -1)[:] = self.key.rows(x)
        values.numpy()[row.start :].reshape(len(x), -1)[:] = self.value.rows(x)
        return self.out.rows(
            row.kernels.attention_span(self.query.rows(x), keys, values, row.arch.query_heads)
        )


class _MoE:
    def __init__(self, w: MoEWeights) -> None:
        self.shared = _MLP(w.shared)
        self.router, self.bias = Matrix(w.router), w.router_bias.numpy()
        self.up = [Matrix(weight) for weight in w.up.unbind()]
        self.down = [Matrix(weight) for weight in w.down.unbind()]
        self.latent_in = None if w.latent_in is None else Matrix(w.latent_in, w.latent_in_bias)
        self.latent_out = None if w.latent_out is None else Matrix(w.latent_out, w.latent_out_bias)

    def step(self, x: Array, row: _Row) -> Array:
        picks = row.kernels.route_step(x, self.router, self.bias, *_routing(row.arch))
        inner = x if self.latent_in is None else self.latent_in.vector(x)
        routed: Array = row.kernels.experts_step(inner, self.up, self.down, picks)
        if self.latent_out is not None:
            routed = self.latent_out.vector(routed)
        routed += self.shared.step(x, row)
        return routed

    def span(self, x: Array, row: _Row) -> Array:
        chosen, shares = row.kernels.route_span(x, self.router, self.bias, *_routing(row.arch))
        inner = x if self.latent_in is None else self.latent_in.rows(x)
        routed: Array = row.kernels.experts_span(inner, self.up, self.down, chosen, shares)
        if self.latent_out is not None:
            routed = self.latent_out.rows(routed)
        routed += self.shared.span(x, row)
        return routed


def _routing(arch: Architecture) -> tuple[int, int, int, bool, float]:
    return arch.top_k, arch.expert_groups, arch.top_groups, arch.normalise, arch.routed_scale


class _MLP:
    def __init__(self, w: MLPWeights) -> None:
        self.up, self.down = Matrix(w.up, w.up_bias), Matrix(w.down, w.down_bias)

    def step(self, x: Array, row: _Row) -> Array:
        out: Array = row.kernels.mlp_step(x, self.up, self.down)
        return out

    def span(self, x: Array, row: _Row) -> Array:
        out: Array = row.kernels.mlp_span(x, self.up, self.down)
        return out
