"""Sizes of tile_stream.cuh that its launchers need."""

from __future__ import annotations

from cascade.kernels.compiler import multiprocessors

WARPS, STAGES = 8, 4  # as in the .cuh
RING = WARPS * STAGES * 2 * 32 * 16  # bytes of shared memory for weights under way
MANY = 5000  # rows of weights from which a third block on a multiprocessor pays, for up to 8 tokens


def blocks(device: int, tokens: int, rows: int) -> int:
    """Blocks that share the rows of a product: as many as run at the same time, or fewer.

    tokens: that are multiplied at once
    """
    return (3 if tokens == 8 and rows >= MANY else 2) * multiprocessors(device)
