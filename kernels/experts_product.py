"""Launchers of experts_product.cu."""

from __future__ import annotations

import torch
from torch import Tensor

from cascade.kernels import checks, tile_stream
from cascade.kernels.compiler import Kernel
from cascade.kernels.plan import Plan

THREADS = 256  # as in the .cu

_BF16, _INT32, _FP32 = (torch.bfloat16,), (torch.int32,), (torch.float32,)
_KERNELS = {
    (half, tokens): Kernel("experts_product", f"{half}_{tokens}", 15, overlaps=True)
    for half in ("up", "down")
    for tokens in (8, 16)
}


def experts_up(x: Tensor, norm: Tensor, eps: float, up: Tensor, plan: Plan, inner: Tensor) -> None:
    """The first half of the chosen experts: relu(up(RMSNorm(x))) ** 2 of the plan's pairs.

    See reference_decode.experts_up. bf16; K and the strides of `up` must be multiples of 8.
    """
    depth = x.shape[-1]
    scale = checks.array("norm", norm, _BF16, (depth,))
    checks.aligned("norm", scale)
    pairs, width = plan.tokens.numel(), up.shape[1]
    target = checks.array("inner", inner, _BF16, (pairs, width))
    _launch("up", x, up, plan, target, scale, eps, norm, inner)


def experts_pairs(inner: Tensor, down: Tensor, plan: Plan, out: Tensor) -> None:
    """The second half of the chosen experts: out [n * k, K] fp32 <- down(inner) of each pair.

    inner: [n * k, F]; down: [E, K, F], possibly a prefix view; F and the strides of `down` must be
    multiples of 8.
    """
    pairs, width = plan.tokens.numel(), down.shape[1]
    target = checks.array("out", out, _FP32, (pairs, width))
    checks.within("the rows of inner", inner.shape[0], pairs, pairs)
    _launch("down", inner, down, plan, target, 0, 0.0, out)


def _launch(
    half: str,
    x: Tensor,
    weights: Tensor,
    plan: Plan,
    target: int,
    scale: int,
    eps: float,
    *others: Tensor,
) -> None:
    rows, depth = checks.sizes("x", x, "n K")
    experts, width, _ = checks.sizes("weights", weights, "E F K")
    source, stride = checks.strided("x", x, _BF16, (rows, depth))
    address, expert_stride, row_stride = checks.strided(
        "weights", weights, _BF16, (experts, width, depth)
    )
    checks.multiple("the depth K", depth, 8)
    pairs, (_, held) = plan.tokens.numel(), checks.sizes("plan.items", plan.items, "3 I")
    places = (
        checks.array("plan.items", plan.items, _INT32, (3, held)),
        checks.array("plan.counts", plan.counts, _INT32, (2,)),
        checks.array("plan.tokens", plan.tokens, _INT32, (pairs,)),
    )
    if (half, plan.item_tokens) not in _KERNELS:
        raise checks.KernelArgumentError(f"items of {plan.item_tokens} tokens; expected 8 or 16")
    device = checks.one_gpu(x, weights, *plan[:3], *others)
    if not (rows and depth and width and held):
        return
    blocks = tile_stream.blocks(device, plan.item_tokens, held * width)
    _KERNELS[half, plan.item_tokens].launch(
        device,
        (blocks, 1, 1),
        (THREADS, 1, 1),
        (
            source,
            scale,
            address,
            target,
            *places,
            stride,
            depth,
            width,
            expert_stride,
            row_stride,
            held,
            checks.float_bits(eps),
            tile_stream.team(blocks, held * width),
        ),
        tile_stream.RING,
    )
