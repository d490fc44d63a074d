"""Launchers of experts_product.cu."""

from __future__ import annotations

import torch
from torch import Tensor

from cascade.kernels import checks, choose_experts, tile_stream
from cascade.kernels.compiler import Kernel
from cascade.kernels.plan import Choice, Plan

THREADS, CHOOSER = 256, 32  # as in the .cu: that multiply, and that choose where the choice is made
SHARED_WIDTHS = (8, 16, 32)  # tokens of the shared expert at once
MOST_PICKS = 256  # tokens times top_k that a block chooses for itself

_BF16, _INT32, _FP32 = (torch.bfloat16,), (torch.int32,), (torch.float32,)
_KERNELS = {
    name: Kernel("experts_product", name, 30 + choose_experts.MEMBERS, overlaps=True)
    for name in (
        *(f"up_8_shared_{width}" for width in SHARED_WIDTHS),
        *(f"{half}_{tokens}" for half in ("up", "down") for tokens in (8, 16)),
    )
}

NO_SHARED, NO_CHOICE = (0,) * 7, (0,) * choose_experts.MEMBERS


def experts_pairs_up(
    x: Tensor,
    norm: Tensor,
    eps: float,
    up: Tensor,
    plan: Plan,
    inner: Tensor,
    shared_up: Tensor | None = None,
    dense: Tensor | None = None,
    choice: Choice | None = None,
) -> None:
    """inner <- relu(up(RMSNorm(x))) ** 2 of the plan's pairs.

    See reference_decode.experts_up. bf16; K and the strides of `up` and `shared_up` must be
    multiples of 8. With a shared expert and a choice, of at most 32 tokens and 256 picks, first the
    router's product and the same of the shared expert, and the plan is made on the way.
    """
    depth = x.shape[-1]
    scale = checks.array("norm", norm, _BF16, (depth,))
    checks.aligned("norm", scale)
    pairs, width = plan.tokens.numel(), up.shape[1]
    target = checks.array("inner", inner, _BF16, (pairs, width))
    if shared_up is None or dense is None or choice is None:
        if any(given is not None for given in (shared_up, dense, choice)):
            raise checks.KernelArgumentError("shared_up, dense and choice go together")
        _launch("up", x, up, plan, target, scale, eps, NO_SHARED, NO_CHOICE, norm, inner)
        return
    tokens, rows = x.shape[0], shared_up.shape[0]
    checks.within("the number of tokens", tokens, 0, SHARED_WIDTHS[-1])
    checks.within("the width of the shared expert", rows, 1, 2**31 - 1)
    checks.within("tokens times top_k", tokens * choice.top_k, 0, MOST_PICKS)
    experts = up.shape[0]
    checks.within("the number of experts of the plan", plan.logits.shape[1], experts, experts)
    router, router_stride = checks.strided("router", choice.router, _BF16, (experts, depth))
    source, stride = checks.strided("shared_up", shared_up, _BF16, (rows, depth))
    place, dense_stride = checks.strided("dense", dense, _BF16, (tokens, rows))
    shared = (router, source, place, router_stride, rows, stride, dense_stride)
    others = norm, inner, shared_up, dense, *choice[:3], *plan[3:9]
    choosing = choose_experts.arguments(plan.logits, *choice[1:], plan)
    _launch("up", x, up, plan, target, scale, eps, shared, choosing, *others)


def experts_pairs_down(inner: Tensor, down: Tensor, plan: Plan, out: Tensor) -> None:
    """The second half of the chosen experts: out [n * k, K] fp32 <- down(inner) of each pair.

    inner: [n * k, F]; down: [E, K, F], possibly a prefix view; F and the strides of `down` must be
    multiples of 8.
    """
    pairs, width = plan.tokens.numel(), down.shape[1]
    target = checks.array("out", out, _FP32, (pairs, width))
    checks.within("the rows of inner", inner.shape[0], pairs, pairs)
    _launch("down", inner, down, plan, target, 0, 0.0, NO_SHARED, NO_CHOICE, out)


def _launch(
    half: str,
    x: Tensor,
    weights: Tensor,
    plan: Plan,
    target: int,
    scale: int,
    eps: float,
    shared: tuple[int, ...],
    choosing: tuple[int, ...],
    *others: Tensor,
) -> None:
    rows, depth = checks.sizes("x", x, "n K")
    experts, width, _ = checks.sizes("weights", weights, "E F K")
    source, stride = checks.strided("x", x, _BF16, (rows, depth))
    address, expert_stride, row_stride = checks.strided(
        "weights", weights, _BF16, (experts, width, depth)
    )
    checks.multiple("the depth K", depth, 8)
    checks.within("the stride from expert to expert", expert_stride, 0, 2**31 - 1)
    pairs, (_, held) = plan.tokens.numel(), checks.sizes("plan.items", plan.items, "3 I")
    places = (
        checks.array("plan.items", plan.items, _INT32, (3, held)),
        checks.array("plan.counts", plan.counts, _INT32, (2,)),
        checks.array("plan.tokens", plan.tokens, _INT32, (pairs,)),
    )
    router, shared_up, dense, router_stride, shared_width, shared_stride, dense_stride = shared
    name = f"{half}_{plan.item_tokens}"
    if shared_width:
        name += f"_shared_{next(w for w in SHARED_WIDTHS if rows <= w)}"
    if name not in _KERNELS:
        raise checks.KernelArgumentError(
            f"items of {plan.item_tokens} tokens; expected 8, or 16 without a shared expert"
        )
    device = checks.one_gpu(x, weights, *plan[:3], *others)
    if not (rows and depth and width and held):
        return
    at_once = 0 if shared_width else plan.item_tokens
    blocks = tile_stream.blocks(device, at_once, held * width)
    team = tile_stream.team(blocks, held * width, plan.item_tokens)
    shared_team = tile_stream.team(blocks, shared_width, SHARED_WIDTHS[-1])
    _KERNELS[name].launch(
        device,
        (blocks, 1, 1),
        (THREADS + (CHOOSER if shared_width else 0), 1, 1),
        (
            source,
            scale,
            address,
            target,
            router,
            shared_up,
            dense,
            *places,
            stride,
            rows,
            depth,
            width,
            expert_stride,
            row_stride,
            router_stride,
            shared_width,
            shared_stride,
            dense_stride,
            held,
            checks.float_bits(eps),
            tile_stream.logarithm(team),
            tile_stream.inverse(tile_stream.teams(blocks, team)),
            tile_stream.inverse(width),
            *tile_stream.shares(blocks, shared_team, shared_width),
            router_blocks(experts, blocks),
            tile_stream.logarithm(max(tile_stream.WARPS // rows, 1)),
            *choosing,
        ),
        tile_stream.RING,
    )


def router_blocks(experts: int, blocks: int) -> int:
    """Blocks that compute the router's logits, of one expert each if there are as many."""
    return min(experts, blocks)
