"""A verb that fails leaves every sequence as it was, wherever in the verb it fails."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from functools import cache as cache_of
from typing import Any

import pytest
import torch
from torch import Tensor

from cascade import passes
from cascade.batch import Batch
from cascade.cache import Cache
from cascade.errors import (
    CacheFull,
    CapacityExceeded,
    CascadeError,
    NumericalError,
    RequestError,
    SequenceClosed,
    SequenceError,
    SliceError,
)
from cascade.graphs import GraphRunner
from cascade.model import ElasticModel
from cascade.sequence import Sequence
from tests.faults import FaultyKernels, Injected, cache_bits, interrupting
from tests.nested import elastic, parent

PROMPT = [5, 9, 2, 33, 60, 1, 17, 17, 40, 8]
LENGTH, DRAFT = 32, 6
FOLDING = ("ssm_commit", "conv_commit", "provenance_stamp", "journal_keep")
COMPUTING = tuple(
    name + way
    for name in ("rms_norm", "causal_conv", "ssm_scan", "gated_norm", "attention", "experts")
    for way in ("", "_step", "_span")
)
ERRORS = [Injected(), MemoryError("out of memory"), KeyboardInterrupt(), RuntimeError("lost")]
FILES = ("batch.py", "passes.py", "cache.py", "sequence.py", "companion.py", "runner.py", "cpu.py")
# The consistency modes, and a draft slice with a cache of its own.
KINDS: dict[str, dict[str, Any]] = {
    "exact": {"consistency": "exact"},
    "shared": {"consistency": "shared"},
    "refresh": {"consistency": "refresh"},
    "own": {"draft_cache": "own"},
}


@pytest.fixture(scope="module")
def kernels() -> FaultyKernels:
    return FaultyKernels(elastic(parent("M")).kernels)


@pytest.fixture(scope="module")
def model(kernels: FaultyKernels) -> ElasticModel:
    model = elastic(parent("M*EM-"))
    model.kernels = kernels  # type: ignore[assignment]
    return model


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch, kernels: FaultyKernels) -> Iterator[None]:
    monkeypatch.setattr(passes, "PREFILL_CHUNK", 4)
    monkeypatch.setattr(passes, "SNAPSHOT_INTERVAL", 6)
    yield
    kernels.disarm()


@pytest.fixture
def cache(model: ElasticModel) -> Cache:
    return model.cache(max_batch=5, max_length=LENGTH, max_draft=DRAFT, draft_cache="own")


def mixed(model: ElasticModel, cache: Cache, mode: str, verb: str = "") -> Sequence:
    """A sequence with a past: written by two slices, with drafts pending.

    For some verbs there are ids that no slice has run behind the drafts.
    """
    sequence = model.sequence(cache=cache, **KINDS[mode])
    sequence.append(PROMPT, "large")
    sequence.draft(3, "small")
    sequence.commit(2)  # not verified
    sequence.draft(4, "medium")
    if "proposed" in verb:
        sequence.propose([7, 8])
    return sequence


VERBS: dict[str, Callable[[Sequence], Any]] = {
    "append": lambda seq: seq.append([7, 8, 9], "large"),
    "append, several chunks": lambda seq: seq.append(list(range(15)), "large"),
    "append, nothing to repair": lambda seq: seq.append([7, 8], "medium"),
    "draft": lambda seq: seq.draft(2, "small"),
    "draft, the same slice": lambda seq: seq.draft(2, "medium"),
    "verify": lambda seq: seq.verify("large"),
    "verify, the same slice": lambda seq: seq.verify("medium"),
    "commit": lambda seq: seq.commit(3),
    "commit all and a bonus": lambda seq: seq.commit(4, bonus=11),
    "commit of proposed ids": lambda seq: seq.commit(6),
    "verify of proposed ids": lambda seq: seq.verify("medium"),
    "propose": lambda seq: seq.propose([7, 8]),
    "rollback": lambda seq: seq.rollback(11),
    "rollback far": lambda seq: seq.rollback(3),
    "refresh": lambda seq: seq.refresh("large"),
    "fork": lambda seq: seq.fork(2),
    "audit": lambda seq: seq.audit("large"),
}


def told(seq: Sequence) -> tuple[Any, ...]:
    """All that a sequence says of itself."""
    proposals = [row.tolist() for row in seq.proposals]
    rows = [row.tolist() for row in seq.rows]
    exact = [seq.exact_length(name) for name in ("small", "large")]
    return seq.tokens, seq.drafted, seq.provenance, seq.length, proposals, rows, exact


def held(seq: Sequence) -> list[Tensor]:
    """What the cache holds of its committed tokens."""
    passes.settle([seq])
    cache, slot, end = seq.cache, seq.slot.index, max(seq.length - 1, 0)
    parts = [cache.window[:, slot], cache.state[:, slot]]
    parts += [cache.keys[:, slot, :end], cache.values[:, slot, :end]]
    return [part.clone() for part in parts]


def continuation(seq: Sequence) -> list[Tensor]:
    """What the sequence goes on to say, journal included, and the cache it has then."""
    seq.commit(len(seq.drafted))
    names = list(seq.model.slices)
    after = [torch.tensor([names.index(name) for name in seq.provenance])]
    seq.draft(2, "small")
    return [*after, seq.verify("medium"), seq.append([3], "medium"), *held(seq)]


Twin = tuple[tuple[Any, ...], list[Tensor], list[Tensor]]


def undisturbed(model: ElasticModel, mode: str, verb: str = "") -> Twin:
    """What a sequence to which nothing happens says, holds and goes on to say."""
    return _undisturbed(model, mode, "proposed" if "proposed" in verb else "")


@cache_of
def _undisturbed(model: ElasticModel, mode: str, verb: str) -> Twin:
    own = model.cache(max_batch=1, max_length=LENGTH, max_draft=DRAFT, draft_cache="own")
    with mixed(model, own, mode, verb) as sequence:
        return told(sequence), held(sequence), continuation(sequence)


def same(mine: list[Tensor], its: list[Tensor]) -> None:
    torch.testing.assert_close(mine, its, atol=1e-4, rtol=1e-4)


def assert_untouched(failed: Sequence, twin: Twin) -> None:
    said, kept, goes_on = twin
    assert told(failed) == said
    same(held(failed), kept)
    same(continuation(failed), goes_on)


@pytest.mark.parametrize("mode", KINDS)
@pytest.mark.parametrize("verb", VERBS)
def test_a_kernel_that_raises_anywhere_leaves_no_trace(
    model: ElasticModel, cache: Cache, kernels: FaultyKernels, mode: str, verb: str
) -> None:
    """Layers and the commit's own kernels, at random places; what is raised varies as well."""
    expected = undisturbed(model, mode, verb)
    with mixed(model, cache, mode, verb) as seq:
        kernels.record()
        result = VERBS[verb](seq)
        calls = len(kernels.calls)
        for fork in result if verb == "fork" else ():
            fork.close()
    chance = random.Random(f"{verb} {mode}")
    places = {calls - 1, *chance.sample(range(calls), min(calls, 2))} if calls else ()
    for number, call in enumerate(sorted(places)):
        error = ERRORS[(number + len(verb)) % len(ERRORS)]
        with mixed(model, cache, mode, verb) as seq:
            kernels.arm(call, error, late=call == calls - 1)
            with pytest.raises(type(error)):
                VERBS[verb](seq)
            assert_untouched(seq, expected)
    assert cache.free_slots == cache.max_batch


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("kernel", FOLDING)
def test_a_batch_whose_commit_breaks_half_way_is_whole_afterwards(
    model: ElasticModel, cache: Cache, kernels: FaultyKernels, kernel: str, late: bool
) -> None:
    expected = [undisturbed(model, mode) for mode in KINDS]
    rows = [mixed(model, cache, mode) for mode in KINDS]
    batch = Batch(rows)
    for verb in (
        lambda: batch.commit([2, 0, 4, 4], [None, None, 9, 9]),
        lambda: batch.append([[1], [2, 3], [4, 5, 6], [7]], "medium"),
    ):
        kernels.arm(0, only=(kernel,), late=late)
        with pytest.raises(Injected):
            verb()
        assert [told(row) for row in rows] == [said for said, _, _ in expected]
    for row, whole in zip(rows, expected, strict=True):
        assert_untouched(row, whole)


@pytest.mark.parametrize("verb", ["append", "append, several chunks", "draft", "verify"])
def test_a_failed_verb_can_be_called_again(
    model: ElasticModel, cache: Cache, kernels: FaultyKernels, verb: str
) -> None:
    for mode in KINDS:
        with mixed(model, cache, mode) as seq, mixed(model, cache, mode) as other:
            kernels.arm(12)
            with pytest.raises(Injected):
                VERBS[verb](seq)
            torch.testing.assert_close(VERBS[verb](seq), VERBS[verb](other), atol=1e-4, rtol=1e-4)
            same(held(seq), held(other))


def test_drafting_ahead_behind_a_failed_verb_runs_the_last_token_first(
    model: ElasticModel, cache: Cache, kernels: FaultyKernels, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its logits are known, but what it had left in the journal is gone."""
    monkeypatch.setattr(model, "runner", GraphRunner(model.runner.views, model.arch, kernels))  # type: ignore[arg-type]
    with model.sequence(cache=cache) as seq, model.sequence(cache=cache) as twin:
        for sequence in (seq, twin):
            sequence.append(PROMPT, "medium")
        kernels.arm(0)
        with pytest.raises(Injected):
            seq.append([1, 2], "small")
        assert seq.draft(4, "medium") == twin.draft(4, "medium")
        same([seq.verify("large")], [twin.verify("large")])


@pytest.mark.parametrize("mode", ["exact", "refresh", "own"])
@pytest.mark.parametrize("verb", [v for v in VERBS if v not in ("audit", "append, several chunks")])
def test_an_interrupt_at_any_line_finds_a_verb_done_or_not_begun(
    model: ElasticModel, cache: Cache, mode: str, verb: str
) -> None:
    call = VERBS[verb]
    before = undisturbed(model, mode, verb)
    with mixed(model, cache, mode, verb) as seq:
        with interrupting(*FILES) as counter:
            result = call(seq)
        for fork in result if verb == "fork" else ():
            fork.close()
        after = told(seq), held(seq)
    chance = random.Random(f"{verb} {mode}")
    lines = {*chance.sample(range(counter.lines), 3), counter.lines - 1, counter.lines - 2}
    for line in sorted(lines):
        with mixed(model, cache, mode, verb) as seq:
            with pytest.raises(KeyboardInterrupt), interrupting(*FILES, at=line):
                call(seq)
            if told(seq)[:4] == after[0][:4] != before[0][:4]:
                same(held(seq), after[1])
                assert verb != "fork"
            else:
                assert told(seq) == before[0]
                same(held(seq), before[1])
            assert cache.free_slots == cache.max_batch - 1


# ---- NaN ----


@pytest.mark.parametrize("mode", KINDS)
@pytest.mark.parametrize("verb", VERBS)
def test_a_kernel_that_gives_nan_is_an_error_and_leaves_no_trace(
    model: ElasticModel, cache: Cache, kernels: FaultyKernels, mode: str, verb: str
) -> None:
    with mixed(model, cache, mode, verb) as seq:
        kernels.record()
        result = VERBS[verb](seq)
        calls = sum(name in COMPUTING for name in kernels.calls)
        for fork in result if verb == "fork" else ():
            fork.close()
    if not calls:
        return
    expected = undisturbed(model, mode, verb)
    call = random.Random(f"{verb} {mode}").randrange(calls)
    with mixed(model, cache, mode, verb) as seq:
        kernels.arm(call, only=COMPUTING, nan=True)
        with pytest.raises(NumericalError, match="not finite"):
            VERBS[verb](seq)
        assert_untouched(seq, expected)


@pytest.mark.parametrize("verb", ["draft, the same slice", "verify", "append"])
def test_nan_of_a_failed_pass_does_not_reach_a_longer_row_of_the_next_batch(
    model: ElasticModel, cache: Cache, kernels: FaultyKernels, verb: str
) -> None:
    """A row is padded to the longest, with what its slot holds behind its own tokens."""
    short = model.sequence(cache=cache)
    short.append(PROMPT[:3], "large")
    short.draft(4, "small")
    kernels.arm(1, only=COMPUTING, nan=True)
    with pytest.raises(NumericalError):
        VERBS[verb](short)
    long = mixed(model, cache, "exact")
    alone = [row.fork()[0] for row in (short, long)]
    long.verify("small")
    alone[1].propose(long.drafted)
    alone[1].verify("small")
    both = Batch([short, long])
    short.commit(0)
    assert both.draft([2, 2], "small") == [row.draft(2, "small") for row in alone]
    same(both.verify("large"), [row.verify("large") for row in alone])


def test_a_slice_with_nan_weights_leaves_the_others_usable() -> None:
    source = parent("M*EM")
    source.model.embeddings.weight[:, 30] = torch.nan  # in the parent alone
    model = elastic(source)
    with model.sequence() as seq, model.sequence() as other:
        for sequence in (seq, other):
            sequence.append(PROMPT, "small")
            sequence.draft(3, "small")
        for broken in (
            lambda: seq.verify("large"),
            lambda: seq.append([1, 2], "large"),
            lambda: seq.draft(1, "large"),
            lambda: seq.refresh("large"),
            lambda: seq.audit("large"),
        ):
            with pytest.raises(NumericalError, match=r"'large' gave .* not finite"):
                broken()
            assert seq.tokens == PROMPT and len(seq.drafted) == 3
        assert seq.audit("small").ok
        for sequence in (seq, other):
            sequence.commit(2)
        same([seq.append([4], "small")], [other.append([4], "small")])
        assert seq.audit("small").ok


# ---- what is refused, before anything is written ----

# Verbs in a row; the last one does not fit.
LONG: dict[str, list[Callable[[Sequence], Any]]] = {
    "append": [lambda seq: seq.append([1] * 21, "large")],
    "append, one chunk": [
        lambda seq: seq.append([1] * 18, "large"),
        lambda seq: seq.append([1] * 3, "large"),
    ],
    "draft": [lambda seq: seq.draft(3, "small")],
    "propose": [lambda seq: seq.propose([1, 2, 3])],
    "draft past max_length": [
        lambda seq: seq.append([1] * 18, "large"),
        lambda seq: seq.draft(3, "small"),
    ],
    "propose past max_length": [
        lambda seq: seq.append([1] * 18, "large"),
        lambda seq: seq.propose([1, 2, 3]),
    ],
    "bonus": [
        lambda seq: seq.append([1] * 16, "large"),
        lambda seq: seq.draft(4, "small"),
        lambda seq: seq.commit(4, bonus=1),
    ],
}


@pytest.mark.parametrize("verb", LONG)
def test_more_than_fits_is_refused_and_nothing_is_written(
    model: ElasticModel, cache: Cache, verb: str
) -> None:
    """The sequence has 12 of 32 tokens and 4 of 6 drafts: 20 and 2 more fit."""
    with mixed(model, cache, "exact") as seq:
        *fits, too_long = LONG[verb]
        for call in fits:
            call(seq)
        bits, said = cache_bits(cache), told(seq)
        with pytest.raises(CapacityExceeded, match=r"max_length|max_draft"):
            too_long(seq)
        assert all(torch.equal(a, b) for a, b in zip(cache_bits(cache), bits, strict=True))
        assert told(seq) == said


def test_exactly_what_fits_is_accepted(model: ElasticModel, cache: Cache) -> None:
    with mixed(model, cache, "exact") as seq:
        seq.append([1] * 20, "large")
        assert seq.room == 0 and seq.draft(0, "small") == []
        assert seq.audit("large").ok
    with mixed(model, cache, "exact") as seq:
        seq.append([1] * 15, "large")
        seq.draft(4, "small")
        seq.verify("large")
        seq.commit(4, bonus=1)
        assert seq.room == 0 and seq.audit("large").ok


def test_one_row_too_long_refuses_the_whole_batch(model: ElasticModel, cache: Cache) -> None:
    rows = [mixed(model, cache, mode) for mode in KINDS]
    batch, bits = Batch(rows), cache_bits(cache)
    for verb in (
        lambda: batch.append([[1], [2] * 21, [3], [4]], "large"),
        lambda: batch.draft([1, 1, 1, 3], "small"),
        lambda: batch.propose([[], [], [1, 2, 3], []]),
        lambda: batch.commit([1, 5, 1, 1]),
        lambda: batch.rollback([3, 3, 13, 3]),
    ):
        with pytest.raises(SequenceError):
            verb()
        assert all(torch.equal(a, b) for a, b in zip(cache_bits(cache), bits, strict=True))
    with pytest.raises(CacheFull):
        batch.fork(1)  # one free slot, four forks
    assert cache.free_slots == 1


REFUSED: dict[str, tuple[Callable[[Sequence], Any], type[CascadeError], str]] = {
    "append nothing": (lambda s: s.append([], "large"), RequestError, "no token ids"),
    "append text": (lambda s: s.append("abc", "large"), RequestError, "'a' is not an integer"),  # type: ignore[arg-type]
    "append a number": (lambda s: s.append(5, "large"), RequestError, "must be a list"),  # type: ignore[arg-type]
    "append an unknown id": (lambda s: s.append([64], "large"), RequestError, r"64 .*\[0, 64\)"),
    "append a negative id": (lambda s: s.append([-1], "large"), RequestError, "-1"),
    "append a fraction": (lambda s: s.append([1.5], "large"), RequestError, "1.5"),  # type: ignore[list-item]
    "append a truth": (lambda s: s.append([True], "large"), RequestError, "True"),
    "append a matrix": (
        lambda s: s.append(torch.ones(1, 2, dtype=torch.long), "large"),
        RequestError,
        "1-D",
    ),
    "append floats": (lambda s: s.append(torch.ones(2), "large"), RequestError, "1.0"),
    "append, unknown slice": (lambda s: s.append([1], "larg"), SliceError, "did you mean 'large'"),
    "draft, unknown slice": (lambda s: s.draft(1, "tiny"), SliceError, "tiny"),
    "verify, unknown slice": (lambda s: s.verify("tiny"), SliceError, "tiny"),
    "refresh, unknown slice": (lambda s: s.refresh("tiny"), SliceError, "tiny"),
    "audit, unknown slice": (lambda s: s.audit("tiny"), SliceError, "tiny"),
    "no slice": (lambda s: s.verify(None), SliceError, "None"),  # type: ignore[arg-type]
    "draft fewer than none": (lambda s: s.draft(-1, "small"), RequestError, "-1"),
    "draft half an id": (lambda s: s.draft(0.5, "small"), RequestError, "0.5"),  # type: ignore[arg-type]
    "propose an unknown id": (lambda s: s.propose([1, 99]), RequestError, "99"),
    "commit fewer than none": (lambda s: s.commit(-1), SequenceError, "-1 ids: 4 are drafted"),
    "commit too many": (lambda s: s.commit(5), SequenceError, "5 ids: 4 are drafted"),
    "commit half an id": (lambda s: s.commit(0.5), RequestError, "0.5"),  # type: ignore[arg-type]
    "an unknown bonus": (lambda s: s.commit(1, bonus=64), RequestError, "64"),
    "bonus is a truth": (lambda s: s.commit(1, bonus=True), RequestError, "True"),
    "roll back below zero": (lambda s: s.rollback(-1), SequenceError, "-1"),
    "roll forward": (lambda s: s.rollback(13), SequenceError, "13.* has 12"),
    "roll back to text": (lambda s: s.rollback("3"), RequestError, "'3'"),  # type: ignore[arg-type]
    "fork into none": (lambda s: s.fork(0), RequestError, "0"),
    "fork into text": (lambda s: s.fork("2"), RequestError, "'2'"),  # type: ignore[arg-type]
    "fork into too many": (lambda s: s.fork(5), CacheFull, "all 5 slots"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_call_without_meaning_is_refused_with_the_reason(
    model: ElasticModel, cache: Cache, case: str
) -> None:
    call, error, message = REFUSED[case]
    with mixed(model, cache, "exact") as seq:
        bits, said = cache_bits(cache), told(seq)
        with pytest.raises(error, match=message):
            call(seq)
        assert told(seq) == said
        mine = [part for part in cache_bits(cache) if part.dim() > 2]
        assert all(
            torch.equal(a[:, seq.slot.index], b[:, seq.slot.index])
            for a, b in zip(mine, [part for part in bits if part.dim() > 2], strict=True)
        )
        assert cache.free_slots == 4


def test_verifying_what_is_not_drafted_or_twice_is_refused(
    model: ElasticModel, cache: Cache
) -> None:
    with model.sequence(cache=cache) as seq:
        seq.append(PROMPT, "large")
        with pytest.raises(SequenceError, match="nothing to verify"):
            seq.verify("large")
        seq.draft(2, "small")
        table = seq.verify("large")
        with pytest.raises(SequenceError, match=r"'large' has verified .* already"):
            seq.verify("large")
        same(seq.rows, list(table))
        assert seq.verify("medium").shape == (3, 64)  # by another slice: a second opinion
        same([seq.verify("large")], [table])
        seq.draft(1, "large")
        assert seq.verify("large").shape == (4, 64)
        seq.commit(3)
        with pytest.raises(SequenceError, match="nothing to verify"):
            seq.verify("large")


@pytest.mark.parametrize(
    "verb",
    [
        lambda seq: seq.draft(1, "small"),
        lambda seq: seq.propose([1]),
        lambda seq: seq.commit(0, bonus=1),
    ],
)
def test_an_empty_sequence_has_nothing_to_continue(
    model: ElasticModel, cache: Cache, verb: Callable[[Sequence], Any]
) -> None:
    with model.sequence(cache=cache) as seq:
        for _ in range(2):
            with pytest.raises(SequenceError, match="append a prompt"):
                verb(seq)
            seq.commit(0)
            assert seq.refresh("large") == 0 and seq.audit("large").ok
            seq.append(PROMPT, "large")
            seq.rollback(0)


@pytest.mark.parametrize("verb", VERBS)
def test_a_closed_sequence_refuses_every_verb(model: ElasticModel, cache: Cache, verb: str) -> None:
    seq = mixed(model, cache, "exact")
    seq.close()
    seq.close()  # allowed
    with pytest.raises(SequenceClosed, match="was closed"):
        VERBS[verb](seq)
    with pytest.raises(SequenceClosed):
        _ = seq.provenance
    assert cache.free_slots == cache.max_batch


def test_a_batch_refuses_rows_that_do_not_belong_together(
    model: ElasticModel, cache: Cache
) -> None:
    other = elastic(parent("M"))
    elsewhere = model.cache(max_batch=1, max_length=8, max_draft=1)
    a, b = model.sequence(cache=cache), model.sequence(cache=cache)
    with pytest.raises(RequestError, match="at least one"):
        Batch([])
    with pytest.raises(SequenceError, match="twice"):
        Batch([a, b, a])
    with pytest.raises(SequenceError, match="models"), other.sequence() as c:
        Batch([a, c])
    with pytest.raises(SequenceError, match="caches"), model.sequence(cache=elsewhere) as d:
        Batch([a, d])
    batch = Batch([a, b])
    for verb in (
        lambda: batch.append([[1]], "large"),
        lambda: batch.draft([1], "large"),
        lambda: batch.draft([1, 1], "large", [None]),
        lambda: batch.propose([[1], [1], [1]]),
        lambda: batch.commit([0, 0], [None]),
        lambda: batch.commit(0),  # type: ignore[arg-type]
        lambda: batch.rollback([0]),
    ):
        with pytest.raises(RequestError, match="2 rows"):
            verb()
    a.close()
    with pytest.raises(SequenceClosed):
        batch.append([[1], [1]], "large")


def test_an_empty_row_refuses_the_batch_that_verifies(model: ElasticModel, cache: Cache) -> None:
    a, b = model.sequence(cache=cache), model.sequence(cache=cache)
    a.append([1], "large")
    a.draft(1, "small")
    with pytest.raises(SequenceError, match="append a prompt"):
        Batch([a, b]).verify("large")
