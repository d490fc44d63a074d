"""Sizes of tile_stream.cuh that its launchers need."""

from __future__ import annotations

from cascade.kernels.compiler import multiprocessors

WARPS, STAGES, TILE = 8, 4, 16  # as in the .cuh
RING = WARPS * STAGES * 2 * 32 * 16  # bytes of shared memory for weights under way
MANY = 5000  # rows of weights from which a third block on a multiprocessor pays, for up to 8 tokens


def blocks(device: int, tokens: int, rows: int) -> int:
    """Blocks that share the rows of a product: as many as run at the same time, or fewer.

    tokens: that are multiplied at once
    """
    return (3 if tokens == 8 and rows >= MANY else 2) * multiprocessors(device)


def team(blocks: int, rows: int, tokens: int) -> int:
    """Warps that multiply a tile together: fewer where there is a tile for every team.

    tokens: that are multiplied at once; with more of them a tile takes longer to put together
    """
    tiles, least = -(-rows // TILE), 4 if tokens == 8 else 2
    sizes = (size for size in (least, 4) if blocks * WARPS // size <= tiles)
    return next(sizes, WARPS)
