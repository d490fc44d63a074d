"""Launcher of experts_sum.cu."""

from __future__ import annotations

import torch
from torch import Tensor

from cascade.kernels import checks, choose_experts, tile_stream
from cascade.kernels.compiler import Kernel
from cascade.kernels.plan import FEW, FEW_TOGETHER, Plan

THREADS, WARPS, TILE = 256, 8, 16  # as in the .cu
RING = 2 * tile_stream.RING  # as in the .cu

_BF16 = (torch.bfloat16,)
_KERNEL = Kernel("experts_sum", "down", 21, overlaps=True)


def experts_sum(
    x: Tensor,
    inner: Tensor,
    down: Tensor,
    plan: Plan,
    shared_inner: Tensor,
    shared_down: Tensor,
) -> None:
    """The second half of the chosen experts and of the shared one, added up as it is computed.

    For few tokens. See reference_decode.experts_down. bf16; F, Fs and all strides must be multiples
    of 8; at most 32 tokens, items of 8.
    """
    tokens, hidden = checks.sizes("x", x, "n K")
    experts, _, width = checks.sizes("down", down, "E K F")
    address, stride = checks.strided("x", x, _BF16, (tokens, hidden))
    weights, expert_stride, row_stride = checks.strided(
        "down", down, _BF16, (experts, hidden, width)
    )
    checks.multiple("the width F", width, 8)
    pairs = plan.tokens.numel()
    shared_width = checks.sizes("shared_down", shared_down, "K Fs")[1]
    checks.multiple("the width Fs", shared_width, 8)
    shared_source, shared_input = checks.strided(
        "shared_inner", shared_inner, _BF16, (tokens, shared_width)
    )
    shared_place, shared_stride = checks.strided(
        "shared_down", shared_down, _BF16, (hidden, shared_width)
    )
    source = checks.array("inner", inner, _BF16, (pairs, width))
    checks.aligned("inner", source)
    lists = choose_experts.addresses(plan, pairs)
    checks.within("the number of tokens", tokens, 0, FEW)
    checks.within("the tokens of an item", plan.item_tokens, 1, FEW_TOGETHER)
    device = checks.one_gpu(x, inner, down, shared_inner, shared_down, *plan[:4])
    if not (tokens and hidden and width):
        return
    blocks = tile_stream.blocks(device, 0, hidden)
    _KERNEL.launch(
        device,
        (blocks, 1, 1),
        (THREADS, 1, 1),
        (
            address,
            source,
            weights,
            shared_source,
            shared_place,
            *lists,
            stride,
            tokens,
            hidden,
            width,
            expert_stride,
            row_stride,
            shared_width,
            shared_stride,
            shared_input,
            plan.items.shape[1],
            *divmod(hidden, blocks),
        ),
        RING + 4 * WARPS * TILE * tokens,
    )
