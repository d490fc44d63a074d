"""x W^T after a norm: the kernel for few tokens, the library's products for more."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from cascade.kernels.group_norm import group_norm
from cascade.kernels.reference_decode import Kind
from cascade.kernels.skinny_linear import skinny_linear

FEW = 32  # tokens up to which reading the weights is all that counts


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
    """See reference_decode.norm_linear. `add` and `relu2` need an `out` in the dtype of x."""
    if x.shape[0] <= FEW:
        skinny_linear(x, weights, outs, kinds, norm, squares, groups, eps)
        return
    if norm is not None:
        normed = torch.empty_like(x, memory_format=torch.contiguous_format)
        group_norm(x, norm, groups, eps, normed)
        x = normed
    for weight, out, kind in zip(weights, outs, kinds, strict=True):
        if out.dtype != x.dtype:
            torch.mm(x, weight.T, out_dtype=out.dtype, out=out)
        elif kind == "add":
            torch.addmm(out, x, weight.T, out=out)
        else:
            torch.mm(x, weight.T, out=out)
        if kind == "relu2":
            out.relu_().square_()
