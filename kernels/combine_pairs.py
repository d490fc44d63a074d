"""Launcher of combine_pairs.cu."""

from __future__ import annotations

import torch
from torch import Tensor

from cascade.kernels import checks
from cascade.kernels.compiler import Kernel

THREADS, COLUMNS = 256, 4  # as in the .cu

_BF16, _INT32, _FP32 = (torch.bfloat16,), (torch.int32,), (torch.float32,)
_KERNELS = {
    torch.float32: Kernel("combine_pairs", "combine_f32", 7, overlaps=True),
    torch.bfloat16: Kernel("combine_pairs", "combine_bf16", 7, overlaps=True),
}


def combine_pairs(x: Tensor, pairs: Tensor, places: Tensor, shares: Tensor) -> None:
    """x [n, K] += the sum of each token's rows of pairs [n * k, K], fp32 or bf16, times its shares.

    places: [n * k] int32, a token's rows, below zero for none; shares: [n * k] fp32
    bf16; K a multiple of 4.
    """
    tokens, width = checks.sizes("x", x, "n K")
    address, stride = checks.strided("x", x, _BF16, (tokens, width))
    number = places.numel()
    checks.multiple("the width K", width, COLUMNS)
    checks.multiple("the number of pairs", number, max(tokens, 1))
    given = (
        checks.array("pairs", pairs, checks.STORED, (number, width)),
        checks.array("places", places, _INT32, (number,)),
        checks.array("shares", shares, _FP32, (number,)),
    )
    checks.aligned("pairs", given[0])
    device = checks.one_gpu(x, pairs, places, shares)
    if not (tokens and width):
        return
    _KERNELS[pairs.dtype].launch(
        device,
        (tokens, -(-width // (THREADS * COLUMNS)), 1),
        (THREADS, 1, 1),
        (address, *given, stride, width, number // tokens),
    )
