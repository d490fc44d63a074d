"""Launcher of choose_experts.cu."""

from __future__ import annotations

import torch
from torch import Tensor

from cascade.kernels import checks
from cascade.kernels.compiler import Kernel
from cascade.kernels.plan import Plan

THREADS = 256  # as in the .cu
LARGEST_EXPERTS, LARGEST_CHOICE = 256, 32
LARGEST_SHARED = 200 * 1024

_FP32, INT32 = (torch.float32,), (torch.int32,)
MEMBERS = 19  # of `Choice` in choose.cuh
_KERNEL = Kernel("choose_experts", "choose", MEMBERS, overlaps=True)


def choose_experts(
    logits: Tensor,
    bias: Tensor,
    counts: Tensor,
    top_k: int,
    normalise: bool,
    scale: float,
    plan: Plan,
) -> None:
    """Fill `plan` with the top-k experts of every token that counts.

    See reference_decode.choose_experts. At most 256 experts, and not more tokens than one block can
    list: some 3,000 where each chooses six of 128. Items beyond what `plan` holds are
    left out; `Plan.empty` holds all that can be.
    """
    values = arguments(logits, bias, counts, top_k, normalise, scale, plan)
    tokens = logits.shape[0]
    shared = 4 * (plan.bits.numel() + 2 * tokens * top_k)
    checks.within("the choice of all tokens, in bytes of shared memory,", shared, 0, LARGEST_SHARED)
    device = checks.one_gpu(logits, bias, counts, *plan[:8])
    if not (tokens and counts.numel()):
        return
    blocks = -(-tokens // (THREADS // 32))
    _KERNEL.launch(device, (blocks, 1, 1), (THREADS, 1, 1), values, shared)


def arguments(
    logits: Tensor,
    bias: Tensor,
    counts: Tensor,
    top_k: int,
    normalise: bool,
    scale: float,
    plan: Plan,
) -> tuple[int, ...]:
    """The members of `Choice` in choose.cuh, checked."""
    tokens, experts = checks.sizes("logits", logits, "n E")
    rows, pairs = counts.numel(), tokens * top_k
    checks.within("the number of experts E", experts, 1, LARGEST_EXPERTS)
    checks.within("top_k", top_k, 1, min(experts, LARGEST_CHOICE))
    checks.multiple("the number of tokens", tokens, max(rows, 1))
    places = (
        checks.array("logits", logits, _FP32, (tokens, experts)),
        checks.array("bias", bias, _FP32, (experts,)),
        checks.index("counts", counts, rows),
        *addresses(plan, pairs),
        checks.array("plan.places", plan.places, INT32, (pairs,)),
        checks.array("plan.shares", plan.shares, _FP32, (pairs,)),
        checks.array("plan.bits", plan.bits, INT32, (experts, -(-tokens // 32))),
        checks.array("plan.arrived", plan.arrived, INT32, (1,)),
    )
    return (
        *places,
        tokens // max(rows, 1),
        tokens,
        experts,
        top_k,
        plan.item_tokens,
        plan.items.shape[1],
        int(normalise),
        checks.float_bits(scale),
    )


def addresses(plan: Plan, pairs: int) -> tuple[int, int, int, int]:
    """Where the lists of a plan are: items, counts, and the tokens and weights of so many pairs."""
    held = checks.sizes("plan.items", plan.items, "3 I")[1]
    return (
        checks.array("plan.items", plan.items, INT32, (3, held)),
        checks.array("plan.counts", plan.counts, INT32, (2,)),
        checks.array("plan.tokens", plan.tokens, INT32, (pairs,)),
        checks.array("plan.weights", plan.weights, _FP32, (pairs,)),
    )
