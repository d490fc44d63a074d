"""The verbs for several sequences at once, ragged over rows, and the passes under them.

Only `_fold` and `rollback` move a committed length; everything before it in a verb may fail
without leaving a trace. A fold that fails half-way drops windows and states back to the newest
stored ones; the next verb runs what is missing again (`settle`).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from collections.abc import Sequence as Seq
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, TypeAlias, TypeVar

import torch
from torch import Tensor

from cascade.cache import Fold, Journal
from cascade.errors import CapacityExceeded, NumericalError, RequestError, SequenceError
from cascade.forward import Feed, forward, logits
from cascade.sampling import Sampler, SamplingParams

if TYPE_CHECKING:
    from cascade.sequence import Sequence

TokenIds: TypeAlias = Seq[int] | Tensor
T = TypeVar("T")

SNAPSHOT_INTERVAL = 256  # tokens between the stored states that rollback may restart from
PREFILL_CHUNK = 512  # tokens a row that a long append runs at once


class Batch:
    """Several sequences of one model and one cache under one verb. Rows keep their order.

    Arguments are lists with one element a row; counts may differ between rows and may be zero
    where the verb allows it. Either every row succeeds or none has changed.
    """

    def __init__(self, sequences: Seq[Sequence]) -> None:
        if not sequences:
            raise RequestError("a batch needs at least one sequence")
        self.sequences = list(sequences)
        self.model, self.cache = sequences[0].model, sequences[0].cache
        seen: set[int] = set()
        for sequence in sequences:
            if sequence.model is not self.model:
                raise SequenceError("a batch cannot mix sequences of different models")
            if sequence.cache is not self.cache:
                raise SequenceError("a batch cannot mix sequences of different caches")
            if sequence.slot.index in seen:
                raise SequenceError("a sequence appears twice in one batch")
            seen.add(sequence.slot.index)

    def append(self, ids: Seq[TokenIds], slice: str) -> list[Tensor]:
        """Run and commit ids; returns logits [V] after each row's last id. See Sequence.append."""
        writer = self.model.slice_index(slice)
        added = [self._token_list(row) for row in self._per_row(ids)]
        for sequence, new in zip(self.sequences, added, strict=True):
            _check_room(sequence, len(new))
        settle(self.sequences)
        stored = self.cache.journal.entries
        short = all(
            s.length - s.slot.folded + len(new) <= stored
            for s, new in zip(self.sequences, added, strict=True)
        )
        with self._ground(writer, every=not short):
            feeds = []
            for sequence, new in zip(self.sequences, added, strict=True):
                slot = sequence.slot
                entry = min(slot.usable(writer), sequence.length - slot.folded) if short else 0
                feeds.append((entry, [*sequence._tokens[slot.folded + entry :], *new]))
            if short:
                hidden = _run(self.sequences, feeds, writer)
            else:
                hidden = _run_long(self.sequences, [run for _, run in feeds], writer, keep=True)
            rows = [row[0] for row in self._logits(slice, [h[-1:] for h in hidden])]
            if short:
                _fold_resident(self.sequences, [len(new) for new in added])
        for sequence, new, row in zip(self.sequences, added, rows, strict=True):
            sequence._tokens += new
            sequence._rows, sequence._drafted, sequence._proposals = [row], [], []
        return rows

    def draft(
        self,
        k: Seq[int],
        slice: str,
        params: Seq[SamplingParams | Sampler | None] | None = None,
        *,
        until: Iterable[int] = (),
    ) -> list[list[int]]:
        """Continue row r by up to k[r] ids without committing. See Sequence.draft."""
        writer = self.model.slice_index(slice)
        wanted = self._counts(k)
        samplers = [Sampler.of(p) for p in self._per_row(params or [None] * len(self.sequences))]
        stops = frozenset(until)
        for sequence, count in zip(self.sequences, wanted, strict=True):
            if sequence.length == 0:
                raise SequenceError("nothing to continue: append a prompt before drafting")
            if count < 0:
                raise RequestError(f"cannot draft {count} ids")
            _check_draft(sequence, count)
        settle(self.sequences)
        before = [len(s._drafted) for s in self.sequences]
        with restoring(self.sequences):
            active = [r for r, count in enumerate(wanted) if count > 0]
            while active:
                rows = self._next_rows(active, slice, writer)
                chosen = _choose(
                    rows,
                    [samplers[r] for r in active],
                    [self.sequences[r] for r in active],
                    self.model.kernels,
                )
                still = []
                for r, (token, proposal) in zip(active, chosen, strict=True):
                    sequence = self.sequences[r]
                    sequence._drafted.append(token)
                    sequence._proposals.append(proposal)
                    if len(sequence._drafted) - before[r] < wanted[r] and token not in stops:
                        still.append(r)
                active = still
        return [s._drafted[b:] for s, b in zip(self.sequences, before, strict=True)]

    def verify(self, slice: str) -> list[Tensor]:
        """Logits [k_r + 1, V] a row over its drafted ids, of which some rows may have none."""
        writer = self.model.slice_index(slice)
        if not any(s._drafted for s in self.sequences):
            raise SequenceError("nothing to verify: draft before verifying")
        if not all(s.length for s in self.sequences):
            raise SequenceError("an empty sequence in the batch: append a prompt before verifying")
        settle(self.sequences)
        with self._ground(writer, every=False):
            # Row 0 is known where this slice was the last to run the last committed token.
            known = [s._rows[:1] if s.slot.usable(writer) else [] for s in self.sequences]
            missing, feeds = [], []
            for sequence, first in zip(self.sequences, known, strict=True):
                ids = [*sequence._tokens[sequence.slot.folded + len(first) :], *sequence._drafted]
                if ids:
                    missing.append(sequence)
                    feeds.append((len(first), ids))
            hidden = _run(missing, feeds, writer)
            tables = iter(self._logits(slice, hidden))
        result = []
        for sequence, first in zip(self.sequences, known, strict=True):
            new = next(tables) if sequence._drafted or not first else ()
            sequence._rows = [*first, *new]
            result.append(torch.stack(sequence._rows))
        return result

    def commit(self, n: Seq[int]) -> None:
        """Keep the first n[r] drafted ids of row r, drop the others. See Sequence.commit."""
        counts = self._counts(n)
        for sequence, count in zip(self.sequences, counts, strict=True):
            if not 0 <= count <= len(sequence._drafted):
                raise SequenceError(
                    f"cannot commit {count} ids: {len(sequence._drafted)} are drafted"
                )
        settle(self.sequences)
        self._restore_entries(counts)
        growing = [r for r, count in enumerate(counts) if count]
        _fold_resident([self.sequences[r] for r in growing], [counts[r] for r in growing])
        for sequence, count in zip(self.sequences, counts, strict=True):
            sequence._tokens += sequence._drafted[:count]
            sequence._rows = sequence._rows[count:]
            sequence.drop_draft()

    # ---- pieces of the verbs ----

    def _next_rows(self, active: list[int], slice: str, writer: int) -> list[Tensor]:
        """Logits [V] after the last drafted (or committed) id of each active row."""
        missing, feeds = [], []
        for r in active:
            sequence = self.sequences[r]
            slot = sequence.slot
            if slot.entry_slice != writer:
                sequence._rows = []
            pending = [*sequence._tokens[slot.folded :], *sequence._drafted]
            if slot.usable(writer) < len(pending) or len(sequence._rows) <= len(sequence._drafted):
                # Row 0 comes from the last committed token; rows must have no gap.
                first_row = sequence.length - slot.folded - 1 + len(sequence._rows)
                entry = min(slot.usable(writer), len(pending) - 1, first_row)
                missing.append(sequence)
                feeds.append((entry, pending[entry:]))
        if missing:
            hidden = _run(missing, feeds, writer)
            needed = [
                min(len(h), len(s._drafted) + 1) for s, h in zip(missing, hidden, strict=True)
            ]
            tables = self._logits(slice, [h[-n:] for h, n in zip(hidden, needed, strict=True)])
            for sequence, table in zip(missing, tables, strict=True):
                sequence._rows[len(sequence._drafted) + 1 - len(table) :] = list(table)
        return [self.sequences[r]._rows[len(self.sequences[r]._drafted)] for r in active]

    def _restore_entries(self, counts: Seq[int]) -> None:
        """Run drafts again whose journal entries a failed pass has overwritten."""
        for sequence, count in zip(self.sequences, counts, strict=True):
            slot = sequence.slot
            need = sequence.length + count - 1 - slot.folded
            if count and slot.entries < need:
                pending = [*sequence._tokens[slot.folded :], *sequence._drafted[:count]]
                _run([sequence], [(0, pending[:need])], slot.entry_slice)
                sequence._rows = []

    @contextmanager
    def _ground(self, writer: int, *, every: bool) -> Iterator[None]:
        """In exact mode, first repair what `writer` did not write; undo everything on failure.

        With `every`, all rows are prepared for a pass that folds as it goes.
        """
        stale = [
            s
            for s in self.sequences
            if s.consistency == "exact" and s.slot.exact_length(writer) < s.slot.folded
        ]
        starts: list[int | None] = [
            self.cache.rewind_target(s.slot, s.slot.exact_length(writer))
            if s in stale
            else (s.length if every else None)
            for s in self.sequences
        ]
        with restoring(self.sequences, starts):
            if stale:
                repair(stale, writer)
            yield

    def _logits(self, slice: str, hidden: Seq[Tensor]) -> list[Tensor]:
        """Logits [m_r, V] of hidden states [m_r, H]; raises NumericalError where not finite."""
        table = logits(self.model.weights(slice), torch.cat(list(hidden)))
        if not bool(torch.isfinite(table).all()):
            raise NumericalError(
                f"slice {slice!r} gave logits that are not finite; the sequence is unchanged"
            )
        return list(table.split([len(h) for h in hidden]))

    def _token_list(self, ids: TokenIds) -> list[int]:
        if isinstance(ids, Tensor):
            if ids.dim() != 1:
                raise RequestError(f"token ids must be a 1-D tensor, got shape {tuple(ids.shape)}")
            ids = ids.tolist()
        try:
            values = list(ids)
        except TypeError:
            raise RequestError(f"token ids must be a list, got {ids!r}") from None
        if not values:
            raise RequestError("no token ids to append")
        vocab = self.model.arch.vocab_size
        for value in values:
            if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < vocab:
                raise RequestError(f"token id {value!r} is not an integer in [0, {vocab})")
        return values

    def _counts(self, values: Seq[int]) -> list[int]:
        for value in values:
            if isinstance(value, bool) or not isinstance(value, int):
                raise RequestError(f"{value!r} is not a number of ids")
        return self._per_row(values)

    def _per_row(self, values: Seq[T]) -> list[T]:
        if len(values) != len(self.sequences):
            raise RequestError(f"{len(self.sequences)} rows, but {len(values)} values for them")
        return list(values)


# ---- passes ------------------------------------------------------------------------------------


def _run(sequences: Seq[Sequence], feeds: Seq[tuple[int, list[int]]], writer: int) -> list[Tensor]:
    """One pass into the resident journal: (first entry, ids) a row. Commits nothing."""
    first = sequences[0]
    model, cache = first.model, first.cache
    for sequence, (entry, _) in zip(sequences, feeds, strict=True):
        # Entries behind the first one written are about to be overwritten.
        sequence.slot.entries = entry
    hidden = forward(
        model.weights(writer),
        model.arch,
        model.kernels,
        cache,
        cache.journal,
        [
            Feed(s.slot.index, s.slot.index, s.slot.folded + entry, entry, ids)
            for s, (entry, ids) in zip(sequences, feeds, strict=True)
        ],
    )
    for sequence, (entry, ids) in zip(sequences, feeds, strict=True):
        sequence.slot.entries = entry + len(ids)
        sequence.slot.entry_slice = writer
        sequence.meter.count(writer, len(ids))
    return hidden


def _run_long(
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
        width = max(min(PREFILL_CHUNK, len(ids[r]) - done[r]) for r in active)
        journal = Journal(model.arch, len(active), width, cache.device, cache.dtype)
        feeds, folds = [], []
        for source, r in enumerate(active):
            slot = sequences[r].slot
            chunk = ids[r][done[r] : done[r] + width]
            done[r] += len(chunk)
            kept = keep and done[r] == len(ids[r])
            feeds.append(Feed(slot.index, source, slot.folded, 0, chunk))
            folds.append(Fold(slot, source, len(chunk) - kept, writer, kept))
        hidden = forward(model.weights(writer), model.arch, model.kernels, cache, journal, feeds)
        _fold(sequences, folds, journal)
        for r, feed, states in zip(active, feeds, hidden, strict=True):
            last[r] = states
            sequences[r].meter.count(writer, len(feed.ids))
    return last


def run_committed(sequences: Seq[Sequence], ids: Seq[list[int]], writer: int) -> None:
    """Run tokens that are committed already into windows and states again."""
    _run_long(sequences, ids, writer, keep=False)


def repair(sequences: Seq[Sequence], writer: int) -> int:
    """Rewind to exact ground and re-run all but the last token; returns the tokens re-run."""
    stale = []
    for sequence in sequences:
        slot = sequence.slot
        sequence.cache.rewind(slot, slot.exact_length(writer))
        sequence._rows = []
        stale.append(sequence._tokens[slot.folded : sequence.length - 1])
    run_committed(sequences, stale, writer)
    return sum(len(ids) for ids in stale)


def rebuild(sequence: Sequence, end: int) -> None:
    """Run committed tokens up to `end` into windows and states again, each under its writer."""
    slot = sequence.slot
    row = sequence.cache.provenance[slot.index]
    written, entry_slice = row.clone(), slot.entry_slice
    writers = written[:end].tolist()
    try:
        for stop in _span_ends(writers, slot.folded):
            run_committed([sequence], [sequence._tokens[slot.folded : stop]], writers[stop - 1])
    finally:  # a fold also stamps the position behind it
        row.copy_(written)
        slot.entry_slice = entry_slice


def settle(sequences: Seq[Sequence]) -> None:
    """Bring windows and states to the committed length where a failed commit has left it."""
    for sequence in sequences:
        end = max(sequence.length - 1, 0)
        if sequence.slot.folded > end:
            sequence.cache.rewind(sequence.slot, end)
        if sequence.slot.folded < end:
            rebuild(sequence, end)


def _span_ends(writers: list[int], start: int) -> list[int]:
    """Ends of the runs of equal writers from `start` on."""
    changes = [i for i in range(start + 1, len(writers)) if writers[i] != writers[i - 1]]
    return [*changes, len(writers)] if start < len(writers) else []


@contextmanager
def restoring(sequences: Seq[Sequence], starts: Seq[int | None] | None = None) -> Iterator[None]:
    """Leave every sequence as it is now if the block raises.

    starts[r]: the first committed position whose K and V the block may overwrite, None where it
    runs uncommitted tokens only. Journal entries are not kept: the next pass makes them again.
    """
    before = [
        (
            s,
            s.slot.entry_slice,
            (list(s._rows), list(s._drafted), list(s._proposals)),
            None if start is None else s.cache.save(s.slot, start, s.length),
        )
        for s, start in zip(sequences, starts or [None] * len(sequences), strict=True)
    ]
    try:
        yield
    except BaseException:
        for sequence, entry_slice, lists, saved in before:
            slot = sequence.slot
            sequence.cache.forget(slot, max(sequence.length - 1, 0))
            if saved is not None:
                sequence.cache.put_back(slot, saved)
            slot.entry_slice = entry_slice
            sequence._rows, sequence._drafted, sequence._proposals = lists
        raise


def _fold_resident(sequences: Seq[Sequence], added: Seq[int]) -> None:
    """Commit `added[r]` more tokens a row: fold the journal up to, and without, the last one."""
    folds = []
    for sequence, new in zip(sequences, added, strict=True):
        slot = sequence.slot
        count = sequence.length + new - 1 - slot.folded
        folds.append(Fold(slot, slot.index, count, slot.entry_slice, slot.entries > count))
    if folds:
        _fold(sequences, folds, sequences[0].cache.journal)


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


def _choose(
    rows: Seq[Tensor], samplers: Seq[Sampler], sequences: Seq[Sequence], kernels: object
) -> list[tuple[int, Tensor]]:
    """One drawn id and its distribution a row."""
    return [
        sampler.sample(row, [*sequence._tokens, *sequence._drafted], kernels)
        for row, sampler, sequence in zip(rows, samplers, sequences, strict=True)
    ]


def _check_room(sequence: Sequence, count: int) -> None:
    if count > sequence.room:
        raise CapacityExceeded(
            f"{count} more tokens do not fit: the sequence has {sequence.length} of "
            f"{sequence.cache.max_length}; build the cache with a larger max_length"
        )


def _check_draft(sequence: Sequence, count: int) -> None:
    total = len(sequence._drafted) + count
    _check_room(sequence, total)
    if total > sequence.cache.max_draft:
        raise CapacityExceeded(
            f"{total} drafted ids are more than max_draft={sequence.cache.max_draft}; "
            "draft fewer at once, or build the cache with a larger max_draft"
        )
