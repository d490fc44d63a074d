"""Digests of a cache: compare what two sequences hold without moving it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from cascade.sequence import Sequence

BLOCK = 64  # positions that one digest of keys and values is over


@dataclass(frozen=True, slots=True)
class CacheDigest:
    """64-bit digests of the cache of `tokens` tokens; equal bits give equal digests.

    attention: by layer number one digest for each `BLOCK` positions of keys and values
    recurrent: by layer number one digest of the convolution window and the SSM state

    Unequal bits collide with probability about 2**-64 a digest. Not cryptographic, and exact to
    the bit: runs of other lengths round differently, which `Sequence.audit` allows for.
    """

    tokens: int
    attention: tuple[tuple[int, tuple[int, ...]], ...]
    recurrent: tuple[tuple[int, int], ...]

    def differences(self, other: CacheDigest) -> list[tuple[int, int | None]]:
        """Where two caches differ: (layer, first position of the block).

        The position is None for a window or a state. Blocks that one of them lacks differ.
        """
        found: list[tuple[int, int | None]] = []
        for (layer, mine), (_, its) in zip(self.attention, other.attention, strict=True):
            blocks = max(len(mine), len(its))
            found += [
                (layer, i * BLOCK) for i in range(blocks) if mine[i : i + 1] != its[i : i + 1]
            ]
        for (layer, one), (_, another) in zip(self.recurrent, other.recurrent, strict=True):
            if one != another:
                found.append((layer, None))
        return sorted(found, key=lambda place: (place[0], place[1] or 0))


def digest(sequence: Sequence) -> CacheDigest:
    """The digests of what is committed; the last committed token is not in the cache yet."""
    cache, slot, kinds = sequence.cache, sequence.slot, sequence.model.arch.kinds
    rows, lengths = cache.index((slot.index, slot.folded))
    parts = cache.keys, cache.values, cache.window, cache.state
    attention, recurrent = cache.kernels.cache_digest(*parts, rows, lengths, BLOCK)
    blocks = -(-slot.folded // BLOCK)
    by_kind = {
        kind: [i for i, name in enumerate(kinds) if name == kind] for kind in ("attention", "mamba")
    }
    table = attention[:, 0, :blocks].tolist()
    return CacheDigest(
        slot.folded,
        tuple((i, tuple(row)) for i, row in zip(by_kind["attention"], table, strict=True)),
        tuple(zip(by_kind["mamba"], recurrent[:, 0].tolist(), strict=True)),
    )
