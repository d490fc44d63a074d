"""Sizes of tile_stream.cuh that its launchers need."""

from __future__ import annotations

from cascade.kernels.checks import float_bits
from cascade.kernels.compiler import multiprocessors

WARPS, STAGES, TILE = 8, 4, 16  # as in the .cuh
RING = WARPS * STAGES * 2 * 32 * 16  # bytes for weights under way, of a block
SPAN = STAGES * 32  # columns of a batch, for up to 16 tokens
LEAST = 2  # rows of a block: fewer blocks leave room for the next kernel's
MANY = 5000  # rows of weights from which a third block on a multiprocessor pays, for up to 8 tokens


def blocks(device: int, tokens: int, rows: int) -> int:
    """Blocks that share the rows of a product: as many as run at the same time, or fewer.

    tokens: that are multiplied at once
    """
    each = multiprocessors(device)
    if rows > each * TILE:  # or a tile of every second one is empty
        each *= 3 if tokens == 8 and is_long(rows) else 2
    return min(each, -(-rows // LEAST))


def is_long(rows: int) -> bool:
    """Whether a product has so many rows that a third block pays."""
    return rows >= MANY


def team(blocks: int, rows: int, tokens: int) -> int:
    """Warps that multiply a tile together: fewer where their tiles are as full as those of all.

    tokens: that are multiplied at once; with more of them a tile takes longer to put together
    """

    def fullness(size: int) -> float:
        each = -(-rows * size // (blocks * WARPS))
        return each / (-(-each // TILE) * TILE)

    least = 4 if tokens == 8 else 2
    few = (size for size in (least, 4) if rows * size >= blocks * WARPS * TILE)
    return next((size for size in few if fullness(size) >= 0.9 * fullness(WARPS)), WARPS)


def shares(blocks: int, team: int, rows: int) -> tuple[int, int, int]:
    """For a kernel whose teams share rows: log2 of a team's warps, its rows, and rows left over."""
    return logarithm(team), *divmod(rows, teams(blocks, team))


def teams(blocks: int, team: int) -> int:
    return blocks * WARPS // team


def logarithm(power: int) -> int:
    return power.bit_length() - 1


def inverse(number: int) -> int:
    """1 / number, as the bits of a float."""
    return float_bits(1 / number)
