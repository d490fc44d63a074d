"""Sizes of tile_stream.cuh that its launchers need."""

from __future__ import annotations

from cascade.kernels.checks import float_bits
from cascade.kernels.compiler import multiprocessors

WARPS, STAGES, TILE = 8, 4, 16  # as in the .cuh
RING = WARPS * STAGES * 2 * 32 * 16  # bytes for weights under way, of one of three blocks
DEEP_RING = 2 * RING  # of one of two
LEAST = 2  # rows of a block: fewer blocks leave room for the next kernel's
MANY = 5000  # rows of weights from which a third block on a multiprocessor pays, for up to 8 tokens


def blocks(device: int, tokens: int, rows: int) -> int:
    """Blocks that share the rows of a product: as many as run at the same time, or fewer.

    tokens: that are multiplied at once
    """
    most = (3 if tokens == 8 and is_long(rows) else 2) * multiprocessors(device)
    return min(most, -(-rows // LEAST))


def is_long(rows: int) -> bool:
    """Whether a product has so many rows that a third block pays."""
    return rows >= MANY


def team(blocks: int, rows: int, tokens: int) -> int:
    """Warps that multiply a tile together: fewer where there is a tile for every team.

    tokens: that are multiplied at once; with more of them a tile takes longer to put together
    """
    tiles, least = -(-rows // TILE), 4 if tokens == 8 else 2
    sizes = (size for size in (least, 4) if blocks * WARPS // size <= tiles)
    return next(sizes, WARPS)


def shares(blocks: int, team: int, rows: int) -> tuple[int, int, int]:
    """For a kernel whose teams share rows: log2 of a team's warps, its rows, and rows left over."""
    return logarithm(team), *divmod(rows, blocks * WARPS // team)


def logarithm(power: int) -> int:
    return power.bit_length() - 1


def inverse(number: int) -> int:
    """1 / number, as the bits of a float."""
    return float_bits(1 / number)
