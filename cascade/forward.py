"""The forward pass of any slice over the shared cache.

One function for prefill chunks, decode and verification, ragged over rows: tokens are packed, and
only the convolution, the scan and attention see rows. The pass reads committed windows and states,
writes K and V at its own (uncommitted) positions and journal entries, and nothing else.

Source: NemotronH (transformers `modeling_nemotron_h.py`), Mamba-2 (arXiv 2405.21060).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor

from cascade.architecture import Architecture
from cascade.cache import Cache, Journal
from cascade.threads import threads_for
from cascade.weights import AttentionWeights, MambaWeights, MLPWeights, ModelWeights, MoEWeights


@dataclass(frozen=True, slots=True)
class Feed:
    """Tokens that one row of a pass runs.

    slot, source: numbers of the cache slot and of the journal row
    start:        absolute position of the first id
    entry:        journal entry of the first id; the entries before it are read
    """

    slot: int
    source: int
    start: int
    entry: int
    ids: Sequence[int]


class Layout:
    """Index tensors of one pass: packed tokens [n] and their places, rows padded to [R, T]."""

    def __init__(self, feeds: Sequence[Feed], device: torch.device) -> None:
        counts = [len(feed.ids) for feed in feeds]
        self.rows, self.length, self.past = len(feeds), max(counts), max(f.entry for f in feeds)
        self.uniform = min(counts) == self.length
        self.spans = [(feed.slot, feed.start) for feed in feeds]
        self.ids = torch.tensor([token for feed in feeds for token in feed.ids], device=device)
        begins = [0, *accumulate(counts)]
        head = [
            (f.slot, f.source, f.start, f.entry, begin, count)
            for f, begin, count in zip(feeds, begins, counts, strict=False)
        ]
        table = torch.tensor(head, device=device).T.contiguous()
        self.slots, self.sources, self.starts, self.entries, self.begins, self.counts = table
        # Where each packed token stands: slot, journal row, position, entry, padded cell.
        row = torch.arange(self.rows, device=device)
        if self.rows > 1:
            row = row.repeat_interleave(self.counts, output_size=begins[-1])
        t = torch.arange(begins[-1], device=device) - self.begins[row]
        self.token_slot, self.token_source = self.slots[row], self.sources[row]
        self.position, self.entry = self.starts[row] + t, self.entries[row] + t
        self.cell = row * self.length + t

    def pad(self, packed: Tensor) -> Tensor:
        """[n, ...] -> [R, T, ...], zeros where a row has no token."""
        if not self.uniform:
            padded = packed.new_zeros(self.rows * self.length, *packed.shape[1:])
            padded[self.cell] = packed
            packed = padded
        return packed.view(self.rows, self.length, *packed.shape[1:])

    def pack(self, padded: Tensor) -> Tensor:
        """[R, T, ...] -> [n, ...]."""
        flat = padded.flatten(0, 1)
        return flat if self.uniform else flat[self.cell]


def forward(
    weights: ModelWeights,
    arch: Architecture,
    kernels: ModuleType,
    cache: Cache,
    journal: Journal,
    feeds: Sequence[Feed],
    observe: Callable[[Tensor], None] | None = None,
) -> list[Tensor]:
    """Run every row's tokens under one slice.

    observe: called in every MoE layer with the experts chosen there, [tokens, k]

    Returns, for each row, the hidden states of its ids after the final norm, [len(ids), H].
    """
    tokens = sum(len(feed.ids) for feed in feeds)
    with threads_for(cache.device, tokens, weights.embeddings.shape[1]):
        return _forward(weights, arch, kernels, cache, journal, feeds, observe)


def _forward(
    weights: ModelWeights,
    arch: Architecture,
    kernels: ModuleType,
    cache: Cache,
    journal: Journal,
    feeds: Sequence[Feed],
    observe: Callable[[Tensor], None] | None,
) -> list[Tensor]:
    layout = Layout(feeds, cache.device)
    hidden = F.embedding(layout.ids, weights.embeddings)
    mamba = attention = 0
    for layer in weights.layers:
        x = kernels.rms_norm(hidden, layer.norm, arch.eps)
        mixer = layer.mixer
        match mixer:
            case MambaWeights():
                out = _mamba(mixer, arch, kernels, cache, journal, layout, mamba, x)
                mamba += 1
            case AttentionWeights():
                out = _attention(mixer, arch, kernels, cache, layout, attention, x)
                attention += 1
            case MoEWeights():
                out = _moe(mixer, arch, kernels, x, observe)
            case MLPWeights():
                out = _mlp(mixer, x)
        hidden = hidden + out
    hidden = kernels.rms_norm(hidden, weights.norm, arch.eps)
    return list(hidden.split([len(feed.ids) for feed in feeds]))


def logits(weights: ModelWeights, hidden: Tensor) -> Tensor:
    """[..., H] -> [..., V] fp32."""
    with threads_for(hidden.device, len(hidden), hidden.shape[-1]):
        return F.linear(hidden, weights.head).float()


def _mamba(
    w: MambaWeights,
    arch: Architecture,
    kernels: ModuleType,
    cache: Cache,
    journal: Journal,
    layout: Layout,
    layer: int,
    x: Tensor,
) -> Tensor:
    projected = F.linear(x, w.in_proj, w.in_bias)
    if kernels.fits_spans(arch, x.dtype):
        inputs, scanned, dt = journal.tensors()
        y = kernels.mamba_span(
            projected,
            cache.state[layer],
            cache.window[layer],
            (inputs[layer], scanned[layer], dt[layer]),
            w.conv,
            w.conv_bias,
            w.dt_bias,
            w.decay,
            w.skip,
            arch.min_step,
            layout.slots,
            layout.sources,
            layout.entries,
            layout.begins,
            layout.counts,
            layout.length,
        )
        y = kernels.rms_norm(y, w.norm, arch.eps, arch.groups)
        return F.linear(y, w.out_proj, w.out_bias)
    gate, inputs, step = projected.split([arch.inner, arch.conv_channels, arch.heads], dim=-1)
    dt = F.softplus(step.float() + w.dt_bias.float()).clamp(min=arch.min_step)

    history = cache.window[layer, layout.slots]
    if layout.past:
        history = torch.cat([history, journal.inputs[layer, layout.sources, : layout.past]], 1)
        taps = torch.arange(arch.conv_taps - 1, device=x.device)
        rows = torch.arange(layout.rows, device=x.device)[:, None]
        history = history[rows, layout.entries[:, None] + taps]
    mixed = kernels.causal_conv(history, layout.pad(inputs), w.conv, w.conv_bias)
    scanned, read = mixed.split(
        [arch.scanned_channels, arch.conv_channels - arch.scanned_channels], dim=-1
    )

    place = (layer, layout.token_source, layout.entry)
    journal.inputs[place] = inputs
    journal.scanned[place] = layout.pack(scanned)
    journal.dt[place] = dt

    steps = layout.pad(dt)
    if layout.past:
        before = torch.arange(layout.past, device=x.device) < layout.entries[:, None]
        past = journal.dt[layer, layout.sources, : layout.past] * before[..., None]
        steps = torch.cat([past, steps], 1)
        scanned = torch.cat([journal.scanned[layer, layout.sources, : layout.past], scanned], 1)
    y = kernels.ssm_scan(
        cache.state[layer, layout.slots],
        scanned,
        steps,
        read.unflatten(-1, (arch.groups, arch.state_size)),
        w.decay,
        w.skip,
    )
    y = kernels.gated_norm(layout.pack(y), gate, w.norm, arch.groups, arch.eps)
    return F.linear(y, w.out_proj, w.out_bias)


def _attention(
    w: AttentionWeights,
    arch: Architecture,
    kernels: ModuleType,
    cache: Cache,
    layout: Layout,
    layer: int,
    x: Tensor,
) -> Tensor:
    query = F.linear(x, w.q_proj).unflatten(-1, (arch.query_heads, arch.attention_dim))
    place = (layer, layout.token_slot, layout.position)
    heads = (arch.kv_heads, arch.attention_dim)
    cache.keys[place] = F.linear(x, w.k_proj).unflatten(-1, heads)
    cache.values[place] = F.linear(x, w.v_proj).unflatten(-1, heads)
    out = kernels.attention(layout.pad(query), cache.keys[layer], cache.values[layer], layout.spans)
    return F.linear(layout.pack(out), w.o_proj)


def _moe(
    w: MoEWeights,
    arch: Architecture,
    kernels: ModuleType,
    x: Tensor,
    observe: Callable[[Tensor], None] | None,
) -> Tensor:
    chosen, share = kernels.route(
        x,
        w.router,
        w.router_bias,
        arch.top_k,
        arch.expert_groups,
        arch.top_groups,
        arch.normalise,
        arch.routed_scale,
    )
    if observe is not None:
        observe(chosen)
    inner = x if w.latent_in is None else F.linear(x, w.latent_in, w.latent_in_bias)
    routed: Tensor = kernels.experts(inner, w.up, w.down, chosen, share)
    if w.latent_out is not None:
        routed = F.linear(routed, w.latent_out, w.latent_out_bias)
    return routed + _mlp(w.shared, x)


def _mlp(w: MLPWeights, x: Tensor) -> Tensor:
    return F.linear(F.linear(x, w.up, w.up_bias).relu().square(), w.down, w.down_bias)
