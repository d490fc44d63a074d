"""The training-time forward pass: two slices in lock-step, and caches of mixed owners.

Both slices of a pair run over the same rows. Where the other slice owns a token, that slice's
keys, values, convolution inputs and time steps are what this one reads: so each learns to go on
over a cache that the other has written. Dense and quadratic in the row length, which suits rows of
a few hundred tokens; the semantics are `NemotronHForCausalLM`'s.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class Sizes:
    """Sizes of the parent. Slices narrow `hidden` and `ffn` alone."""

    pattern: str = "MEM*EMEM*EME"
    vocab: int = 128
    hidden: int = 320
    ffn: int = 128
    shared: int = 256
    experts: int = 16
    top_k: int = 2
    heads: int = 8
    head_dim: int = 32
    state: int = 32
    taps: int = 4
    query_heads: int = 4
    kv_heads: int = 2
    attention_dim: int = 32
    eps: float = 1e-5

    @property
    def inner(self) -> int:
        return self.heads * self.head_dim

    @property
    def channels(self) -> int:
        return self.inner + 2 * self.state


Widths = tuple[int, int]  # residual width, routed expert width


class Nano(nn.Module):
    """Parameters by the names of a `nemotron_h` checkpoint, dots replaced; experts stacked."""

    def __init__(self, sizes: Sizes, seed: int = 0) -> None:
        super().__init__()
        self.sizes = sizes
        self._layers: dict[int, dict[str, Tensor]] = {}
        generator = torch.Generator().manual_seed(seed)
        for name, shape in shapes(sizes).items():
            self.register_parameter(_flat(name), nn.Parameter(_initial(name, shape, generator)))
        for i, kind in enumerate(sizes.pattern):
            if kind == "E":
                self.register_buffer(
                    _flat(f"layers.{i}.mixer.gate.e_score_correction_bias"),
                    torch.zeros(sizes.experts),
                )

    def get(self, name: str) -> Tensor:
        return getattr(self, _flat(name))  # type: ignore[no-any-return]

    def layer(self, index: int) -> dict[str, Tensor]:
        """The parameters and buffers of one layer, by the rest of their names."""
        if index not in self._layers:
            prefix = _flat(f"layers.{index}.")
            both = {**dict(self.named_parameters()), **dict(self.named_buffers())}
            self._layers[index] = {
                k.removeprefix(prefix): v for k, v in both.items() if k.startswith(prefix)
            }
        return self._layers[index]


def shapes(s: Sizes) -> dict[str, tuple[int, ...]]:
    """Every parameter of the parent."""
    found: dict[str, tuple[int, ...]] = {"embeddings.weight": (s.vocab, s.hidden)}
    for i, kind in enumerate(s.pattern):
        at = f"layers.{i}."
        found[at + "norm.weight"] = (s.hidden,)
        if kind == "M":
            found |= {
                at + "mixer.in_proj.weight": (s.inner + s.channels + s.heads, s.hidden),
                at + "mixer.conv1d.weight": (s.channels, s.taps),
                at + "mixer.conv1d.bias": (s.channels,),
                at + "mixer.dt_bias": (s.heads,),
                at + "mixer.A_log": (s.heads,),
                at + "mixer.D": (s.heads,),
                at + "mixer.norm.weight": (s.inner,),
                at + "mixer.out_proj.weight": (s.hidden, s.inner),
            }
        elif kind == "*":
            query, kv = s.query_heads * s.attention_dim, s.kv_heads * s.attention_dim
            found |= {
                at + "mixer.q_proj.weight": (query, s.hidden),
                at + "mixer.k_proj.weight": (kv, s.hidden),
                at + "mixer.v_proj.weight": (kv, s.hidden),
                at + "mixer.o_proj.weight": (s.hidden, query),
            }
        else:
            found |= {
                at + "mixer.gate.weight": (s.experts, s.hidden),
                at + "mixer.experts.up_proj": (s.experts, s.ffn, s.hidden),
                at + "mixer.experts.down_proj": (s.experts, s.hidden, s.ffn),
                at + "mixer.shared_experts.up_proj.weight": (s.shared, s.hidden),
                at + "mixer.shared_experts.down_proj.weight": (s.hidden, s.shared),
            }
    found["norm_f.weight"] = (s.hidden,)
    found["lm_head.weight"] = (s.vocab, s.hidden)
    return found


def _flat(name: str) -> str:
    return name.replace(".", "__")


def _initial(name: str, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    last = name.rsplit("mixer.", 1)[-1]
    if name.endswith(("norm.weight", "norm_f.weight", "mixer.D")):
        return torch.ones(shape)
    if name.endswith("A_log"):
        return torch.linspace(math.log(0.5), math.log(16), shape[0])
    if name.endswith("dt_bias"):
        step = torch.exp(torch.linspace(math.log(0.01), math.log(0.5), shape[0]))
        return step + torch.log(-torch.expm1(-step))
    if name.endswith("conv1d.bias"):
        return torch.zeros(shape)
    if last in (
        "out_proj.weight",
        "o_proj.weight",
        "experts.down_proj",
        "shared_experts.down_proj.weight",
    ):
        return torch.zeros(shape)
    scale = {"embeddings.weight": 0.3, "lm_head.weight": 0.01, "conv1d.weight": 0.5}
    std = next((v for k, v in scale.items() if name.endswith(k)), shape[-1] ** -0.5)
    return torch.randn(shape, generator=generator) * std


# ---- one pass of a pair of slices --------------------------------------------------------------


@dataclass
class Masks:
    """What the rows of a batch allow.

    causal [B, T, T] bool: same document and not later; taps [K - 1][B, T, 1] bool: the token that
    many places before is of the same document.
    """

    causal: Tensor
    taps: list[Tensor]

    @classmethod
    def of(cls, document: Tensor, taps: int) -> Masks:
        length = document.shape[1]
        past = torch.ones(length, length, dtype=torch.bool, device=document.device).tril()
        same = (document[:, :, None] == document[:, None]) & past
        before = [
            F.pad(document[:, back:] == document[:, :-back], (back, 0))[..., None]
            for back in range(1, taps)
        ]
        return cls(same, before)


def pair_forward(
    model: Nano,
    ids: Tensor,
    document: Tensor,
    widths: tuple[Widths, Widths],
    foreign: tuple[Tensor, Tensor] | None,
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Logits [B, T, V] of both slices, and the load of each MoE layer's experts.

    foreign: for each slice the tokens [B, T] whose cache entries come from the other one.
    """
    s = model.sizes
    masks = Masks.of(document, s.taps)
    # bf16 on a GPU; a CPU is faster in fp32.
    table = model.get("embeddings.weight")
    table = table.bfloat16() if table.is_cuda else table
    streams = [F.embedding(ids, table[:, :h]) for h, _ in widths]
    loads = []
    for i, kind in enumerate(s.pattern):
        weights = model.layer(i)
        if kind == "M":
            streams = mamba_layer(weights, s, streams, widths, masks.causal, masks.taps, foreign)
        elif kind == "*":
            streams = attention_layer(weights, s, streams, widths, masks.causal, foreign)
        else:
            streams, load = moe_layer(weights, s, streams, widths)
            loads.append(load)
    outputs = []
    for x, (h, _) in zip(streams, widths, strict=True):
        x = rms_norm(x, model.get("norm_f.weight")[:h], s.eps)
        outputs.append(F.linear(x, model.get("lm_head.weight")[:, :h].to(x.dtype)))
    return outputs[0], outputs[1], loads


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    wide = x.float()
    return (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps) * weight).to(x.dtype)


def _exchange(own: list[Tensor], foreign: tuple[Tensor, Tensor] | None) -> list[Tensor]:
    """Cache entries as each slice reads them."""
    if foreign is None:
        return own
    a, b = own
    return [
        torch.where(foreign[0][..., None], b, a),
        torch.where(foreign[1][..., None], a, b),
    ]


def mamba_layer(
    w: dict[str, Tensor],
    s: Sizes,
    streams: list[Tensor],
    widths: tuple[Widths, Widths],
    causal: Tensor,
    taps: list[Tensor],
    foreign: tuple[Tensor, Tensor] | None,
) -> list[Tensor]:
    gates, caches = [], []
    for x, (h, _) in zip(streams, widths, strict=True):
        n = rms_norm(x, w["norm__weight"][:h], s.eps)
        projected = F.linear(n, w["mixer__in_proj__weight"][:, :h].to(x.dtype))
        gate, cached = projected.split([s.inner, s.channels + s.heads], -1)
        gates.append(gate)
        caches.append(cached)
    mixed = _exchange(caches, foreign)
    out = []
    for x, gate, cached, (h, _) in zip(streams, gates, mixed, widths, strict=True):
        y = _scan(w, s, cached, causal, taps)
        y = y.float() * F.silu(gate.float())
        y = y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + s.eps) * w["mixer__norm__weight"]
        out.append(x + F.linear(y.to(x.dtype), w["mixer__out_proj__weight"][:h].to(x.dtype)))
    return out


def _scan(
    w: dict[str, Tensor], s: Sizes, cached: Tensor, causal: Tensor, taps: list[Tensor]
) -> Tensor:
    """Convolution and the quadratic form of the Mamba-2 scan: [B, T, inner]."""
    inputs, step = cached.split([s.channels, s.heads], -1)
    kernel = w["mixer__conv1d__weight"].to(inputs.dtype)
    mixed = inputs * kernel[:, -1] + w["mixer__conv1d__bias"].to(inputs.dtype)
    for back, same in enumerate(taps, 1):
        shifted = F.pad(inputs[:, :-back], (0, 0, back, 0))
        mixed = mixed + torch.where(same, shifted, 0) * kernel[:, -1 - back]
    x, write, read = F.silu(mixed).split([s.inner, s.state, s.state], -1)
    x = x.unflatten(-1, (s.heads, s.head_dim))
    dt = F.softplus(step.float() + w["mixer__dt_bias"])  # [B, T, H]
    decay = -w["mixer__A_log"].exp() * dt
    length = dt.shape[1]
    # A running sum as a product with a triangle, which compiles where a scan does not.
    triangle = torch.ones(length, length, device=dt.device).tril()
    running = torch.einsum("ts,bsh->bht", triangle, decay)
    gap = running[..., :, None] - running[..., None, :]  # [B, H, T, T]
    scores = torch.einsum("btn,bsn->bts", read, write)[:, None]
    reach = torch.where(causal[:, None], gap, -1e4).exp().to(x.dtype) * scores
    weighted = x * dt[..., None].to(x.dtype)
    y = torch.einsum("bhts,bshp->bthp", reach, weighted)
    return (y + w["mixer__D"].to(x.dtype)[:, None] * x).flatten(-2)


def attention_layer(
    w: dict[str, Tensor],
    s: Sizes,
    streams: list[Tensor],
    widths: tuple[Widths, Widths],
    causal: Tensor,
    foreign: tuple[Tensor, Tensor] | None,
) -> list[Tensor]:
    queries, caches = [], []
    for x, (h, _) in zip(streams, widths, strict=True):
        n = rms_norm(x, w["norm__weight"][:h], s.eps)
        queries.append(F.linear(n, w["mixer__q_proj__weight"][:, :h].to(x.dtype)))
        key = F.linear(n, w["mixer__k_proj__weight"][:, :h].to(x.dtype))
        value = F.linear(n, w["mixer__v_proj__weight"][:, :h].to(x.dtype))
        caches.append(torch.cat([key, value], -1))
    mixed = _exchange(caches, foreign)
    out = []
    for x, query, cached, (h, _) in zip(streams, queries, mixed, widths, strict=True):
        key, value = (
            part.unflatten(-1, (s.kv_heads, s.attention_dim)).repeat_interleave(
                s.query_heads // s.kv_heads, 2
            )
            for part in cached.chunk(2, -1)
        )
        query = query.unflatten(-1, (s.query_heads, s.attention_dim))
        scores = torch.einsum("bthd,bshd->bhts", query, key).float() * s.attention_dim**-0.5
        share = torch.where(causal[:, None], scores, -1e4).softmax(-1).to(x.dtype)
        y = torch.einsum("bhts,bshd->bthd", share, value).flatten(-2)
        out.append(x + F.linear(y, w["mixer__o_proj__weight"][:h].to(x.dtype)))
    return out


def moe_layer(
    w: dict[str, Tensor], s: Sizes, streams: list[Tensor], widths: tuple[Widths, Widths]
) -> tuple[list[Tensor], Tensor]:
    """Experts dense: one wide product with the gates of the others at zero."""
    out, load = [], torch.zeros(s.experts, device=streams[0].device)
    for x, (h, f) in zip(streams, widths, strict=True):
        n = rms_norm(x, w["norm__weight"][:h], s.eps)
        scores = F.linear(n.float(), w["mixer__gate__weight"][:, :h]).sigmoid()
        chosen = (scores + w["mixer__gate__e_score_correction_bias"]).topk(s.top_k, -1).indices
        picked = torch.zeros_like(scores).scatter(-1, chosen, 1.0)
        load = load + picked.detach().flatten(0, 1).mean(0)
        share = scores * picked
        share = (share / (share.sum(-1, keepdim=True) + 1e-20)).to(x.dtype)
        up = w["mixer__experts__up_proj"][:, :f, :h].to(x.dtype)
        down = w["mixer__experts__down_proj"][:, :h, :f].to(x.dtype)
        inner = F.linear(n, up.flatten(0, 1)).relu().square().unflatten(-1, (s.experts, f))
        routed = torch.einsum("btef,ehf->bth", inner * share[..., None], down)
        shared = F.linear(
            F.linear(n, w["mixer__shared_experts__up_proj__weight"][:, :h].to(x.dtype))
            .relu()
            .square(),
            w["mixer__shared_experts__down_proj__weight"][:h].to(x.dtype),
        )
        out.append(x + routed + shared)
    return out, load
