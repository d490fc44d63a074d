"""Launcher of experts_up.cu."""

from __future__ import annotations

import torch
from torch import Tensor

from cascade.kernels import checks
from cascade.kernels.compiler import Kernel, multiprocessors
from cascade.kernels.plan import Plan

THREADS = 256  # as in the .cu
RING = 8 * 8 * 2 * 32 * 16  # bytes of shared memory for weights on their way

_BF16, _INT32 = (torch.bfloat16,), (torch.int32,)
_KERNELS = {tokens: Kernel("experts_up", f"up_{tokens}", 14, overlaps=True) for tokens in (8, 16)}


def experts_up(x: Tensor, norm: Tensor, eps: float, up: Tensor, plan: Plan, inner: Tensor) -> None:
    """The first half of the chosen experts, each read once for an item of the plan.

    See reference_decode.experts_up. bf16; K and the strides of `up` must be multiples of 8.
    """
    tokens, depth = checks.sizes("x", x, "n K")
    experts, width, _ = checks.sizes("up", up, "E F K")
    address, stride = checks.strided("x", x, _BF16, (tokens, depth))
    weights, expert_stride, row_stride = checks.strided("up", up, _BF16, (experts, width, depth))
    checks.multiple("the depth K", depth, 8)
    pairs, (_, held) = plan.tokens.numel(), checks.sizes("plan.items", plan.items, "3 I")
    scale = checks.array("norm", norm, _BF16, (depth,))
    checks.aligned("norm", scale)
    places = (
        checks.array("inner", inner, _BF16, (pairs, width)),
        checks.array("plan.items", plan.items, _INT32, (3, held)),
        checks.array("plan.counts", plan.counts, _INT32, (2,)),
        checks.array("plan.tokens", plan.tokens, _INT32, (pairs,)),
    )
    if plan.item_tokens not in _KERNELS:
        raise checks.KernelArgumentError(f"items of {plan.item_tokens} tokens; expected 8 or 16")
    device = checks.one_gpu(x, norm, up, inner, *plan[:3])
    if not (tokens and depth and width and held):
        return
    _KERNELS[plan.item_tokens].launch(
        device,
        (multiprocessors(device), 1, 1),
        (THREADS, 1, 1),
        (
            address,
            scale,
            weights,
            *places,
            stride,
            depth,
            width,
            expert_stride,
            row_stride,
            held,
            checks.float_bits(eps),
        ),
        RING,
    )
