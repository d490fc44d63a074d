"""What the verbs are made of: passes that commit nothing, folds that do, and their undoing.

A committed length moves in `extend` and `cut` alone, at the end of a verb; everything before may
fail without leaving a trace (`restoring`). A fold that fails half-way drops windows and states back
to the newest stored ones; the next verb runs what is missing again (`settle`).
"""

from __future__ import annotations

from collections.abc import Iterator
from collections.abc import Sequence as Seq
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from cascade.cache import Fold, Journal
from cascade.errors import NumericalError
from cascade.forward import Feed

if TYPE_CHECKING:
    from cascade.sequence import Sequence

SNAPSHOT_INTERVAL = 256  # tokens between the stored states that rollback may restart from
PREFILL_CHUNK = 512  # tokens a row that a long append runs at once
LEAST_CHUNK = 16  # the same where a runner limits all rows together


@torch.no_grad()
def run(sequences: Seq[Sequence], feeds: Seq[tuple[int, list[int]]], writer: int) -> list[Tensor]:
    """One pass into the resident journal: (first entry, ids) a row. Commits nothing.

    Returns the hidden states of each row's ids.
    """
    model, cache = sequences[0].model, sequences[0].cache
    prepared = _feeds(sequences, feeds)
    hidden = model.runner.hidden(writer, cache, cache.journal, prepared)
    _note(sequences, prepared, writer)
    return hidden


@torch.no_grad()
def decode(sequences: Seq[Sequence], feeds: Seq[tuple[int, list[int]]], writer: int) -> Tensor:
    """`run` for one id a row, and the logits [R, V] after it."""
    model, cache = sequences[0].model, sequences[0].cache
    prepared = _feeds(sequences, feeds)
    table = model.runner.decode(writer, cache, prepared)
    _note(sequences, prepared, writer)
    return table


@torch.no_grad()
def verify(sequences: Seq[Sequence], feeds: Seq[tuple[int, list[int]]], writer: int) -> Tensor:
    """`run`, and the logits [n, V] after each of the ids, row after row."""
    model, cache = sequences[0].model, sequences[0].cache
    prepared = _feeds(sequences, feeds)
    table = model.runner.verify(writer, cache, prepared)
    _note(sequences, prepared, writer)
    return table


def _feeds(sequences: Seq[Sequence], feeds: Seq[tuple[int, list[int]]]) -> list[Feed]:
    for sequence, (entry, _) in zip(sequences, feeds, strict=True):
        # Entries behind the first one written are about to be overwritten.
        sequence.slot.entries = entry
    return [
        Feed(s.slot.index, s.slot.index, s.slot.folded + entry, entry, ids)
        for s, (entry, ids) in zip(sequences, feeds, strict=True)
    ]


def _note(sequences: Seq[Sequence], feeds: Seq[Feed], writer: int) -> None:
    """Book the entries that a pass has written."""
    for sequence, feed in zip(sequences, feeds, strict=True):
        sequence.slot.entries = feed.entry + len(feed.ids)
        sequence.slot.entry_slice = writer
        sequence.meter.count(writer, len(feed.ids))


@torch.no_grad()
def run_long(
    sequences: Seq[Sequence], ids: Seq[list[int]], writer: int, *, keep: bool
) -> list[Tensor]:
    """Run ids behind each row's folded tokens in chunks and fold them as it goes.

    With `keep` the last id is left in the resident journal. Returns the hidden states of each
    row's last chunk. The caller must be ready to restore the slots.
    """
    first = sequences[0]
    model, cache = first.model, first.cache
    last: list[Tensor] = [torch.empty(0)] * len(sequences)
    done = [0] * len(sequences)
    while active := [r for r in range(len(sequences)) if done[r] < len(ids[r])]:
        together = model.runner.prefill_tokens
        most = max(together // len(active), LEAST_CHUNK) if together else PREFILL_CHUNK
        width = max(min(most, len(ids[r]) - done[r]) for r in active)
        journal = Journal(model.arch, len(active), width, cache.device, cache.dtype)
        feeds, folds = [], []
        for source, r in enumerate(active):
            slot = sequences[r].slot
            chunk = ids[r][done[r] : done[r] + width]
            done[r] += len(chunk)
            kept = keep and done[r] == len(ids[r])
            feeds.append(Feed(slot.index, source, slot.folded, 0, chunk))
            folds.append(Fold(slot, source, len(chunk) - kept, writer, kept))
        hidden = model.runner.hidden(writer, cache, journal, feeds)
        check_finite(hidden, first, writer)
        _fold(sequences, folds, journal)
        for r, feed, states in zip(active, feeds, hidden, strict=True):
            last[r] = states
            sequences[r].meter.count(writer, len(feed.ids))
    return last


def run_committed(sequences: Seq[Sequence], ids: Seq[list[int]], writer: int) -> None:
    """Run tokens that are committed already into windows and states again."""
    run_long(sequences, ids, writer, keep=False)


def repair(sequences: Seq[Sequence], writer: int) -> list[int]:
    """Rewind to exact ground and re-run all but the last token; returns the tokens re-run.

    The caller must be ready to restore the slots, from `repair_start` on.
    """
    stale = []
    for sequence in sequences:
        slot = sequence.slot
        sequence.cache.rewind(slot, slot.exact_length(writer))
        sequence._rows, slot.tail = [], writer
        stale.append(sequence._tokens[slot.folded : sequence.length - 1])
    if sequences:
        run_committed(sequences, stale, writer)
    return [len(ids) for ids in stale]


def repair_last(sequence: Sequence, writer: int, start: int) -> int:
    """Re-run tokens from `start` on, but the last one, over the cache before them as it is.

    Returns the tokens re-run. The caller must be ready to restore the slot from the rewind on.
    """
    slot = sequence.slot
    sequence.cache.rewind(slot, start)
    rebuild([sequence], [start])
    sequence._rows, slot.tail = [], writer
    ids = sequence._tokens[start : sequence.length - 1]
    run_committed([sequence], [ids], writer)
    return len(ids)


def is_stale(sequence: Sequence, writer: int) -> bool:
    """Does the cache hold anything that `writer` alone would not have written?"""
    return sequence.slot.exact_length(writer) < sequence.slot.folded


def repair_start(sequence: Sequence, writer: int) -> int:
    """The first position that `repair` runs."""
    return sequence.cache.rewind_target(sequence.slot, sequence.slot.exact_length(writer))


def rebuild(sequences: Seq[Sequence], ends: Seq[int]) -> None:
    """Run committed tokens up to `ends` into windows and states again, each under its writer."""
    writers = [
        s.cache.provenance[s.slot.index, :end].tolist() if s.slot.folded < end else []
        for s, end in zip(sequences, ends, strict=True)
    ]
    last = [s.slot.entry_slice for s in sequences]
    try:
        while spans := _next_spans(sequences, writers):
            writer, rows = spans.popitem()
            run_committed([s for s, _ in rows], [ids for _, ids in rows], writer)
    finally:
        for sequence, entry_slice in zip(sequences, last, strict=True):
            sequence.slot.entry_slice = entry_slice


def cut(sequence: Sequence, length: int) -> None:
    """Move the committed length back. The caller must be ready to restore the slot."""
    slot, keep = sequence.slot, max(length - 1, 0)
    row = sequence.cache.provenance[slot.index]
    if slot.folded > keep:
        sequence.cache.rewind(slot, keep)
    rebuild([sequence], [keep])
    slot.tail = int(row[keep])
    row[keep:] = -1
    sequence._rows, sequence._tokens = [], sequence._tokens[:length]


def settle(sequences: Seq[Sequence]) -> None:
    """Bring windows and states to the committed length.

    They are elsewhere where a failed commit has left them, or where ids were committed that no
    slice had run (`promise`).
    """
    off = [s for s in sequences if s.slot.folded != max(s.length - 1, 0)]
    if not off:
        return
    for sequence in off:
        slot, cache, end = sequence.slot, sequence.cache, max(sequence.length - 1, 0)
        if slot.folded > end:
            with restoring([sequence], [cache.rewind_target(slot, end)]):
                cache.rewind(slot, end)
    try:
        rebuild(off, [max(s.length - 1, 0) for s in off])
    except BaseException:
        for sequence in off:  # what has been run so far stands
            sequence.cache.forget(sequence.slot, sequence.slot.folded)
        raise


def _next_spans(
    sequences: Seq[Sequence], writers: Seq[list[int]]
) -> dict[int, list[tuple[Sequence, list[int]]]]:
    """By writer, the rows whose next tokens to run were its, with those tokens."""
    spans: dict[int, list[tuple[Sequence, list[int]]]] = {}
    for sequence, row in zip(sequences, writers, strict=True):
        start = sequence.slot.folded
        if start < len(row):
            changes = (i for i in range(start, len(row)) if row[i] != row[start])
            ids = sequence._tokens[start : next(changes, len(row))]
            spans.setdefault(row[start], []).append((sequence, ids))
    return spans


@contextmanager
def restoring(sequences: Seq[Sequence], starts: Seq[int | None] | None = None) -> Iterator[None]:
    """Leave every sequence as it is now if the block raises.

    starts[r]: the first committed position whose K and V the block may overwrite, None where it
    runs uncommitted tokens only. Journal entries are not kept: the next pass makes them again.
    """
    before = [
        (
            s,
            (s._tokens, s.length, s.slot.entry_slice, s.slot.tail),
            (list(s._rows), list(s._drafted), list(s._proposals), s._verified),
            None if start is None else s.cache.save(s.slot, start, s.length),
        )
        for s, start in zip(sequences, starts or [None] * len(sequences), strict=True)
    ]
    try:
        yield
    except BaseException:
        for sequence, (tokens, length, entry_slice, tail), lists, _ in before:
            sequence._tokens = tokens
            del tokens[length:]
            sequence._rows, sequence._drafted, sequence._proposals, sequence._verified = lists
            sequence.slot.entries = 0
            sequence.slot.entry_slice, sequence.slot.tail = entry_slice, tail
        for sequence, (_, length, _, _), _, saved in before:
            sequence.cache.forget(sequence.slot, max(length - 1, 0))
            if saved is not None:
                sequence.cache.put_back(sequence.slot, saved)
        raise


def complete_entries(growing: Seq[tuple[Sequence, list[int]]]) -> None:
    """Run what the journal lacks for a commit, under the slice that ran last.

    Proposed ids that no slice has run, and entries that a failed pass has overwritten.
    """
    missing: dict[int, list[tuple[Sequence, tuple[int, list[int]]]]] = {}
    for sequence, new in growing:
        slot, needed = sequence.slot, foldable(sequence, new)
        if slot.entries < needed:
            pending = [*sequence._tokens[slot.folded :], *new]
            feed = slot.entries, pending[slot.entries : needed]
            missing.setdefault(slot.entry_slice, []).append((sequence, feed))
    for writer, rows in missing.items():
        hidden = run([s for s, _ in rows], [feed for _, feed in rows], writer)
        check_finite(hidden, rows[0][0], writer)


def foldable(sequence: Sequence, new: list[int]) -> int:
    """Tokens behind the folded ones that are folded when `new` is committed: all but the last."""
    return sequence.length - sequence.slot.folded + len(new) - 1


def waits(sequence: Sequence, new: list[int], kept: int) -> bool:
    """Whether a commit of `new` leaves what no slice has run until the next verb needs it.

    kept: how many of `new` were drafted
    """
    slot, behind = sequence.slot, sequence.length - sequence.slot.folded
    if sequence.draft_cache == "shared" or behind < 1:
        return False
    return not new or min(slot.entries, behind + kept) < foldable(sequence, new)


@torch.no_grad()
def promise(growing: Seq[tuple[Sequence, list[int]]]) -> None:
    """Before a commit of (row, ids) that waits: the slice that ran last will have written them."""
    if growing:
        cache = growing[0][0].cache
        rows, starts, counts, writers = cache.index(
            *((s.slot.index, s.length - 1, len(new), s.slot.entry_slice) for s, new in growing)
        )
        cache.kernels.provenance_stamp(cache.provenance, rows, starts, counts, writers)


def fold_resident(growing: Seq[tuple[Sequence, list[int]]]) -> None:
    """Fold the resident journal for a commit of (row, ids)."""
    folds = []
    for sequence, new in growing:
        slot, count = sequence.slot, foldable(sequence, new)
        folds.append(Fold(slot, slot.index, count, slot.entry_slice, slot.entries > count))
    if folds:
        _fold([s for s, _ in growing], folds, growing[0][0].cache.journal)


def extend(sequence: Sequence, ids: list[int], rows: list[Tensor]) -> None:
    """Move the committed length forward, and drop what was drafted.

    rows: logits known, the first of them for the position behind `ids`
    """
    if ids:
        sequence.slot.tail = sequence.slot.entry_slice
    sequence._tokens += ids
    sequence._rows = rows
    sequence.drop_draft()


@torch.no_grad()
def _fold(sequences: Seq[Sequence], folds: list[Fold], journal: Journal) -> None:
    """Fold, with the snapshots that each row's mode asks for."""
    cache = sequences[0].cache
    modes = {s.slot.index: s.consistency for s in sequences}
    before = [replace(fold.slot) for fold in folds]
    try:
        for fold in folds:
            slot = fold.slot
            exact_so_far = slot.pure_length == slot.folded
            turns_stale = fold.count and slot.pure not in (-1, fold.writer) and exact_so_far
            if turns_stale and modes[slot.index] != "shared":
                cache.take_snapshot(slot)
        cache.fold(folds, journal)
        for fold in folds:
            slot = fold.slot
            position = slot.snapshot.position if slot.snapshot else 0
            exact_so_far = slot.pure_length == slot.folded
            keeps_ground = modes[slot.index] != "shared" and not exact_so_far
            if slot.folded - position >= SNAPSHOT_INTERVAL and not keeps_ground:
                cache.take_snapshot(slot)
    except BaseException:
        for fold, earlier in zip(folds, before, strict=True):
            cache.unfold(fold.slot, earlier)
        raise


def check_finite(hidden: Seq[Tensor], sequence: Sequence, writer: int) -> None:
    if not bool(torch.cat(list(hidden)).isfinite().all()):
        name = list(sequence.model.slices)[writer]
        raise NumericalError(
            f"slice {name!r} gave numbers that are not finite; nothing was committed"
        )
