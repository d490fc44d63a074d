"""Where a slice drafts: in the shared cache, or in a cache of its own (`draft_cache="own"`).

A companion is a sequence beside a sequence: the same tokens, all run by one draft slice. Nothing
but drafting touches it. So it lags behind what is committed, and catches up in one chunk when its
slice drafts again: what it drafted and was kept is in its journal already. It may be lost at any
time for no more than the time of running its tokens again, and whatever fails here loses it.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq
from typing import TYPE_CHECKING

from torch import Tensor

from cascade.passes import (
    check_finite,
    cut,
    extend,
    fold_resident,
    foldable,
    is_stale,
    run_committed,
    settle,
    verify,
)

if TYPE_CHECKING:
    from cascade.sequence import Sequence


def drafting(sequences: Seq[Sequence], wanted: Seq[int], writer: int) -> list[Sequence]:
    """For each row the sequence that `writer` drafts in: itself, or its companion, caught up.

    Rows that want no ids are left alone.
    """
    active = [s for s, count in zip(sequences, wanted, strict=True) if count]
    own = [s for s in active if s.draft_cache == "own"]
    apart = [s for s in own if _awaits(s, writer)]
    settle([s for s in active if s not in apart])
    apart += [s for s in own if s not in apart and is_stale(s, writer)]
    try:
        companions = [_companion(s, writer) for s in apart]
        _catch_up(list(zip(companions, apart, strict=True)), writer)
    except BaseException:
        for sequence in apart:
            sequence.drop_companion()
        raise
    return [companions[apart.index(s)] if s in apart else s for s in sequences]


def cross(sequence: Sequence, drafter: Sequence, ids: list[int]) -> None:
    """Take over what was drafted elsewhere, its logits, and the distributions it was drawn from."""
    if drafter is not sequence and ids:
        sequence._drafted += ids
        sequence._proposals += drafter._proposals[-len(ids) :]
        sequence._rows, sequence._verified = list(drafter._rows), False
        sequence.slot.entries = 0  # their rows are gone


def _awaits(sequence: Sequence, writer: int) -> bool:
    """Are there committed tokens that another slice is yet to run?"""
    slot = sequence.slot
    return slot.folded < sequence.length - 1 and slot.entry_slice != writer


def _companion(sequence: Sequence, writer: int) -> Sequence:
    companion = sequence.companion
    if (
        companion is None
        or companion.is_closed
        or companion.slot.entry_slice != writer
        or is_stale(companion, writer)
    ):
        companion = sequence.open_companion()
        companion.slot.entry_slice = writer
    companion.meter = sequence.meter
    return companion


def _catch_up(pairs: list[tuple[Sequence, Sequence]], writer: int) -> None:
    """Give every companion the tokens and the drafted ids of its sequence."""
    short: list[tuple[Sequence, list[int]]] = []
    long: list[Sequence] = []
    empty: dict[tuple[int, ...], list[Sequence]] = {}  # by the tokens that they must run
    for companion, sequence in pairs:
        agreed = _agreement(companion._tokens, sequence._tokens)
        if agreed < companion.length:
            cut(companion, agreed)
            companion.drop_draft()
        new = sequence._tokens[companion.length :]
        if not companion.length:
            twins = empty.setdefault(tuple(new), [])
            twins.append(companion)
            if len(twins) > 1:
                continue
        if foldable(companion, new) >= companion.cache.journal.entries:
            extend(companion, new, [])
            long.append(companion)
        elif new:
            short.append((companion, new))
    _extend_resident(short, writer)
    if long:
        run_committed(long, [c._tokens[c.slot.folded : -1] for c in long], writer)
    for first, *others in empty.values():  # forks, for example: one runs their tokens for all
        if others:
            first.copy_to(others)
    for companion, sequence in pairs:
        drafted = sequence._drafted
        if companion._drafted != drafted[: len(companion._drafted)]:
            companion.drop_draft()
        ids = drafted[len(companion._drafted) :]
        companion._drafted += ids
        companion._proposals += [None] * len(ids)


def _extend_resident(growing: list[tuple[Sequence, list[int]]], writer: int) -> None:
    """Commit tokens of which the first may be drafted ones.

    Where the journal lacks some, they are run up to the last token, which the next draft needs.
    """
    rows: dict[Sequence, list[Tensor]] = {}
    lacking, feeds = [], []
    for companion, new in growing:
        slot, drafted = companion.slot, _agreement(companion._drafted, new)
        slot.entries = min(slot.entries, companion.length - slot.folded + drafted)
        rows[companion] = companion._rows[drafted:]
        if slot.entries < foldable(companion, new):
            pending = [*companion._tokens[slot.folded :], *new]
            lacking.append(companion)
            feeds.append((slot.entries, pending[slot.entries :]))
    if lacking:
        table = verify(lacking, feeds, writer)
        check_finite([table], lacking[0], writer)
        for companion, part in zip(
            lacking, table.split([len(ids) for _, ids in feeds]), strict=True
        ):
            rows[companion] = [part[-1]]
    fold_resident(growing)
    for companion, new in growing:
        extend(companion, new, rows[companion])


def _agreement(a: list[int], b: list[int]) -> int:
    """How many ids both lists begin with."""
    if a == b[: len(a)]:
        return len(a)
    differing = (i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y)
    return next(differing, min(len(a), len(b)))
