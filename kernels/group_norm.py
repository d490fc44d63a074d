"""Launcher of group_norm.cu."""

from __future__ import annotations

import torch
from torch import Tensor

from cascade.kernels import checks
from cascade.kernels import reference_layers as layers
from cascade.kernels.compiler import Kernel

THREADS = 256

_BF16 = (torch.bfloat16,)
_KERNEL = Kernel("group_norm", "group_norm", 7, overlaps=True)


def group_norm(x: Tensor, norm: Tensor, groups: int, eps: float, out: Tensor) -> None:
    """out [n, K] <- RMSNorm of x over each of `groups` equal groups of columns, times norm [K].

    bf16; a group must be a multiple of 8 columns.
    """
    tokens, depth = checks.sizes("x", x, "n K")
    address, stride = checks.strided("x", x, _BF16, (tokens, depth))
    scale = checks.array("norm", norm, _BF16, (depth,))
    target = checks.array("out", out, _BF16, (tokens, depth))
    checks.within("the number of groups", groups, 1, max(depth, 1))
    checks.multiple("the depth K", depth, 8 * groups)
    checks.aligned("norm", scale)
    checks.aligned("out", target)
    device = checks.one_gpu(x, norm, out)
    if not (tokens and depth):
        return
    _KERNEL.launch(
        device,
        (tokens, groups, 1),
        (THREADS, 1, 1),
        (target, address, scale, stride, depth, groups, checks.float_bits(eps)),
    )


def rms_norm(x: Tensor, weight: Tensor, eps: float, groups: int = 1) -> Tensor:
    """See reference_layers.rms_norm: one launch where the kernel takes the tensors."""
    takes = x.dtype == torch.bfloat16 and x.dim() == 2 and x.is_contiguous()
    if not takes or x.shape[1] % (8 * groups):
        return layers.rms_norm(x, weight, eps, groups)
    out = torch.empty_like(x)
    group_norm(x, weight, groups, eps, out)
    return out
