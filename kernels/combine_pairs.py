"""Launcher of combine_pairs.cu."""

from __future__ import annotations

import torch
from torch import Tensor

from cascade.kernels import checks
from cascade.kernels.compiler import Kernel
from cascade.kernels.plan import Plan

THREADS, COLUMNS = 256, 4  # as in the .cu

_BF16, _INT32, _FP32 = (torch.bfloat16,), (torch.int32,), (torch.float32,)
_KERNEL = Kernel("combine_pairs", "combine", 7, overlaps=True)


def combine_pairs(x: Tensor, pairs: Tensor, plan: Plan) -> None:
    """x [n, K] += the weighted sum of each token's rows of pairs [n * k, K] fp32.

    bf16; K a multiple of 4.
    """
    tokens, width = checks.sizes("x", x, "n K")
    address, stride = checks.strided("x", x, _BF16, (tokens, width))
    number = plan.places.numel()
    checks.multiple("the width K", width, COLUMNS)
    checks.multiple("the number of pairs", number, max(tokens, 1))
    places = (
        checks.array("pairs", pairs, _FP32, (number, width)),
        checks.array("plan.places", plan.places, _INT32, (number,)),
        checks.array("plan.shares", plan.shares, _FP32, (number,)),
    )
    checks.aligned("pairs", places[0])
    device = checks.one_gpu(x, pairs, plan.places, plan.shares)
    if not (tokens and width):
        return
    _KERNEL.launch(
        device,
        (-(-width // (THREADS * COLUMNS)), tokens, 1),
        (THREADS, 1, 1),
        (address, *places, stride, width, number // tokens),
    )
