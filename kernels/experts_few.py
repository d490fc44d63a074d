"""Launcher of experts_few.cu."""

from __future__ import annotations

import torch
from torch import Tensor

from cascade.kernels import checks, choose_experts, tile_stream
from cascade.kernels.compiler import Kernel
from cascade.kernels.plan import FEW_TOGETHER, Choice, Plan

THREADS, CHOOSER = 256, 32  # as in the .cu: that multiply, and that choose
WIDTHS = (8, 16, 32)  # tokens of the shared expert at once
MOST_PICKS = 256  # tokens times top_k that a block chooses for itself

_BF16 = (torch.bfloat16,)
_KERNELS = {
    width: Kernel("experts_few", f"up_{width}", 26 + choose_experts.MEMBERS, overlaps=True)
    for width in WIDTHS
}


def experts_few(
    x: Tensor,
    norm: Tensor,
    eps: float,
    choice: Choice,
    up: Tensor,
    plan: Plan,
    inner: Tensor,
    shared_up: Tensor,
    dense: Tensor,
) -> None:
    """The first half of the experts for at most 32 tokens and 256 picks, in one launch.

    See reference_decode.experts_up. bf16; K and all strides must be multiples of 8, and there must
    be a shared expert.
    """
    tokens, depth = checks.sizes("x", x, "n K")
    experts, width, _ = checks.sizes("up", up, "E F K")
    pairs, rows = plan.tokens.numel(), shared_up.shape[0]
    checks.within("the number of tokens", tokens, 0, WIDTHS[-1])
    checks.within("the width of the shared expert", rows, 1, 2**31 - 1)
    checks.within("tokens times top_k", tokens * choice.top_k, 0, MOST_PICKS)
    checks.within("the number of experts of the plan", plan.logits.shape[1], experts, experts)
    checks.within("the tokens of an item", plan.item_tokens, FEW_TOGETHER, FEW_TOGETHER)
    checks.multiple("the depth K", depth, 8)
    source, stride = checks.strided("x", x, _BF16, (tokens, depth))
    scale = checks.array("norm", norm, _BF16, (depth,))
    checks.aligned("norm", scale)
    address, expert_stride, row_stride = checks.strided("up", up, _BF16, (experts, width, depth))
    checks.within("the stride from expert to expert", expert_stride, 0, 2**31 - 1)
    target = checks.array("inner", inner, _BF16, (pairs, width))
    router, router_stride = checks.strided("router", choice.router, _BF16, (experts, depth))
    shared, shared_stride = checks.strided("shared_up", shared_up, _BF16, (rows, depth))
    place, dense_stride = checks.strided("dense", dense, _BF16, (tokens, rows))
    choosing = choose_experts.arguments(plan.logits, *choice[1:], plan)
    device = checks.one_gpu(x, norm, up, inner, shared_up, dense, *choice[:3], *plan[:9])
    held = plan.items.shape[1]
    if not (tokens and depth and width and held):
        return
    blocks = tile_stream.blocks(device, 0, held * width)
    team = tile_stream.team(blocks, held * width, FEW_TOGETHER)
    shared_team = tile_stream.team(blocks, rows, WIDTHS[-1])
    _KERNELS[next(w for w in WIDTHS if tokens <= w)].launch(
        device,
        (blocks, 1, 1),
        (THREADS + CHOOSER, 1, 1),
        (
            source,
            scale,
            address,
            target,
            router,
            shared,
            place,
            stride,
            tokens,
            depth,
            width,
            expert_stride,
            row_stride,
            router_stride,
            rows,
            shared_stride,
            dense_stride,
            checks.float_bits(eps),
            tile_stream.logarithm(team),
            tile_stream.inverse(tile_stream.teams(blocks, team)),
            tile_stream.inverse(width),
            *tile_stream.shares(blocks, shared_team, rows),
            router_blocks(experts, blocks),
            tile_stream.logarithm(max(tile_stream.WARPS // tokens, 1)),
            *choosing,
        ),
        tile_stream.RING,
    )


def most_tokens(top_k: int) -> int:
    """Tokens that one launch takes, where there is a shared expert."""
    return min(WIDTHS[-1], MOST_PICKS // top_k)


def router_blocks(experts: int, blocks: int) -> int:
    """Blocks that compute the router's logits, of one expert each if there are as many."""
    return min(experts, blocks)
