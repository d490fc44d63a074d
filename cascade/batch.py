"""The verbs for several sequences at once, ragged over rows.

Each has three parts: check the arguments, run what is missing inside `restoring`, and move the
committed length as its last act there.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from collections.abc import Sequence as Seq
from contextlib import contextmanager
from typing import TYPE_CHECKING, TypeAlias, TypeVar

import torch
from torch import Tensor

from cascade.chain import draft_ahead
from cascade.companion import cross, drafting
from cascade.errors import CapacityExceeded, NumericalError, RequestError, SequenceError
from cascade.passes import (
    complete_entries,
    cut,
    decode,
    extend,
    fold_resident,
    is_stale,
    promise,
    repair,
    repair_last,
    repair_start,
    restoring,
    run_long,
    settle,
    waits,
)
from cascade.passes import verify as run_scored
from cascade.sampling import Sampler, SamplingParams

if TYPE_CHECKING:
    from cascade.sequence import Sequence

TokenIds: TypeAlias = Seq[int] | Tensor
T = TypeVar("T")


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
        for sequence, new in self._zip(added):
            if not new:
                raise RequestError("no token ids to append")
            _check_room(sequence, len(new))
        settle(self.sequences)
        stored = self.cache.journal.entries
        short = all(s.length - s.slot.folded + len(new) <= stored for s, new in self._zip(added))
        with self._ground(writer, every=not short):
            feeds = []
            for sequence, new in self._zip(added):
                slot = sequence.slot
                entry = min(slot.usable(writer), sequence.length - slot.folded) if short else 0
                feeds.append((entry, [*sequence._tokens[slot.folded + entry :], *new]))
            if short:
                rows = [table[-1] for table in self._scored(self.sequences, feeds, writer)]
                fold_resident(list(self._zip(added)))
            else:
                hidden = run_long(
                    self.sequences, [pending for _, pending in feeds], writer, keep=True
                )
                rows = [row[0] for row in self._logits(writer, [h[-1:] for h in hidden])]
            for (sequence, new), row in zip(self._zip(added), rows, strict=True):
                extend(sequence, new, [row])
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
        for sequence, count in self._zip(wanted):
            if count < 0:
                raise RequestError(f"cannot draft {count} ids")
            _check_draft(sequence, count)
        drafters = drafting(self.sequences, wanted, writer)
        apart = [d for s, d in zip(self.sequences, drafters, strict=True) if d is not s]
        with restoring([*self.sequences, *apart]):
            drafted = (Batch(drafters) if apart else self)._draft(wanted, slice, samplers, stops)
            for sequence, drafter, new in zip(self.sequences, drafters, drafted, strict=True):
                cross(sequence, drafter, new)
            return drafted

    def _draft(
        self, wanted: list[int], slice: str, samplers: list[Sampler], stops: frozenset[int]
    ) -> list[list[int]]:
        """The loop of `draft`, each row in the sequence whose cache the slice reads.

        The caller must be ready to restore the sequences.
        """
        writer = self.model.slice_index(slice)
        before = [len(s._drafted) for s in self.sequences]
        active = [r for r, count in enumerate(wanted) if count > 0]
        if self._drafts_ahead(active, writer, samplers, wanted, stops):
            active = []
        while active:
            rows = self._next_rows(active, writer)
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
                sequence._verified = False
                if len(sequence._drafted) - before[r] < wanted[r] and token not in stops:
                    still.append(r)
            active = still
        return [s._drafted[b:] for s, b in zip(self.sequences, before, strict=True)]

    def propose(self, ids: Seq[TokenIds]) -> None:
        """Take ids[r] as drafted ids of row r, behind those it has. See Sequence.propose."""
        added = [self._token_list(row) for row in self._per_row(ids)]
        for sequence, new in self._zip(added):
            _check_draft(sequence, len(new))
        with restoring(self.sequences):
            for sequence, new in self._zip(added):
                sequence._drafted += new
                sequence._proposals += [None] * len(new)
                sequence._verified = sequence._verified and not new

    def verify(self, slice: str, *, repair: bool = True) -> list[Tensor]:
        """Logits [k_r + 1, V] a row over its drafted ids, of which some rows may have none."""
        writer = self.model.slice_index(slice)
        if not any(s._drafted for s in self.sequences):
            raise SequenceError("nothing to verify: draft before verifying")
        for sequence in self.sequences:
            if sequence.length == 0:
                raise SequenceError("nothing to verify: append a prompt first")
            if sequence._verified and sequence.slot.entry_slice == writer:
                raise SequenceError(
                    f"slice {slice!r} has verified these drafted ids already: commit, or draft more"
                )
        settle(self.sequences)
        with self._ground(writer, every=False) if repair else restoring(self.sequences):
            # Rows that this slice computed while it drafted, and left in the journal, stand.
            known = [s._rows[: s.slot.usable(writer)] for s in self.sequences]
            missing, feeds = [], []
            for sequence, first in self._zip(known):
                pending = [*sequence._tokens[sequence.slot.folded :], *sequence._drafted]
                if len(first) < len(pending):
                    missing.append(sequence)
                    feeds.append((len(first), pending[len(first) :]))
            tables = iter(self._scored(missing, feeds, writer) if missing else [])
            for sequence, first in self._zip(known):
                new = next(tables) if sequence in missing else ()
                sequence._rows = [*first, *new]
                sequence._verified = bool(sequence._drafted)
            return [torch.stack(s._rows) for s in self.sequences]

    def commit(self, n: Seq[int], bonus: Seq[int | None] | None = None) -> None:
        """Keep the first n[r] drafted ids of row r, then bonus[r]. See Sequence.commit."""
        counts = self._counts(n)
        bonuses = self._per_row([None] * len(counts) if bonus is None else bonus)
        added = []
        for (sequence, count), token in zip(self._zip(counts), bonuses, strict=True):
            drafted = len(sequence._drafted)
            if not 0 <= count <= drafted:
                raise SequenceError(f"cannot commit {count} ids: {drafted} are drafted")
            extra = [] if token is None else self._token_list([token])
            if extra and sequence.length == 0:
                raise SequenceError("nothing to continue: append a prompt before a bonus token")
            _check_room(sequence, count + len(extra))
            added.append([*sequence._drafted[:count], *extra])
        pairs = zip(self._zip(added), counts, strict=True)
        late = [s for (s, new), count in pairs if waits(s, new, count)]
        settle([s for s in self.sequences if s not in late])
        with restoring(self.sequences):
            for sequence, count in self._zip(counts):
                # Entries of rejected ids count no longer; a bonus token has none.
                kept = sequence.length - sequence.slot.folded + count
                sequence.slot.entries = min(sequence.slot.entries, kept)
            promise([(s, new) for s, new in self._zip(added) if new and s in late])
            growing = [(s, new) for s, new in self._zip(added) if new and s not in late]
            complete_entries(growing)
            fold_resident(growing)
            for (sequence, new), count in zip(self._zip(added), counts, strict=True):
                extend(sequence, new, sequence._rows[count:])

    def rollback(self, lengths: Seq[int]) -> None:
        """Go back to length lengths[r] of row r. See Sequence.rollback."""
        wanted = self._counts(lengths)
        for sequence, length in self._zip(wanted):
            if not 0 <= length <= sequence.length:
                raise SequenceError(
                    f"cannot roll back to length {length}: the sequence has {sequence.length}"
                )
        starts: list[int | None] = []
        for sequence, length in self._zip(wanted):
            keep, slot = max(length - 1, 0), sequence.slot
            target = self.cache.rewind_target(slot, keep) if slot.folded > keep else slot.folded
            starts.append(target if length < sequence.length else None)
        with restoring(self.sequences, starts):
            for sequence, length in self._zip(wanted):
                if length < sequence.length:
                    cut(sequence, length)
                sequence.drop_draft()

    def fork(self, n: int = 1) -> list[list[Sequence]]:
        """`n` independent sequences of each row. See Sequence.fork."""
        forks: list[list[Sequence]] = []
        try:
            for sequence in self.sequences:
                forks.append(sequence.fork(n))
        except BaseException:
            for fork in [fork for row in forks for fork in row]:
                fork.close()
            raise
        return forks

    def refresh(self, slice: str, last: int | None = None) -> list[int]:
        """Re-run what a slice did not write; returns how many tokens. See Sequence.refresh."""
        writer = self.model.slice_index(slice)
        if last is not None and (isinstance(last, bool) or not isinstance(last, int) or last < 1):
            raise RequestError(f"last={last!r} must be a number of tokens, at least 1")
        settle(self.sequences)
        stale = [s for s in self.sequences if is_stale(s, writer)]
        if last is not None:
            return self._refresh_last(stale, writer, last)
        starts = [repair_start(s, writer) if s in stale else None for s in self.sequences]
        with restoring(self.sequences, starts):
            counts = dict(zip(stale, repair(stale, writer), strict=True))
            for sequence in self.sequences:
                sequence.drop_draft()
            return [counts.get(s, 0) for s in self.sequences]

    # ---- pieces of the verbs ----

    def _refresh_last(self, stale: list[Sequence], writer: int, last: int) -> list[int]:
        begins = {s: max(s.slot.exact_length(writer), s.length - 1 - last) for s in stale}
        starts = [
            self.cache.rewind_target(s.slot, begins[s]) if s in begins else None
            for s in self.sequences
        ]
        with restoring(self.sequences, starts):
            counts = {s: repair_last(s, writer, begin) for s, begin in begins.items()}
            for sequence in self.sequences:
                sequence.drop_draft()
            return [counts.get(s, 0) for s in self.sequences]

    def _next_rows(self, active: list[int], writer: int) -> list[Tensor]:
        """Logits [V] after the last drafted (or committed) id of each active row."""
        missing, feeds = [], []
        for r in active:
            sequence = self.sequences[r]
            slot = sequence.slot
            if slot.entry_slice != writer:
                sequence._rows = []
            # Every journal entry has its row; entry 0 is the last committed token.
            pending = [*sequence._tokens[slot.folded :], *sequence._drafted]
            entry = slot.usable(writer)
            if entry < len(pending):
                missing.append(sequence)
                feeds.append((entry, pending[entry:]))
        if missing:
            tables: Seq[Tensor]
            if all(len(ids) == 1 for _, ids in feeds):
                tables = self._finite(writer, decode(missing, feeds, writer)).split(1)
            else:
                tables = self._scored(missing, feeds, writer)
            for sequence, (entry, _), table in zip(missing, feeds, tables, strict=True):
                sequence._rows[entry:] = list(table)
        return [self.sequences[r]._rows[len(self.sequences[r]._drafted)] for r in active]

    def _drafts_ahead(
        self,
        active: list[int],
        writer: int,
        samplers: Seq[Sampler],
        wanted: Seq[int],
        stops: frozenset[int],
    ) -> bool:
        """Draft without the host in between, where the device can and no row needs its tokens."""
        decoder = self.model.runner.chain(self.cache, len(active)) if active else None
        if decoder is None or not all(samplers[r].needs_only_logits for r in active):
            return False
        rows = [self.sequences[r] for r in active]
        for sequence in rows:
            slot = sequence.slot
            if sequence.length - slot.folded + len(sequence._drafted) - slot.usable(writer) > 1:
                return False
            sequence._verified = False
        counts, own = [wanted[r] for r in active], [samplers[r] for r in active]
        draft_ahead(rows, counts, own, writer, decoder, stops)
        return True

    @contextmanager
    def _ground(self, writer: int, *, every: bool) -> Iterator[None]:
        """In exact mode, first repair what `writer` did not write; undo everything on failure.

        With `every`, all rows are prepared for a pass that folds as it goes.
        """
        stale = [s for s in self.sequences if s.consistency == "exact" and is_stale(s, writer)]
        starts = [
            repair_start(s, writer) if s in stale else s.length if every else None
            for s in self.sequences
        ]
        with restoring(self.sequences, starts):
            repair(stale, writer)
            yield

    def _scored(
        self, sequences: Seq[Sequence], feeds: Seq[tuple[int, list[int]]], writer: int
    ) -> list[Tensor]:
        """Logits [m_r, V] after each id that a short pass runs."""
        table = self._finite(writer, run_scored(sequences, feeds, writer))
        return list(table.split([len(ids) for _, ids in feeds]))

    @torch.no_grad()
    def _logits(self, writer: int, hidden: Seq[Tensor]) -> list[Tensor]:
        """Logits [m_r, V] of hidden states [m_r, H]; raises NumericalError where not finite."""
        table = self._finite(writer, self.model.runner.logits(writer, torch.cat(list(hidden))))
        return list(table.split([len(h) for h in hidden]))

    def _finite(self, writer: int, table: Tensor) -> Tensor:
        if not math.isfinite(table.sum()):  # one operation, and one number to wait for
            name = list(self.model.slices)[writer]
            raise NumericalError(
                f"slice {name!r} gave logits that are not finite; the sequence is unchanged"
            )
        return table

    def _token_list(self, ids: TokenIds) -> list[int]:
        """Checked token ids, possibly none."""
        if isinstance(ids, Tensor):
            if ids.dim() != 1:
                raise RequestError(f"token ids must be a 1-D tensor, got shape {tuple(ids.shape)}")
            ids = ids.tolist()
        try:
            values = list(ids)
        except TypeError:
            raise RequestError(f"token ids must be a list, got {ids!r}") from None
        vocab = self.model.arch.vocab_size
        for value in values:
            if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < vocab:
                raise RequestError(f"token id {value!r} is not an integer in [0, {vocab})")
        return values

    def _counts(self, values: Seq[int]) -> list[int]:
        counts = self._per_row(values)
        for value in counts:
            if isinstance(value, bool) or not isinstance(value, int):
                raise RequestError(f"{value!r} is not a number of ids")
        return counts

    def _per_row(self, values: Seq[T]) -> list[T]:
        rows = len(self.sequences)
        if not hasattr(values, "__len__") or len(values) != rows:
            raise RequestError(f"{rows} rows need a list of {rows}, one value each; got {values!r}")
        return list(values)

    def _zip(self, values: Seq[T]) -> Iterator[tuple[Sequence, T]]:
        return zip(self.sequences, values, strict=True)


def _choose(
    rows: Seq[Tensor], samplers: Seq[Sampler], sequences: Seq[Sequence], kernels: object
) -> list[tuple[int, Tensor | None]]:
    """One drawn id and its distribution a row, None where no other id was possible."""
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
    if sequence.length == 0:
        raise SequenceError("nothing to continue: append a prompt before drafting")
    total = len(sequence._drafted) + count
    _check_room(sequence, total)
    if total > sequence.cache.max_draft:
        raise CapacityExceeded(
            f"{total} drafted ids are more than max_draft={sequence.cache.max_draft}; "
            "draft fewer at once, or build the cache with a larger max_draft"
        )
