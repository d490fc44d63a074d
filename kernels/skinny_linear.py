"""Launcher of skinny_linear.cu."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from cascade.kernels import checks, tile_stream
from cascade.kernels.compiler import Kernel
from cascade.kernels.reference_decode import Kind

PARTS = 3  # as in the .cu
MEMBERS = 3 + 6 * PARTS + 9
THREADS = 256
WARPS = 8
WIDTHS = (8, 16, 32)  # tokens at once
LARGEST_GROUPS = 64  # whose factors fit into shared memory

_BF16, _FP32 = (torch.bfloat16,), (torch.float32,)
_CODES = {"store": 0, "relu2": 2, "add": 3}
_KERNELS = {
    (norm, width): Kernel("skinny_linear", f"{norm}_{width}", MEMBERS, overlaps=True)
    for norm in ("none", "whole", "warpwise", "given")
    for width in WIDTHS
}
_SHORT = Kernel("skinny_linear", "short_8", MEMBERS, overlaps=True)


def skinny_linear(
    x: Tensor,
    weights: Sequence[Tensor],
    outs: Sequence[Tensor],
    kinds: Sequence[Kind],
    norm: Tensor | None = None,
    squares: Tensor | None = None,
    groups: int = 1,
    eps: float = 0.0,
) -> None:
    """Up to three products of few tokens with weights that are read once, in one launch.

    See reference_decode.norm_linear. bf16, outs also fp32 (`store`); at most 32 tokens. K and all
    strides must be multiples of 8; with a norm of several groups their squares must be given.
    """
    tokens, depth = checks.sizes("x", x, "n K")
    x_address, x_stride = checks.strided("x", x, _BF16, (tokens, depth))
    checks.multiple("the depth K", depth, 8)
    checks.within("the number of tokens", tokens, 0, WIDTHS[-1])
    checks.within("the number of weights", len(weights), 1, PARTS)
    checks.within("the number of outs", len(outs), len(weights), len(weights))
    checks.within("the number of kinds", len(kinds), len(weights), len(weights))
    checks.within("the number of groups", groups, 1, LARGEST_GROUPS)
    empty = [0] * (PARTS - len(weights))
    addresses, strides, rows, targets, target_strides, codes = ([*empty] for _ in range(6))
    for i, (weight, out, kind) in reversed(list(enumerate(zip(weights, outs, kinds, strict=True)))):
        height = checks.sizes(f"weights[{i}]", weight, "O K")[0]
        address, stride = checks.strided(f"weights[{i}]", weight, _BF16, (height, depth))
        if kind not in _CODES or (out.dtype == torch.float32 and kind != "store"):
            raise checks.KernelArgumentError(
                f"kinds[{i}] is {kind!r} for an out of {out.dtype}; expected one of "
                f"{sorted(_CODES)}, in fp32 'store' alone"
            )
        target, target_stride = checks.strided(
            f"outs[{i}]", out, (*_BF16, *_FP32), (tokens, height)
        )
        for values, value in (
            (addresses, address),
            (strides, stride),
            (rows, height),
            (targets, target),
            (target_strides, target_stride),
            (codes, 1 if out.dtype == torch.float32 else _CODES[kind]),
        ):
            values.insert(0, value)
    tensors = [x, *weights, *outs]
    norm_address = sums = summands = 0
    if norm is not None:
        norm_address = checks.array("norm", norm, _BF16, (depth,))
        checks.aligned("norm", norm_address)
        tensors.append(norm)
        if squares is not None:
            columns = checks.sizes("squares", squares, "n X")[1]
            sums = checks.array("squares", squares, _FP32, (tokens, columns))
            checks.multiple("the columns of squares", columns, groups)
            checks.multiple("the depth K", depth, 8 * groups)
            summands = columns // groups
            tensors.append(squares)
        elif groups != 1:
            raise checks.KernelArgumentError(f"a norm of {groups} groups needs their squares")
    device = checks.one_gpu(*tensors)
    if not (tokens and depth and any(rows)):
        return
    width = next(w for w in WIDTHS if tokens <= w)
    if norm is None:
        mode = "none"
    elif groups == 1:
        mode = "whole"
    else:
        mode = "warpwise" if groups == WARPS and not depth % (WARPS * tile_stream.SPAN) else "given"
    blocks = tile_stream.blocks(device, width if mode == "whole" else 0, sum(rows))
    team = WARPS if mode == "warpwise" else tile_stream.team(blocks, sum(rows), width)
    is_short = mode == "whole" and width == 8 and not tile_stream.is_long(sum(rows))
    kernel = _SHORT if is_short else _KERNELS[mode, width]
    kernel.launch(
        device,
        (blocks, 1, 1),
        (THREADS, 1, 1),
        (
            x_address,
            norm_address,
            sums,
            *addresses,
            *targets,
            *strides,
            *rows,
            *target_strides,
            *codes,
            x_stride,
            tokens,
            depth,
            groups,
            summands,
            checks.float_bits(eps),
            *tile_stream.shares(blocks, team, sum(rows)),
        ),
        tile_stream.RING + (4 * width * groups if mode == "given" else 0),
    )
