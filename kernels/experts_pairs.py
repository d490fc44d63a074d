"""Launchers of experts_pairs.cu."""

from __future__ import annotations

import torch
from torch import Tensor

from cascade.kernels import checks, choose_experts, tile_stream
from cascade.kernels.compiler import Kernel, largest_shared, multiprocessors
from cascade.kernels.plan import Plan

WARPS, RING = 2 * tile_stream.WARPS, 2 * tile_stream.RING  # of a block, as in the .cu
MOST = 32  # pairs of one item

_BF16, _FP32 = (torch.bfloat16,), (torch.float32,)
_KERNELS = {half: Kernel("experts_pairs", half, 14, overlaps=True) for half in ("up", "down")}


def experts_pairs_up(x: Tensor, up: Tensor, plan: Plan, inner: Tensor) -> None:
    """inner [n * k, F] <- relu(up(x)) ** 2 of the plan's pairs, of x [n, K] after its norm.

    bf16; up: [E, F, K], possibly a prefix view; K and the strides of `up` must be multiples of 8.
    """
    pairs, width = plan.tokens.numel(), up.shape[1]
    target = checks.array("inner", inner, _BF16, (pairs, width))
    _launch("up", x, up, plan, target, inner)


def experts_pairs_down(inner: Tensor, down: Tensor, plan: Plan, out: Tensor) -> None:
    """The second half of the chosen experts: out [n * k, K] fp32 <- down(inner) of each pair.

    inner: [n * k, F]; down: [E, K, F], possibly a prefix view; F and the strides of `down` must be
    multiples of 8. May begin before `inner` is there, with the plan as the first half had it.
    """
    pairs, width = plan.tokens.numel(), down.shape[1]
    target = checks.array("out", out, _FP32, (pairs, width))
    checks.within("the rows of inner", inner.shape[0], pairs, pairs)
    _launch("down", inner, down, plan, target, out)


def most_together(depth: int, device: int) -> int:
    """Pairs that an item may have: all are multiplied with a weight when it is read.

    depth: columns of the product. None fit where shared memory is small and rows are long.
    """
    return min(MOST, room(depth, device) // 8 * 8)


def room(depth: int, device: int) -> int:
    """Pairs of `depth` columns that fit into the shared memory of a block."""
    return max(largest_shared(device) - RING, 0) // (16 * _line(depth))


def _line(depth: int) -> int:
    """Pieces of 16 bytes of a pair: whole batches, and neighbours in other banks."""
    return -(-depth // tile_stream.SPAN) * tile_stream.SPAN // 8 + 4


def _launch(half: str, x: Tensor, weights: Tensor, plan: Plan, target: int, out: Tensor) -> None:
    rows, depth = checks.sizes("x", x, "n K")
    experts, width, _ = checks.sizes("weights", weights, "E F K")
    source, stride = checks.strided("x", x, _BF16, (rows, depth))
    address, expert_stride, row_stride = checks.strided(
        "weights", weights, _BF16, (experts, width, depth)
    )
    checks.multiple("the depth K", depth, 8)
    pairs = plan.tokens.numel()
    items, counts, tokens, _ = choose_experts.addresses(plan, pairs)
    held = plan.items.shape[1]
    checks.within("the rows of all items", held * width, 0, 2**31 - 1)
    device = checks.one_gpu(x, weights, *plan[:3], out)
    checks.within("the pairs of an item", plan.item_tokens, 1, most_together(depth, device))
    if not (rows and depth and width and held):
        return
    at_once = min(room(depth, device), -(-pairs // 8) * 8)
    _KERNELS[half].launch(
        device,
        (multiprocessors(device), 1, 1),
        (32 * WARPS, 1, 1),
        (
            source,
            address,
            target,
            items,
            counts,
            tokens,
            stride,
            depth,
            width,
            expert_stride,
            row_stride,
            held,
            at_once,
            _line(depth),
        ),
        RING + 16 * _line(depth) * at_once,
    )
