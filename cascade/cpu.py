"""Decoding on a processor: one token a row, row by row, with the drafted tokens' states at hand.

The plain pass reads what is committed and replays the journal on top of it, every time. Here the
replayed windows and states are kept from one token to the next, outside the cache, so that a token
costs one step of the recurrence. A row's results do not depend on the rows beside it.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from cascade.architecture import Architecture
from cascade.cache import Cache
from cascade.forward import Feed
from cascade.kernels.cpu_steps import Array, product
from cascade.runner import Runner
from cascade.threads import threads_for
from cascade.weights import AttentionWeights, MambaWeights, MLPWeights, ModelWeights, MoEWeights


class CpuRunner(Runner):
    """Decodes in float32 by the steps of `kernels.cpu`; everything else takes the plain route."""

    def __init__(self, views: Sequence[ModelWeights]) -> None:
        super().__init__(views)
        self._slices: dict[int, _Slice] = {}
        self._ahead = _Ahead()

    def decode(self, writer: int, cache: Cache, feeds: Sequence[Feed]) -> Tensor:
        if cache.dtype != torch.float32 or cache.state_dtype != torch.float32:
            return super().decode(writer, cache, feeds)
        if writer not in self._slices:
            self._slices[writer] = _Slice(self.views[writer], cache.arch)
        weights = self._slices[writer]
        with (
            threads_for(cache.device, 1, weights.width),
            np.errstate(all="ignore"),  # whoever asked looks for what is not finite
        ):
            rows = self._ahead.take(cache, feeds)
            table = np.stack([weights.decode(row) for row in rows])
            self._ahead.put(cache, rows)
        return torch.from_numpy(table)


class _Row:
    """One token of one row on its way through the layers, and what its journal amounts to.

    history: [Lm, K - 1 + J, C], the window and behind it the journal's inputs
    state:   [Lm, H, P, N], after the journal entries before `entry`
    """

    def __init__(self, cache: Cache, feed: Feed, history: Array, state: Array) -> None:
        self.arch, self.kernels = cache.arch, cache.kernels
        self.history, self.state = history, state
        self.keys, self.values = cache.keys, cache.values
        self.inputs, self.scanned, self.dt = (part.numpy() for part in cache.journal.tensors())
        self.move(feed)

    def move(self, feed: Feed) -> None:
        self.token, self.slot = feed.ids[0], feed.slot
        self.position, self.entry = feed.start, feed.entry


class _Ahead:
    """Rows that stand at their next journal entry already.

    A replay would give the same only while nothing that they were made of has been written by
    anyone else. torch counts the writes to a tensor; those of the rows themselves, through NumPy,
    do not count.
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
        known |= {row.slot: row for row in _replayed(cache, missing)}
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


def _replayed(cache: Cache, feeds: Sequence[Feed]) -> list[_Row]:
    """Rows made from the cache, with the entries before each feed's replayed."""
    if not feeds:
        return []
    journal, taps = cache.journal, cache.window.shape[2]
    slots, entries = cache.index(*((feed.slot, feed.entry) for feed in feeds))
    state = cache.state[:, slots]
    if any(feed.entry for feed in feeds):
        own = torch.arange(len(feeds))
        cache.kernels.ssm_commit(
            state, journal.scanned, journal.dt, cache.decay, own, slots, entries
        )
    rows = []
    for feed, one in zip(feeds, state.unbind(1), strict=True):
        history = cache.window.new_empty(len(one), taps + journal.entries, cache.window.shape[3])
        history[:, :taps] = cache.window[:, feed.slot]
        history[:, taps : taps + feed.entry] = journal.inputs[:, feed.slot, : feed.entry]
        rows.append(_Row(cache, feed, history.numpy(), one.contiguous().numpy()))
    return rows


class _Layer(Protocol):
    def __call__(self, x: Array, row: _Row) -> Array:
        """The layer's output [H] for a normed hidden state [H]."""


class _Slice:
    """The weights of one slice laid out for single tokens: views, and copies of vectors alone."""

    def __init__(self, weights: ModelWeights, arch: Architecture) -> None:
        self.width = weights.embeddings.shape[1]
        self.embeddings: Array = weights.embeddings.numpy()
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
        self.norm, self.head = _gain(weights.norm), product(weights.head)

    def decode(self, row: _Row) -> Array:
        """Logits [V]."""
        kernels, floor = row.kernels, self.floor
        hidden = self.embeddings[row.token].copy()
        for gain, layer in self.layers:
            hidden += layer(kernels.norm_step(hidden, gain, floor), row)
        return self.head(kernels.norm_step(hidden, self.norm, floor))


def _gain(weight: Tensor, groups: int = 1) -> Array:
    """What `norm_step` multiplies by: weight * sqrt(n)."""
    gain: Array = (weight * (len(weight) // groups) ** 0.5).numpy()
    return gain


class _Mamba:
    def __init__(self, w: MambaWeights, arch: Architecture, number: int) -> None:
        self.number = number
        self.in_proj = product(w.in_proj, w.in_bias)
        self.out_proj = product(w.out_proj, w.out_bias)
        self.taps: Array = w.conv.t().contiguous().numpy()
        self.conv_bias = None if w.conv_bias is None else w.conv_bias.numpy()
        self.dt_bias, self.decay, self.skip = (v.numpy() for v in (w.dt_bias, w.decay, w.skip))
        self.gain, self.floor = _gain(w.norm, arch.groups), len(w.norm) // arch.groups * arch.eps

    def __call__(self, x: Array, row: _Row) -> Array:
        arch, kernels, place = row.arch, row.kernels, (self.number, row.slot, row.entry)
        projected = self.in_proj(x)
        gate, inputs = projected[: arch.inner], projected[arch.inner : -arch.heads]
        dt = kernels.dt_step(projected[-arch.heads :], self.dt_bias, arch.min_step)
        history, end = row.history[self.number], row.entry + len(self.taps)
        history[end - 1] = inputs
        mixed = kernels.conv_step(history[row.entry : end], self.taps, self.conv_bias)
        row.inputs[place], row.dt[place] = inputs, dt
        row.scanned[place] = mixed[: arch.scanned_channels]
        state = row.state[self.number]
        y = kernels.ssm_step(state, mixed, dt, self.decay, self.skip, arch.groups)
        y = kernels.gated_norm_step(y, gate, self.gain, arch.groups, self.floor)
        return self.out_proj(y)


class _Attention:
    def __init__(self, w: AttentionWeights, number: int) -> None:
        self.number = number
        self.query, self.key, self.value, self.out = (
            product(matrix) for matrix in (w.q_proj, w.k_proj, w.v_proj, w.o_proj)
        )

    def __call__(self, x: Array, row: _Row) -> Array:
        arch, end = row.arch, row.position + 1
        keys, values = row.keys[self.number, row.slot], row.values[self.number, row.slot]
        keys.numpy()[row.position].flat = self.key(x)
        values.numpy()[row.position].flat = self.value(x)
        query = self.query(x)
        return self.out(
            row.kernels.attention_step(query, keys[:end], values[:end], arch.query_heads)
        )


class _MoE:
    def __init__(self, w: MoEWeights) -> None:
        self.shared = _MLP(w.shared)
        self.router, self.bias = product(w.router), w.router_bias.numpy()
        self.up = [product(matrix) for matrix in w.up.unbind()]
        self.down = [product(matrix) for matrix in w.down.unbind()]
        self.latent_in = None if w.latent_in is None else product(w.latent_in, w.latent_in_bias)
        self.latent_out = None if w.latent_out is None else product(w.latent_out, w.latent_out_bias)

    def __call__(self, x: Array, row: _Row) -> Array:
        arch = row.arch
        picks = row.kernels.route_step(
            x,
            self.router,
            self.bias,
            arch.top_k,
            arch.expert_groups,
            arch.top_groups,
            arch.normalise,
            arch.routed_scale,
        )
        inner = x if self.latent_in is None else self.latent_in(x)
        routed: Array = row.kernels.experts_step(inner, self.up, self.down, picks)
        if self.latent_out is not None:
            routed = self.latent_out(routed)
        return np.add(routed, self.shared(x, row), out=routed)


class _MLP:
    def __init__(self, w: MLPWeights) -> None:
        self.up, self.down = product(w.up, w.up_bias), product(w.down, w.down_bias)

    def __call__(self, x: Array, row: _Row) -> Array:
        out: Array = row.kernels.mlp_step(x, self.up, self.down)
        return out
