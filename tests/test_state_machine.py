"""Random verbs on ragged batches, against a shadow of plain lists and recomputed caches.

Every step draws one verb for some of the open sequences, in any consistency mode, now and then
with a kernel that raises in the middle of it. `CASCADE_EXAMPLES` and `CASCADE_STEPS` make the
search larger than the default.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from torch import Tensor

from cascade import passes
from cascade.batch import Batch
from cascade.cache import Cache
from cascade.errors import SequenceError
from cascade.graphs import GraphRunner
from cascade.kernels.reference import cache_digest
from cascade.model import ElasticModel
from cascade.sequence import MODES, Consistency, Sequence
from tests.faults import FaultyKernels, Injected
from tests.nested import Replay, elastic, parent

SLICES = ("small", "medium", "large")
TOLERANCE = 1e-4
SLOTS, LENGTH, DRAFT = 5, 40, 6

# Kernel calls until one raises. A pass makes about 15, a fold 4.
FAULTS = st.none() | st.none() | st.integers(0, 6) | st.integers(0, 40)

slices = st.sampled_from(SLICES)


@dataclass
class Shadow:
    """What a sequence must say of itself. writers[-1] is provisional, and not compared.

    runner:   the slice that ran last: what it ran, or did not, is committed as its own
    verified: the slice that ran all of the drafted ids as its last act, if one did
    """

    sequence: Sequence
    mode: str
    tokens: list[int] = field(default_factory=list)
    writers: list[str] = field(default_factory=list)
    drafted: list[int] = field(default_factory=list)
    runner: str = ""
    verified: str | None = None

    def prefix(self, writer: str) -> int:
        """Leading positions before the last that `writer` wrote."""
        run = self.writers[: max(len(self.tokens) - 1, 0)]
        return next((i for i, name in enumerate(run) if name != writer), len(run))

    def prepare(self, writer: str) -> None:
        """What `append` and `verify` of a slice do to the committed tokens first."""
        self.runner = writer
        if self.mode == "exact":
            self.writers = [writer] * len(self.writers)

    def extend(self, ids: list[int]) -> None:
        """Commit ids of the runner: it ran the last token before them again as well."""
        if ids:
            self.writers[-1:] = [self.runner] * (len(ids) + bool(self.tokens))
            self.tokens += ids
        self.drop()

    def drop(self) -> None:
        self.drafted, self.verified = [], None


class Verbs(RuleBasedStateMachine):
    """The machine. `model` and `kernels` are set by the test."""

    model: ElasticModel
    kernels: FaultyKernels

    @initialize(
        data=st.data(),
        modes=st.lists(st.sampled_from(MODES), min_size=1, max_size=3),
        ids=st.lists(st.lists(st.integers(0, 63), min_size=1), min_size=3, max_size=3),
    )
    def start(self, data: st.DataObject, modes: list[Consistency], ids: list[list[int]]) -> None:
        self.kernels.disarm()
        self.cache = self.model.cache(max_batch=SLOTS, max_length=LENGTH, max_draft=DRAFT)
        self.scratch = self.model.cache(max_batch=1, max_length=LENGTH + 1, max_draft=64)
        self.rows: list[Shadow] = []
        self.digests: dict[int, list[int]] = {}
        for mode in modes:
            self.open(mode)
        self.append_to(data, self.rows, [row[:LENGTH] for row in ids[: len(modes)]], "large")

    # ---- rules ----

    @precondition(lambda self: self.cache.free_slots)
    @rule(mode=st.sampled_from(MODES))
    def open(self, mode: Consistency) -> None:
        sequence = self.model.sequence(cache=self.cache, consistency=mode)
        self.rows.append(Shadow(sequence, mode))
        self.record()

    @rule(data=st.data(), slice=slices)
    def append(self, data: st.DataObject, slice: str) -> None:
        rows = self.some(data, lambda row: row.sequence.room)
        ids = [
            data.draw(st.lists(st.integers(0, 63), min_size=1, max_size=min(row.sequence.room, 12)))
            for row in rows
        ]
        self.append_to(data, rows, ids, slice)

    def append_to(
        self, data: st.DataObject, rows: list[Shadow], ids: list[list[int]], slice: str
    ) -> None:
        for row, logits in self.verb(data, rows, lambda batch: batch.append(ids, slice)):
            row.prepare(slice)
            row.extend(ids[rows.index(row)])
            self.check_logits(row.tokens, row.writers, logits)
            self.check_cache(row, exact=slice)

    @rule(data=st.data(), slice=slices, until=st.sets(st.integers(0, 63), max_size=8))
    def draft(self, data: st.DataObject, slice: str, until: set[int]) -> None:
        rows = self.some(data, lambda row: row.tokens)
        most = [min(DRAFT, row.sequence.room) - len(row.drafted) for row in rows]
        k = [data.draw(st.integers(0, count)) for count in most]
        for row, ids in self.verb(data, rows, lambda batch: batch.draft(k, slice, until=until)):
            wanted = k[rows.index(row)]
            assert len(ids) == wanted or (0 < len(ids) < wanted and ids[-1] in until)
            assert not until.intersection(ids[:-1])
            row.drafted += ids
            if ids:
                row.runner, row.verified = slice, None
                self.check_last_draft(row)

    @rule(data=st.data())
    def propose(self, data: st.DataObject) -> None:
        rows = self.some(data, lambda row: row.tokens)
        most = [min(DRAFT, row.sequence.room) - len(row.drafted) for row in rows]
        ids = [data.draw(st.lists(st.integers(0, 63), max_size=count)) for count in most]
        for row, _ in self.verb(data, rows, lambda batch: batch.propose(ids)):
            new = ids[rows.index(row)]
            row.drafted += new
            row.verified = None if new else row.verified
            for token, proposal in zip(new[::-1], row.sequence.proposals[::-1], strict=False):
                assert proposal[token] == proposal.sum() == 1

    @rule(data=st.data(), slice=slices)
    def verify(self, data: st.DataObject, slice: str) -> None:
        rows = self.some(data, lambda row: row.tokens)
        if not any(row.drafted for row in rows) or any(row.verified == slice for row in rows):
            if rows:
                with pytest.raises(SequenceError):
                    Batch([row.sequence for row in rows]).verify(slice)
            return
        for row, table in self.verb(data, rows, lambda batch: batch.verify(slice)):
            assert table.shape == (len(row.drafted) + 1, 64)
            assert table.dtype == torch.float32
            row.prepare(slice)
            row.verified = slice if row.drafted else None
            for i in {0, len(row.drafted)}:
                tokens = row.tokens + row.drafted[:i]
                self.check_logits(tokens, row.writers[:-1] + [slice] * (i + 1), table[i])
            self.check_cache(row, exact=slice)

    @rule(data=st.data())
    def commit(self, data: st.DataObject) -> None:
        rows = self.some(data, lambda row: True)
        n = [data.draw(st.integers(0, len(row.drafted))) for row in rows]
        bonus = [
            data.draw(st.none() | st.integers(0, 63))
            if row.tokens and count < row.sequence.room
            else None
            for row, count in zip(rows, n, strict=True)
        ]
        for row, _ in self.verb(data, rows, lambda batch: batch.commit(n, bonus)):
            more, verified = bonus[rows.index(row)], row.verified
            row.extend(row.drafted[: n[rows.index(row)]] + ([] if more is None else [more]))
            self.check_cache(row, exact=verified)

    @rule(data=st.data(), verifier=slices, drafter=slices)
    def draft_verify_commit(self, data: st.DataObject, drafter: str, verifier: str) -> None:
        self.kernels.disarm()
        rows = self.some(data, lambda row: row.tokens and row.sequence.room)
        if not rows:
            return
        batch = Batch([row.sequence for row in rows])
        batch.commit([0] * len(rows))
        for row in rows:
            row.drop()
        k = [data.draw(st.integers(0, min(DRAFT, row.sequence.room))) for row in rows]
        drafted = batch.draft(k, drafter)
        for row, count in zip(rows, k, strict=True):
            row.runner = drafter if count else row.runner
        if any(drafted):
            tables = batch.verify(verifier)
            n = [data.draw(st.integers(0, len(ids))) for ids in drafted]
            bonus = [
                int(table[count].argmax()) if count < row.sequence.room else None
                for row, table, count in zip(rows, tables, n, strict=True)
            ]
            batch.commit(n, bonus)
            for row, ids, count, more in zip(rows, drafted, n, bonus, strict=True):
                row.prepare(verifier)
                row.extend(ids[:count] + ([] if more is None else [more]))
                self.check_cache(row, exact=verifier)
        self.record()

    @rule(data=st.data())
    def rollback(self, data: st.DataObject) -> None:
        rows = self.some(data, lambda row: True)
        lengths = [data.draw(st.integers(0, len(row.tokens))) for row in rows]
        for row, _ in self.verb(data, rows, lambda batch: batch.rollback(lengths)):
            length = lengths[rows.index(row)]
            del row.tokens[length:], row.writers[length:]
            row.drop()
            self.check_cache(row)

    @rule(data=st.data(), slice=slices)
    def refresh(self, data: st.DataObject, slice: str) -> None:
        rows = self.some(data, lambda row: True)
        for row, count in self.verb(data, rows, lambda batch: batch.refresh(slice)):
            stale = max(len(row.tokens) - 1, 0) - row.prefix(slice)
            # Only `shared` may have to go back further than the first stale token.
            assert count == stale or (row.mode == "shared" and stale and count > stale)
            row.runner = slice if stale else row.runner
            row.writers = [slice] * len(row.writers)
            row.drop()
            self.check_cache(row, refreshed=slice)

    @rule(data=st.data())
    def fork(self, data: st.DataObject) -> None:
        free = self.cache.free_slots
        if not free:
            return
        for row in self.some(data, lambda row: True)[:1]:
            n = data.draw(st.integers(1, free))
            for _, forks in self.verb(data, [row], lambda _: [row.sequence.fork(n)]):
                for sequence in forks:
                    twin = Shadow(sequence, row.mode, list(row.tokens), list(row.writers))
                    twin.runner = row.runner
                    self.rows.append(twin)
                    self.check_cache(twin)

    @rule(data=st.data())
    def close(self, data: st.DataObject) -> None:
        if len(self.rows) > 1:
            row = self.some(data, lambda row: True)[0]
            self.digests.pop(row.sequence.slot.index, None)
            row.sequence.close()
            self.rows.remove(row)

    # ---- invariants ----

    @invariant()
    def lists_agree(self) -> None:
        for row in getattr(self, "rows", []):
            sequence = row.sequence
            assert sequence.tokens == row.tokens
            assert sequence.drafted == row.drafted
            assert sequence.length == len(row.tokens)
            assert sequence.room == LENGTH - len(row.tokens)
            assert len(sequence.proposals) == len(row.drafted)
            assert sequence.slot.entries <= len(sequence.rows)
            assert sequence.provenance[:-1] == row.writers[:-1]
            assert set(sequence.provenance[-1:]) <= set(SLICES)
            # Asking would rebuild what a failed verb has left behind; the next verb must.
            if sequence.slot.folded == max(len(row.tokens) - 1, 0):
                for slice in SLICES:
                    assert sequence.exact_length(slice) == row.prefix(slice)

    # ---- how a verb is run, and what it must leave behind ----

    def some(self, data: st.DataObject, usable: Callable[[Shadow], Any]) -> list[Shadow]:
        """A random, ordered choice of the rows a verb can be called on; may be empty."""
        able = [row for row in self.rows if usable(row)]
        if not able:
            return []
        order = data.draw(st.permutations(range(len(able))))
        return [able[i] for i in order[: data.draw(st.integers(1, len(able)))]]

    def verb(
        self, data: st.DataObject, rows: list[Shadow], call: Callable[[Batch], Any]
    ) -> Iterator[tuple[Shadow, Any]]:
        """Run one verb, now and then with a kernel that raises in the middle of it.

        Yields (row, result) where it succeeds, nothing where it was broken.
        """
        if not rows:
            return
        failed = False
        countdown = data.draw(FAULTS)
        if countdown is not None:
            self.kernels.arm(countdown)
        try:
            results = call(Batch([row.sequence for row in rows])) or [None] * len(rows)
        except Injected:
            failed = True
        finally:
            self.kernels.disarm()
        self.unchanged(rows)
        if not failed:
            yield from zip(rows, results, strict=True)
        self.record()

    def unchanged(self, touched: list[Shadow]) -> None:
        """The cache of every other row is the same bit by bit."""
        mine = {row.sequence.slot.index for row in touched}
        now = digests(self.cache, [row for row in self.rows if row not in touched])
        assert {k: v for k, v in self.digests.items() if k not in mine} == now

    def record(self) -> None:
        self.digests = digests(self.cache, self.rows)

    def check_cache(
        self, row: Shadow, exact: str | None = None, refreshed: str | None = None
    ) -> None:
        """Equal to running each span again under its writer.

        exact:     the slice that an `exact` row must be a from-scratch prefill of
        refreshed: the same for a row of any mode
        """
        sequence = row.sequence
        passes.settle([sequence])
        count = max(len(row.tokens) - 1, 0)
        if not count:
            return
        alone = refreshed or (exact if row.mode == "exact" else None)
        if alone:
            assert row.writers[:-1] == [alone] * count
            assert sequence.audit(alone).max_relative_error <= TOLERANCE
        with self.replayed(row.tokens, row.writers) as replay:
            assert replay.deviation(sequence) <= TOLERANCE

    def check_logits(self, tokens: list[int], writers: list[str], logits: Tensor) -> None:
        with self.replayed(tokens, writers) as replay:
            torch.testing.assert_close(logits, replay.logits, atol=1e-4, rtol=1e-4)

    def check_last_draft(self, row: Shadow) -> None:
        tokens = row.tokens + row.drafted[:-1]
        writers = row.writers[:-1] + [row.runner] * len(row.drafted)
        with self.replayed(tokens, writers) as replay:
            assert replay.logits[row.drafted[-1]] >= replay.logits.max() - 1e-3

    def replayed(self, tokens: list[int], writers: list[str]) -> Replay:
        return Replay(self.model, tokens, writers, self.scratch)


def digests(cache: Cache, rows: list[Shadow]) -> dict[int, list[int]]:
    """By slot, 64-bit digests of what is committed."""
    if not rows:
        return {}
    slots = [row.sequence.slot for row in rows]
    index, lengths = cache.index(*((slot.index, slot.folded) for slot in slots))
    parts = cache_digest(cache.keys, cache.values, cache.window, cache.state, index, lengths)
    table = torch.cat([part.transpose(0, 1).flatten(1) for part in parts], 1).tolist()
    return {slot.index: row for slot, row in zip(slots, table, strict=True)}


def test_every_verb_keeps_the_cache_consistent_in_every_mode(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    run(elastic(parent("M*E*M")), monkeypatch)


def test_short_passes_and_drafting_ahead_keep_it_consistent_too(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The route of a GPU, its kernels in plain PyTorch."""
    run(elastic(parent("M*E-M")), monkeypatch, GraphRunner)


@pytest.mark.gpu
def test_the_cuda_kernels_keep_it_consistent_too(monkeypatch: pytest.MonkeyPatch) -> None:
    model = elastic(parent("M*E*M").cuda())
    assert model.kernels.__name__ == "cascade.kernels.cuda"
    run(model, monkeypatch)


def run(
    model: ElasticModel, monkeypatch: pytest.MonkeyPatch, runner: type[GraphRunner] | None = None
) -> None:
    kernels = FaultyKernels(model.kernels)
    monkeypatch.setattr(model, "kernels", kernels)
    if runner is not None:
        monkeypatch.setattr(model, "runner", runner(model.runner.views, model.arch, kernels))
    # So small that short sequences take the long paths as well.
    monkeypatch.setattr(passes, "PREFILL_CHUNK", 5)
    monkeypatch.setattr(passes, "SNAPSHOT_INTERVAL", 8)
    machine = type("Machine", (Verbs,), {"model": model, "kernels": kernels})
    run_state_machine_as_test(
        machine,
        settings=settings(
            max_examples=int(os.environ.get("CASCADE_EXAMPLES", "25")),
            stateful_step_count=int(os.environ.get("CASCADE_STEPS", "25")),
            deadline=None,
            database=None,
            derandomize="CASCADE_EXAMPLES" not in os.environ,
            suppress_health_check=list(HealthCheck),
        ),
    )
