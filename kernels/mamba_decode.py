"""Launcher of mamba_decode.cu."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from cascade.kernels.compiler import Kernel

MOST_HEADS = 8  # of one group that a block takes, as in the .cu
BLOCKS = 128  # as few as keep a GPU busy: with more heads a block less work is done twice
ROOM = 96 * 1024  # shared memory of a block, of two on a multiprocessor
SIZES = (16, 32, 64, 128)  # state sizes N
NAMES = {torch.float32: "f32", torch.bfloat16: "bf16"}

_KERNELS = {
    (state, size): Kernel("mamba_decode", f"step_{NAMES[state]}_{size}", 26, overlaps=True)
    for state in NAMES
    for size in SIZES
}


def shared_bytes(entries: int, head_dim: int, size: int, heads: int) -> int:
    """Shared memory of a block of several heads, for journals of `entries` tokens."""
    under_way = 2 if heads > 1 else 1
    return entries * (2 * (size + 16) + 2 * under_way * head_dim + 4 * (1 + heads))


def launch(
    device: int, state: Tensor, rows: int, groups: int, held: int, arguments: Sequence[int]
) -> None:
    """One new token a row; the arguments were checked by `mamba_step`."""
    _, heads, head_dim, size = state.shape
    of_group = heads // groups

    def fits(many: int) -> bool:
        warps = 4 * head_dim // 32  # one a head
        small = shared_bytes(held, head_dim, size, many) <= ROOM
        return small and many <= min(MOST_HEADS, of_group, warps)

    many = 1
    while fits(2 * many) and heads // (2 * many) * rows >= BLOCKS:
        many *= 2
    while of_group % many:
        many -= 1
    _KERNELS[state.dtype, size].launch(
        device,
        (of_group // many, groups, rows),
        (4 * head_dim, 1, 1),
        (*arguments, many),
        shared_bytes(held, head_dim, size, many),
    )
