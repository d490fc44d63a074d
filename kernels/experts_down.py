"""Launcher of experts_down.cu."""

from __future__ import annotations

import torch
from torch import Tensor

from cascade.kernels import checks
from cascade.kernels.compiler import Kernel, multiprocessors
from cascade.kernels.plan import Plan

THREADS, WARPS, TILE = 256, 8, 16  # as in the .cu
RING = 8 * 8 * 2 * 32 * 16  # bytes of shared memory for weights on their way
LARGEST_SHARED = 227 * 1024 - RING

_BF16, _INT32, _FP32 = (torch.bfloat16,), (torch.int32,), (torch.float32,)
_KERNELS = {
    tokens: Kernel("experts_down", f"down_{tokens}", 18, overlaps=True) for tokens in (8, 16)
}


def experts_down(
    x: Tensor,
    inner: Tensor,
    down: Tensor,
    plan: Plan,
    shared_inner: Tensor | None,
    shared_down: Tensor | None,
) -> None:
    """The second half of the chosen experts and of the shared one, added to the residual stream.

    See reference_decode.experts_down. bf16; F, Fs and all strides must be multiples of 8; at most
    320 tokens.
    """
    tokens, hidden = checks.sizes("x", x, "n K")
    experts, _, width = checks.sizes("down", down, "E K F")
    address, stride = checks.strided("x", x, _BF16, (tokens, hidden))
    weights, expert_stride, row_stride = checks.strided(
        "down", down, _BF16, (experts, hidden, width)
    )
    checks.multiple("the width F", width, 8)
    pairs, (_, held) = plan.tokens.numel(), checks.sizes("plan.items", plan.items, "3 I")
    tensors = [x, inner, down, *plan[:4]]
    shared_places, shared_width, shared_stride = (0, 0), 0, 0
    if (shared_inner is None) != (shared_down is None):
        raise checks.KernelArgumentError("shared_inner and shared_down go together")
    if shared_inner is not None and shared_down is not None:
        shared_width = checks.sizes("shared_down", shared_down, "K Fs")[1]
        checks.multiple("the width Fs", shared_width, 8)
        source = checks.array("shared_inner", shared_inner, _BF16, (tokens, shared_width))
        checks.aligned("shared_inner", source)
        place, shared_stride = checks.strided(
            "shared_down", shared_down, _BF16, (hidden, shared_width)
        )
        shared_places = source, place
        tensors += [shared_inner, shared_down]
    source = checks.array("inner", inner, _BF16, (pairs, width))
    checks.aligned("inner", source)
    places = (
        checks.array("plan.items", plan.items, _INT32, (3, held)),
        checks.array("plan.counts", plan.counts, _INT32, (2,)),
        checks.array("plan.tokens", plan.tokens, _INT32, (pairs,)),
        checks.array("plan.weights", plan.weights, _FP32, (pairs,)),
    )
    if plan.item_tokens not in _KERNELS:
        raise checks.KernelArgumentError(f"items of {plan.item_tokens} tokens; expected 8 or 16")
    sums = 4 * WARPS * tokens * TILE
    checks.within("the sums of all tokens, in bytes of shared memory,", sums, 0, LARGEST_SHARED)
    device = checks.one_gpu(*tensors)
    if not (tokens and hidden and width):
        return
    _KERNELS[plan.item_tokens].launch(
        device,
        (multiprocessors(device), 1, 1),
        (THREADS, 1, 1),
        (
            address,
            source,
            weights,
            *shared_places,
            *places,
            stride,
            tokens,
            hidden,
            width,
            expert_stride,
            row_stride,
            shared_width,
            shared_stride,
            held,
        ),
        RING + sums,
    )
