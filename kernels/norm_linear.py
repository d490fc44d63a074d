"""x W^T after a norm: the kernel for few tokens, the library's products for more."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from cascade.kernels.group_norm import group_norm
from cascade.kernels.reference_decode import Kind
from cascade.kernels.skinny_linear import skinny_linear

FEW = 32  # tokens up to which reading the weights is all that counts
NARROW = 1024  # columns


def norm_linear(
    x: Tensor,
    weights: Sequence[Tensor],
    outs: Sequence[Tensor],
    kinds: Sequence[Kind],
    norm: Tensor | None = None,
    squares: Tensor | None = None,
    groups: int = 1,
    eps: float = 0.0,
) -> None:
    """See reference_decode.norm_linear. A narrow `out` in fp32 always takes the kernel.

    A wide one, of many tokens, is rounded to the dtype of x before it is stored.
    """
    few = x.shape[0] <= FEW
    own = [
        i
        for i, out in enumerate(outs)
        if few or (out.dtype == torch.float32 and out.shape[1] <= NARROW)
    ]
    if own:
        skinny_linear(
            x,
            [weights[i] for i in own],
            [outs[i] for i in own],
            [kinds[i] for i in own],
            norm,
            squares,
            groups,
            eps,
        )
    if few or len(own) == len(outs):
        return
    if norm is not None:
        normed = torch.empty_like(x, memory_format=torch.contiguous_format)
        group_norm(x, norm, groups, eps, normed)
        x = normed
    for i, (weight, out, kind) in enumerate(zip(weights, outs, kinds, strict=True)):
        if i in own:
            continue
        if out.dtype != x.dtype:
            out.copy_(x @ weight.T)
        elif kind == "add":
            torch.addmm(out, x, weight.T, out=out)
        else:
            torch.mm(x, weight.T, out=out)
        if kind == "relu2":
            out.relu_().square_()
