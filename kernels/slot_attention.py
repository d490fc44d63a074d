"""Launcher of slot_attention.cu."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from cascade.kernels import checks
from cascade.kernels.compiler import Kernel

WARPS, KEYS = 4, 16  # as in the .cu
DIMS = (16, 32, 64, 128)
BLOCKS = 264  # enough to fill a GPU twice
LARGEST_SPLITS = 64

_BF16 = (torch.bfloat16,)
_ATTEND = {dim: Kernel("slot_attention", f"attend_{dim}", 20, overlaps=True) for dim in DIMS}


def slot_attention(
    query: Tensor,
    fresh_keys: Tensor,
    fresh_values: Tensor,
    keys: Tensor,
    values: Tensor,
    slots: Tensor,
    starts: Tensor,
    counts: Tensor,
    out: Tensor,
) -> None:
    """Attention of a short pass's tokens over their slots, split over length; writes K and V.

    See reference_decode.slot_attention. bf16, D of 16, 32, 64 or 128, at most 16 heads that share
    K and V. Rows of a negative slot, and tokens past the end of a slot, give zeros.
    """
    slots_held, held, kv_heads, dim = checks.sizes("keys", keys, "S M kv D")
    tokens, columns = checks.sizes("query", query, "n X")
    rows = slots.numel()
    if dim not in DIMS:
        raise checks.KernelArgumentError(f"the head dim D is {dim}; expected one of {DIMS}")
    checks.multiple("the columns of query", columns, kv_heads * dim)
    group = columns // (kv_heads * dim)
    checks.within("the heads that share K and V", group, 1, 16)
    checks.multiple("the number of tokens", tokens, max(rows, 1))
    address, stride = checks.strided("query", query, _BF16, (tokens, columns))
    fresh = []
    for name, tensor in (("fresh_keys", fresh_keys), ("fresh_values", fresh_values)):
        place, own = checks.strided(name, tensor, _BF16, (tokens, kv_heads * dim))
        if own != stride:
            raise checks.KernelArgumentError(
                f"{name} has rows {own} elements apart; expected {stride}, as query has"
            )
        fresh.append(place)
    shape = slots_held, held, kv_heads, dim
    places = (
        checks.array("keys", keys, _BF16, shape),
        checks.array("values", values, _BF16, shape),
        checks.array("out", out, _BF16, (tokens, columns)),
    )
    numbers = (
        checks.index("slots", slots, rows),
        checks.index("starts", starts, rows),
        checks.index("counts", counts, rows),
    )
    for name, place in zip(("keys", "values", "out"), places, strict=True):
        checks.aligned(name, place)
    device = checks.one_gpu(
        query, fresh_keys, fresh_values, keys, values, out, slots, starts, counts
    )
    if not (rows and tokens and columns):
        return
    most = min(LARGEST_SPLITS, -(-held // (2 * WARPS * KEYS)))  # of two tiles a warp
    splits = max(1, min(most, BLOCKS // (tokens * kv_heads)))
    shape = tokens, kv_heads, splits, 16
    partial = torch.empty(*shape, dim, dtype=torch.float32, device=query.device)
    extent = torch.empty(*shape, 2, dtype=torch.float32, device=query.device)
    arrived = _arrived(query.device, tokens * kv_heads)
    numbers = (
        address,
        *fresh,
        *places,
        partial.data_ptr(),
        extent.data_ptr(),
        arrived.data_ptr(),
        *numbers,
        stride,
        tokens // rows,
        slots_held,
        held,
        kv_heads,
        group,
        splits,
        checks.float_bits(dim**-0.5),
    )
    tiles = 2 * WARPS * KEYS * (dim + 8)
    _ATTEND[dim].launch(
        device,
        (splits, kv_heads, tokens),
        (32 * WARPS, 1, 1),
        numbers,
        max(tiles, 4 * WARPS * 16 * dim),
    )


@cache
def _arrived(device: torch.device, number: int) -> Tensor:
    """How many splits are done: zero before and after every call."""
    return torch.zeros(number, dtype=torch.int32, device=device)
