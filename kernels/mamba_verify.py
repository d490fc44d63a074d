"""Launcher of mamba_verify.cu."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from cascade.kernels.compiler import Kernel
from cascade.kernels.mamba_decode import NAMES, SIZES

QUERIES = 8  # as in the .cu

_KERNELS = {
    (state, size): Kernel("mamba_verify", f"step_{NAMES[state]}_{size}", 26, overlaps=True)
    for state in NAMES
    for size in SIZES
}


def shared_bytes(entries: int, head_dim: int, size: int) -> int:
    """Shared memory of a block, for journals of `entries` tokens."""
    warps = -(-4 * head_dim // 32)
    numbers = QUERIES * (size + entries + warps) + 2 * entries
    return 4 * numbers + 2 * entries * (head_dim + size)


def launch(
    device: int, state: Tensor, rows: int, length: int, held: int, arguments: Sequence[int]
) -> None:
    """Up to `length` new tokens a row; the arguments were checked by `mamba_step`."""
    _, heads, head_dim, size = state.shape
    _KERNELS[state.dtype, size].launch(
        device,
        (heads, rows, -(-length // QUERIES)),
        (4 * head_dim, 1, 1),
        (*arguments, 0),
        shared_bytes(held, head_dim, size),
    )
