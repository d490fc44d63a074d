"""A layer's activations for many tokens: the library's products, and a scan in parallel chunks.

The same functions as in `reference_layers`, by another order of the same sums. They run on any
device; on a GPU they keep it busy, where the definitions would launch one small kernel after the
other.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.bias import causal_lower_right

from cascade.kernels import reference_layers as layers
from cascade.kernels.combine_pairs import COLUMNS, combine_pairs
from cascade.kernels.reference_layers import split_scanned

SCAN_CHUNK = 128
SCAN_SPAN = 4096  # tokens whose chunks run at once; temporaries grow with it, and no further
FEW_PAIRS = layers.GATHER_LIMIT + 1  # (token, expert) pairs below which grouping them does not pay


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
    """See reference_layers.route: bf16 is multiplied as it is, into fp32."""
    rest = top_k, num_groups, top_groups, normalise, scale
    if not x.is_cuda or x.dtype != torch.bfloat16 or router.dtype != x.dtype:
        return layers.route(x, router, bias, *rest)
    return layers.choose(torch.mm(x, router.T, out_dtype=torch.float32), bias, *rest)


def experts(x: Tensor, up: Tensor, down: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
    """See reference_layers.experts: all experts in two grouped products, for bf16."""
    tokens, top_k = chosen.shape
    if x.dtype != torch.bfloat16 or tokens * top_k < FEW_PAIRS or x.shape[1] % COLUMNS:
        return layers.experts(x, up, down, chosen, weights)
    ranked, order = chosen.flatten().int().sort(stable=True)
    numbers = torch.arange(up.shape[0], dtype=torch.int32, device=x.device)
    ends = torch.searchsorted(ranked, numbers, right=True, out_int32=True)
    inner = F.grouped_mm(x.index_select(0, order // top_k), up.transpose(1, 2), offs=ends)
    pairs = F.grouped_mm(inner.relu_().square_(), down.transpose(1, 2), offs=ends)
    places = torch.empty_like(ranked)
    places[order] = torch.arange(len(order), dtype=torch.int32, device=x.device)
    summed = torch.zeros_like(x)
    combine_pairs(summed, pairs, places, weights.flatten())
    return summed


def attention(
    query: Tensor, keys: Tensor, values: Tensor, spans: Sequence[tuple[int, int]]
) -> Tensor:
    """See reference_layers.attention: row by row, without a mask in memory."""
    group, length = query.shape[2] // keys.shape[2], query.shape[1]
    found = []
    for q, (row, start) in zip(query, spans, strict=True):
        # A padded token may lie past the end of the slot, and sees nothing.
        end = min(start + length, keys.shape[1])
        k, v = (
            cache[row, :end].transpose(0, 1).repeat_interleave(group, 0)[None]
            for cache in (keys, values)
        )
        q = q[: end - start].transpose(0, 1)[None]
        mask = causal_lower_right(end - start, end)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)[0]
        found.append(F.pad(out.transpose(0, 1).flatten(1), (0, 0, 0, start + length - end)))
    return torch.stack(found) if len(found) > 1 else found[0][None]


def ssm_scan(
    state: Tensor, scanned: Tensor, dt: Tensor, read: Tensor, decay: Tensor, skip: Tensor
) -> Tensor:
    """See reference_layers.ssm_scan: the chunks of a span side by side.

    Mamba-2, arXiv 2405.21060, listing 1. Temporaries are quadratic in the chunk alone.
    """
    length, total = read.shape[1], scanned.shape[1]
    if total != length or length <= SCAN_CHUNK:
        return layers.ssm_scan(state, scanned, dt, read, decay, skip)
    heads, head_dim, size = state.shape[1:]
    running, found = state.float(), []
    for begin in range(0, length, SCAN_SPAN):
        part = slice(begin, begin + SCAN_SPAN)
        x, write = split_scanned(scanned[:, part], heads, head_dim, read.shape[2], size)
        y, running = _span(
            running, x.float(), write.float(), dt[:, part], read[:, part].float(), decay
        )
        found.append((y + skip.float()[:, None] * x).flatten(2))
    return torch.cat(found, 1) if len(found) > 1 else found[0]


def _span(
    state: Tensor, x: Tensor, write: Tensor, dt: Tensor, read: Tensor, decay: Tensor
) -> tuple[Tensor, Tensor]:
    """y [R, T, H, P] of a span of tokens, without the skip, and the state after it."""
    length = x.shape[1]
    pad = -length % SCAN_CHUNK
    chunks = (length + pad) // SCAN_CHUNK
    of_group = x.shape[2] // write.shape[2]

    def cut(value: Tensor) -> Tensor:  # [R, T, ...] -> [R, c, n, ...]; a dt of zero changes nothing
        padded: Tensor = F.pad(value, (0, 0) * (value.dim() - 2) + (0, pad))
        chunked: Tensor = padded.unflatten(1, (chunks, SCAN_CHUNK))
        return chunked

    steps = cut(dt)
    weighted = (cut(x) * steps[..., None]).transpose(2, 3)  # [R, c, H, n, P]
    b, c = cut(write).transpose(2, 3), cut(read).transpose(2, 3)  # [R, c, G, n, N]
    sums = (steps * decay).cumsum(2).transpose(2, 3)  # [R, c, H, n]
    gap = sums[..., :, None] - sums[..., None, :]
    future = torch.ones(SCAN_CHUNK, SCAN_CHUNK, dtype=torch.bool, device=x.device).triu(1)
    mix = gap.masked_fill_(future, -torch.inf).exp_().unflatten(2, (-1, of_group))
    mix *= (c @ b.transpose(-1, -2))[:, :, :, None]
    y = mix.flatten(2, 3) @ weighted
    del mix, gap

    last = sums[..., -1:]  # [R, c, H, 1]
    left = weighted * (last - sums).exp()[..., None]
    added = left.transpose(-1, -2) @ b.repeat_interleave(of_group, 2)  # [R, c, H, P, N]
    before = []
    for chunk in range(chunks):
        before.append(state)
        state = torch.addcmul(added[:, chunk], state, last[:, chunk, :, :, None].exp())
    carried = c.repeat_interleave(of_group, 2) @ torch.stack(before, 1).transpose(-1, -2)
    y = torch.addcmul(y, carried, sums.exp()[..., None])
    return y.transpose(2, 3).flatten(1, 2)[:, :length], state
