"""One layer's activations in plain PyTorch: norms, convolution, scan, attention, routed experts."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

SCAN_CHUNK = 128
GATHER_LIMIT = 8  # (token, expert) pairs up to which experts are gathered rather than looped


def rms_norm(x: Tensor, weight: Tensor, eps: float, groups: int = 1) -> Tensor:
    """RMSNorm over each of `groups` equal parts of the last dimension, in fp32.

    Scaled in the dtype of `x`.
    """
    wide = x.float()
    if groups > 1:
        wide = wide.unflatten(-1, (groups, -1))
    wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    return weight * (wide.flatten(-2) if groups > 1 else wide).to(x.dtype)


def fits_spans(arch: object, dtype: torch.dtype) -> bool:
    """Whether `mamba_span` takes a model's layers; here they are put together from what follows."""
    return False


def gated_norm(y: Tensor, gate: Tensor, weight: Tensor, groups: int, eps: float) -> Tensor:
    """RMSNorm of y * silu(gate) over each of `groups` equal parts of the last dimension."""
    wide = y.float() * F.silu(gate.float())
    parts = wide.unflatten(-1, (groups, -1))
    parts = parts * torch.rsqrt(parts.pow(2).mean(-1, keepdim=True) + eps)
    normed: Tensor = weight * parts.flatten(-2).to(gate.dtype)
    return normed


def causal_conv(history: Tensor, inputs: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Depthwise causal convolution and SiLU.

    history: [R, K - 1, C], the inputs before; inputs: [R, T, C]; weight: [C, K]; returns [R, T, C].
    """
    joined = torch.cat([history, inputs], dim=1)
    length, taps = inputs.shape[1], weight.shape[1]
    out = joined[:, :length] * weight[:, 0]
    for tap in range(1, taps):
        out = torch.addcmul(out, joined[:, tap : tap + length], weight[:, tap])
    return F.silu(out if bias is None else out + bias)


def ssm_scan(
    state: Tensor, scanned: Tensor, dt: Tensor, read: Tensor, decay: Tensor, skip: Tensor
) -> Tensor:
    """The Mamba-2 scan over a state and a journal, without writing either.

    state:   [R, H, P, N], before the first entry
    scanned: [R, J + T, H * P + G * N], x and B of the journal's J entries and of T new tokens
    dt:      [R, J + T, H] fp32; zero marks an entry that does not exist
    read:    [R, T, G, N], C of the new tokens
    decay:   [H] fp32; skip: [H]
    Returns y [R, T, H * P] fp32 of the new tokens: the chunked state-space-dual form.
    """
    rows, length, groups, size = read.shape
    heads, head_dim = state.shape[1:3]
    total = scanned.shape[1]
    first_new = total - length
    x, write = split_scanned(scanned.float(), heads, head_dim, groups, size)
    weighted = x * dt[..., None]
    read_heads = read.float().transpose(1, 2).repeat_interleave(heads // groups, 1)  # [R, H, T, N]
    running = state.float()
    outputs = []
    for begin in range(0, total, SCAN_CHUNK):
        end = min(begin + SCAN_CHUNK, total)
        cumulative = (dt[:, begin:end] * decay).cumsum(1)  # [R, n, H]
        first = max(begin, first_new)
        if first < end:
            now = cumulative[:, first - begin :].transpose(1, 2)  # [R, H, m]
            query = read_heads[:, :, first - first_new : end - first_new]
            gap = now[..., None] - cumulative.transpose(1, 2)[:, :, None]  # [R, H, m, n]
            future = torch.ones(gap.shape[2:], dtype=torch.bool, device=gap.device).triu(
                first - begin + 1
            )
            write_heads = (
                write[:, begin:end].permute(0, 2, 3, 1).repeat_interleave(heads // groups, 1)
            )
            mix = (query @ write_heads) * gap.masked_fill(future, -torch.inf).exp()
            y = mix @ weighted[:, begin:end].transpose(1, 2)  # [R, H, m, P]
            y = y + (query @ running.transpose(-1, -2)) * now.exp()[..., None]
            outputs.append(y.transpose(1, 2))
        if end < total:
            running = advance(running, weighted[:, begin:end], write[:, begin:end], cumulative)
    y = torch.cat(outputs, 1) if len(outputs) > 1 else outputs[0]
    return (y + skip.float()[:, None] * x[:, first_new:]).reshape(rows, length, heads * head_dim)


def attention(
    query: Tensor, keys: Tensor, values: Tensor, spans: Sequence[tuple[int, int]]
) -> Tensor:
    """Causal grouped-query attention of new tokens over their slots.

    query: [R, T, heads, D]; keys, values: [S, M, kv_heads, D], holding the new tokens already
    spans: the slot and the position of the first new token of each row
    A token sees positions up to its own. Returns [R, T, heads * D].
    """
    length = query.shape[1]
    slots, starts = zip(*spans, strict=True)
    longest = min(max(starts) + length, keys.shape[1])  # a padded token may lie past the end
    if len(spans) == 1:
        [row] = slots
        keys, values = keys[row : row + 1, :longest], values[row : row + 1, :longest]
    else:
        rows = torch.tensor(slots, device=query.device)
        keys, values = keys[rows, :longest], values[rows, :longest]
    positions = torch.tensor(starts, device=query.device)[:, None, None] + torch.arange(
        length, device=query.device
    ).unsqueeze(-1)
    visible = torch.arange(longest, device=query.device) <= positions  # [R, T, longest]
    out = F.scaled_dot_product_attention(
        query.transpose(1, 2),
        keys.transpose(1, 2),
        values.transpose(1, 2),
        attn_mask=visible[:, None],
        enable_gqa=True,
    )
    return out.transpose(1, 2).flatten(2)


def route(
    x: Tensor,
    router: Tensor,
    bias: Tensor,
    top_k: int,
    num_groups: int,
    top_groups: int,
    normalise: bool,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Sigmoid routing with a choice-only bias and optional expert groups (arXiv 2412.19437).

    x: [T, H]; router: [E, H]; bias: [E] fp32. Returns (experts [T, k] int64, weights [T, k] fp32).
    """
    logits = F.linear(x.float(), router.float())
    return choose(logits, bias, top_k, num_groups, top_groups, normalise, scale)


def choose(
    logits: Tensor,
    bias: Tensor,
    top_k: int,
    num_groups: int,
    top_groups: int,
    normalise: bool,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """`route` from the router's logits [T, E] fp32 on."""
    scores = logits.sigmoid()
    choice = scores + bias
    if num_groups > 1:
        grouped = choice.unflatten(-1, (num_groups, -1))
        best = grouped.topk(2, -1).values.sum(-1).topk(top_groups, -1).indices
        allowed = torch.zeros_like(grouped[..., 0], dtype=torch.bool).scatter_(1, best, True)
        choice = grouped.masked_fill(~allowed[..., None], -torch.inf).flatten(-2)
    experts = choice.topk(top_k, -1, sorted=False).indices
    weights = scores.gather(1, experts)
    if normalise:
        weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
    return experts, weights * scale


def experts(x: Tensor, up: Tensor, down: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
    """Weighted sum of the chosen experts, down(relu(up(x)) ** 2) each.

    x: [T, H]; up: [E, F, H]; down: [E, H, F]; chosen: [T, k] int64; weights: [T, k] fp32.
    `up` and `down` may be prefix views. Returns [T, H] in the dtype of `x`.
    """
    tokens, top_k = chosen.shape
    if tokens * top_k <= GATHER_LIMIT:
        flat = chosen.flatten()
        wide = x.repeat_interleave(top_k, 0)[:, :, None]  # [T * k, H, 1]
        inner = torch.bmm(up[flat], wide).relu().square()
        out = torch.bmm(down[flat], inner).view(tokens, top_k, -1)
        return (out * weights[..., None]).sum(1).to(x.dtype)
    result = torch.zeros(x.shape, dtype=weights.dtype, device=x.device)
    order = chosen.flatten().argsort()
    sizes = torch.bincount(chosen.flatten(), minlength=up.shape[0]).tolist()
    for expert, members in enumerate(order.split(sizes)):
        if members.numel():
            token = members // top_k
            inner = F.linear(x[token], up[expert]).relu().square()
            out = F.linear(inner, down[expert]) * weights.flatten()[members, None]
            result.index_add_(0, token, out.to(result.dtype))
    return result.to(x.dtype)


def split_scanned(
    scanned: Tensor, heads: int, head_dim: int, groups: int, size: int
) -> tuple[Tensor, Tensor]:
    """x [R, T, H, P] and B [R, T, G, N] out of their joint storage."""
    x, write = scanned.split([heads * head_dim, groups * size], dim=-1)
    return x.unflatten(-1, (heads, head_dim)), write.unflatten(-1, (groups, size))


def advance(state: Tensor, weighted: Tensor, write: Tensor, cumulative: Tensor) -> Tensor:
    """The state after a run of tokens: [R, H, P, N].

    weighted: [R, T, H, P], dt x; write: [R, T, G, N]; cumulative: [R, T, H], running sum of A dt.
    """
    last = cumulative[:, -1]
    remaining = (last[:, None] - cumulative).exp()
    left = (weighted * remaining[..., None]).permute(0, 2, 3, 1)  # [R, H, P, T]
    right = write.transpose(1, 2).repeat_interleave(state.shape[1] // write.shape[2], 1)
    return state * last.exp()[..., None, None] + left @ right
