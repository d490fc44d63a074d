"""Launcher of mamba_decode.cu."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from cascade.kernels.compiler import Kernel

MOST_HEADS = 8  # of one group that a block takes
BLOCKS = 128  # as few as keep a GPU busy: with more heads a block less work is done twice
SIZES = (16, 32, 64, 128)  # state sizes N
NAMES = {torch.float32: "f32", torch.bfloat16: "bf16"}

_KERNELS = {
    (state, size): Kernel("mamba_decode", f"step_{NAMES[state]}_{size}", 26, overlaps=True)
    for state in NAMES
    for size in SIZES
}


def shared_bytes(entries: int, head_dim: int, size: int, heads: int) -> int:
    """Shared memory of a block of several heads, for journals of `entries` tokens."""
    warps = -(-4 * head_dim // 32)
    return 4 * (heads * (2 * head_dim + entries + 1 + warps) + 2 * size + entries)


def launch(
    device: int, state: Tensor, rows: int, groups: int, held: int, arguments: Sequence[int]
) -> None:
    """One new token a row; the arguments were checked by `mamba_step`."""
    _, heads, head_dim, size = state.shape
    of_group = heads // groups
    many = 1
    warps = -(-4 * head_dim // 32)  # one a head
    while 2 * many <= min(MOST_HEADS, of_group, warps) and heads // (2 * many) * rows >= BLOCKS:
        many *= 2
    while of_group % many:
        many -= 1
    _KERNELS[state.dtype, size].launch(
        device,
        (heads // many, rows, 1),
        (4 * head_dim, 1, 1),
        (*arguments, many),
        shared_bytes(held, head_dim, size, many),
    )
