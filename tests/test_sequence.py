"""What `Sequence` promises to people who write their own loop, verb by verb."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from cascade import passes
from cascade.architecture import Architecture
from cascade.batch import Batch
from cascade.cache import Cache
from cascade.errors import CacheFull, RequestError, SequenceClosed, SequenceError
from cascade.kernels import reference
from cascade.model import ElasticModel
from cascade.sampling import SamplingParams
from cascade.sequence import MODES, Consistency, Sequence
from cascade.shapes import SHAPES
from tests.faults import cache_bits
from tests.nested import Replay, elastic, parent, prefix, reference_logits

PROMPT = [5, 9, 2, 33, 60, 1, 17, 17, 40, 8]
VOCABULARY = 64
TOLERANCE = 1e-4
BF16_TOLERANCE = 2e-2


@pytest.fixture(scope="module")
def model() -> ElasticModel:
    return elastic(parent("M*E*M"))


@pytest.fixture
def cache(model: ElasticModel) -> Cache:
    return model.cache(max_batch=4, max_length=64, max_draft=8)


@pytest.fixture
def seq(model: ElasticModel, cache: Cache) -> Iterator[Sequence]:
    with model.sequence(cache=cache) as sequence:
        yield sequence


def same(mine: Any, its: Any) -> None:
    torch.testing.assert_close(mine, its, atol=1e-4, rtol=1e-4)


def replayed(seq: Sequence, writers: list[str]) -> Replay:
    return Replay(seq.model, seq.tokens, writers)


def replay_logits(model: ElasticModel, tokens: list[int], slice: str) -> Tensor:
    """Logits [V] of a slice that has run all of the tokens itself."""
    with Replay(model, tokens, [slice] * len(tokens)) as replay:
        return replay.logits


def tokens_run(seq: Sequence) -> int:
    """Tokens of all passes so far."""
    return sum(tokens * count for (_, tokens), count in seq.meter.passes.items())


# ---- shapes, dtypes, what is accepted ----


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_verbs_return_what_the_contract_says(dtype: torch.dtype) -> None:
    model = elastic(parent("M*E*M").to(dtype))  # type: ignore[arg-type]
    with model.sequence() as seq:
        assert (seq.tokens, seq.length, seq.provenance) == ([], 0, [])
        logits = seq.append(PROMPT, "large")
        assert logits.shape == (VOCABULARY,) and logits.dtype == torch.float32
        ids = seq.draft(5, "small")
        assert len(ids) == 5 and all(type(i) is int and 0 <= i < VOCABULARY for i in ids)
        assert (seq.tokens, seq.length, seq.drafted) == (PROMPT, 10, ids)
        table = seq.verify("large")
        assert table.shape == (6, VOCABULARY) and table.dtype == torch.float32
        seq.commit(3)
        assert (seq.tokens, seq.length, seq.drafted) == (PROMPT + ids[:3], 13, [])
        seq.rollback(11)
        assert (seq.tokens, seq.length) == (PROMPT + ids[:1], 11)
        forks = seq.fork(2)
        assert [fork.tokens for fork in forks] == [seq.tokens] * 2
        assert seq.refresh("small") == 10
        assert seq.audit("small").slice == "small"
        assert repr(seq) == "Sequence(11 tokens, 0 drafted, exact)"


@pytest.mark.parametrize(
    "given",
    [
        tuple(PROMPT),
        torch.tensor(PROMPT),
        torch.tensor(PROMPT, dtype=torch.int32),
        torch.tensor(PROMPT * 2)[:10],
    ],
)
def test_ids_are_lists_or_1d_tensors(seq: Sequence, given: Any) -> None:
    same(seq.append(given, "large"), replay_logits(seq.model, PROMPT, "large"))
    seq.propose(given[:3])
    assert seq.tokens == PROMPT and seq.drafted == PROMPT[:3]
    assert all(type(i) is int for i in seq.tokens + seq.drafted)


def test_tokens_of_the_sequence_are_copies(seq: Sequence) -> None:
    given = list(PROMPT)
    logits = seq.append(given, "large")
    twin = seq.fork()[0]
    given.append(1)
    logits.fill_(0)  # what is returned may be written
    for known in (seq.tokens, seq.drafted, seq.rows, seq.proposals, seq.provenance):
        known.clear()
    assert seq.tokens == PROMPT
    assert seq.draft(3, "large") == twin.draft(3, "large")
    seq.verify("large").zero_()
    seq.commit(1)
    twin.commit(1)
    assert seq.draft(2, "large") == twin.draft(2, "large")


# ---- opening and closing ----


def test_the_context_manager_frees_the_slot(model: ElasticModel, cache: Cache) -> None:
    with model.sequence(cache=cache) as seq:
        assert cache.free_slots == 3
        seq.append(PROMPT, "large")
    assert cache.free_slots == 4
    with pytest.raises(ZeroDivisionError), model.sequence(cache=cache):
        _ = 1 / 0
    assert cache.free_slots == 4
    seq.close()
    assert cache.free_slots == 4
    with pytest.raises(SequenceClosed, match=r"open a new one with model.sequence\(\)"):
        seq.append(PROMPT, "large")
    assert repr(seq) == "Sequence(closed, 0 drafted, exact)"


def test_a_freed_slot_remembers_nothing(model: ElasticModel) -> None:
    cache = model.cache(max_batch=1, max_length=32, max_draft=8)
    with model.sequence(cache=cache, consistency="shared") as seq:
        seq.append([63] * 20, "small")
        seq.draft(8, "small")
    with model.sequence(cache=cache) as seq:
        same(seq.append(PROMPT, "large"), replay_logits(model, PROMPT, "large"))
        assert seq.provenance == ["large"] * 10 and seq.audit("large").ok


def test_one_sequence_too_many_is_a_clear_error(model: ElasticModel, cache: Cache) -> None:
    rows = [model.sequence(cache=cache) for _ in range(4)]
    with pytest.raises(CacheFull, match=r"all 4 slots .* close a sequence"):
        model.sequence(cache=cache)
    rows[1].close()
    with model.sequence(cache=cache) as seq:
        seq.append(PROMPT, "large")
        with pytest.raises(CacheFull, match="all 4 slots"):
            seq.fork()
        assert seq.audit("large").ok


def test_a_cache_refuses_sizes_and_modes_without_meaning(model: ElasticModel) -> None:
    for sizes in ({"max_batch": 0}, {"max_length": -1}, {"max_draft": 0}, {"max_batch": 1.5}):
        with pytest.raises(RequestError, match=f"{next(iter(sizes))}="):
            model.cache(**sizes)
    with pytest.raises(RequestError, match=r"unknown consistency mode 'exakt'; did you mean"):
        model.sequence(consistency="exakt")  # type: ignore[arg-type]
    with pytest.raises(SequenceError, match="another model"):
        model.sequence(cache=elastic(parent("M")).cache(max_batch=1, max_length=8))


def test_a_cache_opened_in_inference_mode_is_usable_outside() -> None:
    source = parent("M*E")
    source.requires_grad_(True)  # and weights that want gradients get none
    model = elastic(source)
    with torch.inference_mode():
        inside = model.sequence()
        inside.append(PROMPT, "large")
    with model.sequence() as seq:
        for sequence in (inside, seq):
            sequence.append(PROMPT, "small")
            sequence.draft(2, "small")
            assert not sequence.verify("large").requires_grad
            sequence.commit(2, bonus=3)
        assert not any(part.requires_grad for part in cache_bits(seq.cache))


# ---- draft ----


def test_a_greedy_draft_is_what_the_slice_alone_would_say(model: ElasticModel) -> None:
    with model.sequence() as seq:
        seq.append(PROMPT, "small")
        ids = seq.draft(6, "small")
        ids += seq.draft(2, "small")
        assert ids == seq.drafted
        expected = list(PROMPT)
        for _ in range(8):
            expected.append(int(replay_logits(model, expected, "small").argmax()))
        assert PROMPT + ids == expected


def test_a_draft_ends_with_the_first_id_of_until(seq: Sequence) -> None:
    seq.append(PROMPT, "large")
    ids = seq.draft(6, "small")
    seq.commit(0)
    assert seq.draft(6, "small", until=[ids[3]]) == ids[: ids.index(ids[3]) + 1]


def test_proposals_are_the_distributions_that_were_drawn_from(seq: Sequence) -> None:
    params = SamplingParams(temperature=1.5, top_k=5, seed=7)
    logits = seq.append(PROMPT, "small")
    ids = seq.draft(4, "small", params)
    assert all(float(q[i]) > 0 for q, i in zip(seq.proposals, ids, strict=True))
    assert [int((q > 0).sum()) for q in seq.proposals] == [5] * 4
    expected = (logits / 1.5).softmax(0) * (logits >= logits.topk(5).values[-1])
    same(seq.proposals[0], expected / expected.sum())
    seq.commit(0)
    assert seq.draft(4, "small", params) == ids


# ---- verify ----


def test_verify_is_the_verifier_alone_row_by_row(model: ElasticModel, seq: Sequence) -> None:
    seq.append(PROMPT, "large")
    ids = seq.draft(5, "small")
    table = seq.verify("large")
    for i in range(6):
        same(table[i], replay_logits(model, PROMPT + ids[:i], "large"))
    assert len(seq.rows) == 6


def test_verifying_an_own_draft_runs_the_last_id_alone(seq: Sequence) -> None:
    seq.append(PROMPT, "large")
    twin = seq.fork()[0]
    ids = seq.draft(5, "large")
    twin.propose(ids)
    before = tokens_run(seq)
    same(seq.verify("large"), twin.verify("large"))
    assert tokens_run(seq) - before == 1


def test_several_slices_may_verify_the_same_ids(model: ElasticModel, seq: Sequence) -> None:
    seq.append(PROMPT, "large")
    ids = seq.draft(3, "small")
    for slice in ("medium", "large", "medium"):
        same(seq.verify(slice)[3], replay_logits(model, PROMPT + ids, slice))
    seq.commit(2)
    assert seq.provenance == ["medium"] * 12 and seq.audit("medium").ok


# ---- propose ----


def test_proposed_ids_are_as_drafted_ones(model: ElasticModel, cache: Cache) -> None:
    a, b = model.sequence(cache=cache), model.sequence(cache=cache)
    for sequence in (a, b):
        sequence.append(PROMPT, "large")
    ids = a.draft(4, "small")
    b.propose(ids)
    assert b.drafted == ids and b.tokens == PROMPT
    same(a.verify("large"), b.verify("large"))
    for sequence in (a, b):
        sequence.commit(3)
        assert sequence.provenance == ["large"] * 13 and sequence.audit("large").ok
    same(a.append([1], "small"), b.append([1], "small"))


def test_ids_may_be_proposed_behind_drafts_and_drafted_behind_proposals(
    model: ElasticModel, seq: Sequence
) -> None:
    seq.append(PROMPT, "large")
    seq.propose([])
    assert seq.drafted == []
    ids = seq.draft(2, "small")
    seq.propose([7, 8])
    ids += [7, 8, *seq.draft(1, "small")]
    assert seq.drafted == ids
    expected = int(replay_logits_over(model, PROMPT, ids[:4]).argmax())
    assert ids[4] == expected
    assert [int(q.argmax()) for q in seq.proposals] == ids
    assert all(float(q.sum()) == 1 for q in seq.proposals)
    same(seq.verify("large")[5], replay_logits(model, PROMPT + ids, "large"))
    seq.commit(5)
    assert seq.audit("large").ok


def replay_logits_over(model: ElasticModel, prompt: list[int], ids: list[int]) -> Tensor:
    """Logits after ids run by `small` over a prompt that `large` wrote."""
    writers = ["large"] * (len(prompt) - 1) + ["small"] * (len(ids) + 1)
    with Replay(model, prompt + ids, writers) as replay:
        return replay.logits


@pytest.mark.parametrize("mode", MODES)
def test_proposed_ids_committed_unverified_are_of_the_slice_that_ran_last(
    model: ElasticModel, cache: Cache, mode: Consistency
) -> None:
    with model.sequence(cache=cache, consistency=mode) as seq:
        seq.append(PROMPT, "large")
        seq.draft(2, "small")
        seq.propose([7, 8, 9])
        seq.commit(4)
        assert seq.tokens[-2:] == [7, 8]
        assert seq.provenance == ["large"] * 9 + ["small"] * 5
        with replayed(seq, seq.provenance) as replay:
            assert replay.deviation(seq) <= TOLERANCE


# ---- commit ----


@pytest.mark.parametrize("bonus", [None, 11])
@pytest.mark.parametrize("n", range(5))
def test_a_commit_is_what_the_verifier_alone_would_hold(
    model: ElasticModel, seq: Sequence, n: int, bonus: int | None
) -> None:
    seq.append(PROMPT, "large")
    ids = seq.draft(4, "small")
    seq.verify("large")
    seq.commit(n, bonus)
    expected = PROMPT + ids[:n] + ([] if bonus is None else [bonus])
    assert seq.tokens == expected and seq.drafted == []
    assert seq.provenance == ["large"] * len(expected)
    report = seq.audit("large")
    assert report.tokens == len(expected) - 1 and report.max_relative_error <= TOLERANCE
    # The token after it: nothing of a rejected draft is left in the journal.
    twin = seq.fork()[0]
    assert seq.draft(1, "large") == [int(replay_logits(model, expected, "large").argmax())]
    same(twin.append([3], "small"), replay_logits(model, [*expected, 3], "small"))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("n", [0, 2, 4])
def test_a_bonus_is_as_appending_it(
    model: ElasticModel, cache: Cache, mode: Consistency, n: int
) -> None:
    a = model.sequence(cache=cache, consistency=mode)
    a.append(PROMPT, "medium")
    b = a.fork()[0]
    for sequence in (a, b):
        sequence.draft(4, "small")
        sequence.verify("large")
    a.commit(n, bonus=11)
    b.commit(n)
    b.append([11], "large")
    assert a.tokens == b.tokens and a.provenance == b.provenance
    writers = ["large" if mode == "exact" else "medium"] * 9 + ["large"] * (n + 2)
    for sequence in (a, b):
        assert sequence.provenance == writers
        with replayed(sequence, writers) as replay:
            assert replay.deviation(sequence) <= TOLERANCE
    assert a.draft(3, "small") == b.draft(3, "small")
    same(a.verify("large"), b.verify("large"))


def test_a_bonus_needs_neither_drafts_nor_a_verifier(model: ElasticModel, seq: Sequence) -> None:
    """A loop that samples outside: append, then one bonus after the other."""
    logits = seq.append(PROMPT, "medium")
    expected = list(PROMPT)
    for _ in range(4):
        token = int(logits.argmax())
        expected.append(token)
        seq.commit(0, bonus=token)
        logits = replay_logits(model, expected, "medium")
    assert seq.tokens == expected and seq.audit("medium").ok
    assert seq.provenance == ["medium"] * 14
    seq.draft(3, "medium")
    seq.commit(3, bonus=5)  # drafted, not verified: the last draft is run now
    assert seq.audit("medium").ok and seq.length == 18


def test_a_greedy_speculative_loop_writes_what_the_verifier_alone_writes() -> None:
    source = parent("MEM*EME*-")
    model = elastic(source)
    alone = prefix(source, 32, 16)
    expected = list(PROMPT)
    for _ in range(30):
        expected.append(int(reference_logits(alone, expected)[-1].argmax()))
    accepted: list[int] = []
    with model.sequence() as seq:
        seq.append(PROMPT, "large")
        while seq.length < 40:
            ids = seq.draft(1 + len(accepted) % 4, "medium")
            best = seq.verify("large").argmax(1).tolist()
            n = next((i for i, token in enumerate(ids) if token != best[i]), len(ids))
            seq.commit(n, bonus=best[n])
            accepted.append(n)
        assert seq.tokens[:40] == expected[:40]
        assert seq.audit("large").ok and set(seq.provenance) == {"large"}
    assert 0 in accepted


# ---- rollback ----


@pytest.mark.parametrize("mode", MODES)
def test_rollback_to_any_earlier_length(
    model: ElasticModel, cache: Cache, mode: Consistency, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(passes, "SNAPSHOT_INTERVAL", 4)
    with model.sequence(cache=cache, consistency=mode) as seq:
        seq.append(PROMPT, "large")
        seq.draft(4, "small")
        seq.commit(3)
        seq.draft(4, "medium")
        seq.commit(4)
        writers, tokens = seq.provenance, seq.tokens
        assert writers == ["large"] * 9 + ["small"] * 3 + ["medium"] * 5
        for length in range(18):
            fork = seq.fork()[0]
            fork.draft(2, "small")
            fork.rollback(length)
            assert fork.tokens == tokens[:length] and fork.drafted == []
            assert fork.provenance == writers[:length]
            if length:
                with replayed(fork, writers[:length]) as replay:
                    assert replay.deviation(fork) <= TOLERANCE
            same(fork.append([3, 4], "large"), expected_after(fork, writers[:length]))
            fork.close()
        assert seq.provenance == writers


def expected_after(seq: Sequence, writers: list[str]) -> Tensor:
    """Logits of `large` after a sequence whose last 2 tokens it appended."""
    writers = ["large"] * len(writers) if seq.consistency == "exact" else writers
    with replayed(seq, [*writers[:-1], *["large"] * (seq.length - max(len(writers) - 1, 0))]) as r:
        return r.logits


# ---- fork ----


def mine(seq: Sequence) -> list[Tensor]:
    """Bit by bit, what is committed in a sequence's slot, and its stored state."""
    slot, end = seq.slot, max(seq.length - 1, 0)
    cache, row = seq.cache, seq.slot.index
    parts = [cache.keys[:, row, :end], cache.values[:, row, :end], cache.provenance[row, :end]]
    parts += [cache.window[:, row], cache.state[:, row]]
    if slot.snapshot is not None:
        parts += [slot.snapshot.window, slot.snapshot.state]
    return [part.clone() for part in parts]


@pytest.mark.parametrize("mode", MODES)
def test_a_fork_shares_nothing_writable_with_its_parent(
    model: ElasticModel, cache: Cache, mode: Consistency, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(passes, "SNAPSHOT_INTERVAL", 4)

    def work(sequence: Sequence, seed: int) -> None:
        sequence.append([seed, 3], "small")
        sequence.draft(4, "medium")
        sequence.verify("large")
        sequence.commit(2, bonus=seed)
        sequence.refresh("medium")
        sequence.rollback(6)
        sequence.append([seed] * 12, "large")

    with model.sequence(cache=cache, consistency=mode) as seq:
        seq.append(PROMPT, "large")
        seq.draft(3, "small")
        drafted = seq.drafted
        forks = seq.fork(2)
        assert [fork.drafted for fork in forks] == [[], []] and seq.drafted == drafted
        family = [seq, *forks]
        for number, member in enumerate(family):
            others = [other for other in family if other is not member]
            bits = [mine(other) for other in others]
            logits = [[row.clone() for row in other.rows] for other in others]
            work(member, number)
            for other, before, known in zip(others, bits, logits, strict=True):
                assert all(torch.equal(a, b) for a, b in zip(mine(other), before, strict=True))
                assert all(torch.equal(a, b) for a, b in zip(other.rows, known, strict=True))
        for member in family:
            with replayed(member, member.provenance) as replay:
                assert replay.deviation(member) <= TOLERANCE
        before = mine(forks[1])
        forks[0].close()
        model.sequence(cache=cache).append([1], "large")  # in the slot of the closed one
        assert all(torch.equal(a, b) for a, b in zip(mine(forks[1]), before, strict=True))


def test_a_fork_goes_on_where_its_parent_stands(model: ElasticModel, seq: Sequence) -> None:
    seq.append(PROMPT, "large")
    ids = seq.draft(4, "small")
    seq.verify("large")
    seq.commit(2)
    (fork,) = seq.fork()
    assert fork.consistency == "exact" and fork.provenance == seq.provenance
    assert fork.draft(3, "large") == seq.draft(3, "large")
    assert fork.tokens == PROMPT + ids[:2]
    (empty,) = model.sequence(cache=seq.cache).fork()
    same(empty.append([1], "large"), replay_logits(model, [1], "large"))


# ---- provenance, and what the modes promise ----


def test_exact_verification_is_repair_and_costs_no_pass_of_its_own(seq: Sequence) -> None:
    seq.append(PROMPT, "large")
    before = tokens_run(seq)
    for _ in range(3):
        seq.draft(4, "small")
        seq.verify("large")
        seq.commit(3)
        assert seq.exact_length("large") == seq.length - 1
        assert set(seq.provenance) == {"large"}
    # Both slices run the last token and the drafts; the draft slice not the last of these.
    assert tokens_run(seq) - before == 3 * (4 + 5)


def test_exact_repairs_a_prefix_of_another_slice_before_it_verifies(
    model: ElasticModel, seq: Sequence
) -> None:
    seq.append(PROMPT, "small")
    assert seq.provenance == ["small"] * 10 and seq.exact_length("large") == 0
    ids = seq.draft(3, "small")
    same(seq.verify("large")[3], replay_logits(model, PROMPT + ids, "large"))
    seq.commit(3)
    assert seq.provenance == ["large"] * 13 and seq.audit("large").ok
    same(seq.append([3], "medium"), replay_logits(model, [*seq.tokens[:13], 3], "medium"))
    assert seq.provenance == ["medium"] * 14


def test_spans_committed_unverified_are_remembered_and_repaired_in_one_chunk(
    model: ElasticModel, seq: Sequence
) -> None:
    seq.append(PROMPT, "large")
    for drafter, count in (("small", 3), ("medium", 2), ("small", 4)):
        seq.draft(count, drafter)
        seq.commit(count)
    written = ["large"] * 9 + ["small"] * 3 + ["medium"] * 2 + ["small"] * 5
    assert seq.provenance == written and seq.exact_length("large") == 9
    before = Counter(seq.meter.passes)
    ids = seq.draft(2, "small")
    same(seq.verify("large")[2], replay_logits(model, seq.tokens + ids, "large"))
    large = model.slice_index("large")
    passes = {n: k for (by, n), k in (seq.meter.passes - before).items() if by == large}
    assert passes == {18 - 9: 1, 1 + 2: 1}  # all three spans, then the last token and the drafts
    seq.commit(2)
    assert seq.provenance == ["large"] * 21 and seq.audit("large").ok
    seq.draft(2, "small")
    before = Counter(seq.meter.passes)
    seq.verify("large")
    assert sum((seq.meter.passes - before).values()) == 1  # nothing is left to repair


def test_shared_leaves_positions_as_their_writer_left_them(
    model: ElasticModel, cache: Cache
) -> None:
    with model.sequence(cache=cache, consistency="shared") as seq:
        seq.append(PROMPT, "large")
        keys = cache.keys[:, seq.slot.index, :9].clone()
        before = tokens_run(seq)
        seq.append([1, 2], "small")
        seq.append([3], "medium")
        assert tokens_run(seq) - before == 3 + 2  # the last token again, and no more
        assert torch.equal(cache.keys[:, seq.slot.index, :9], keys)
        assert seq.provenance == ["large"] * 9 + ["small"] * 2 + ["medium"] * 2
        assert seq.slot.snapshot is None
        assert not seq.audit("large").ok
        assert seq.refresh("large") == 12  # nothing was kept to restart from
        assert seq.audit("large").ok and seq.refresh("large") == 0


def test_refresh_re_runs_what_is_stale_and_no_more(model: ElasticModel, cache: Cache) -> None:
    with model.sequence(cache=cache, consistency="refresh") as seq:
        seq.append(PROMPT, "large")
        seq.append([1, 2, 3], "small")
        seq.append([4], "medium")
        assert seq.provenance == ["large"] * 9 + ["small"] * 3 + ["medium"] * 2
        assert seq.exact_length("large") == 9
        seq.draft(2, "small")
        before = tokens_run(seq)
        assert seq.refresh("large") == 4 == tokens_run(seq) - before
        assert seq.drafted == [] and seq.provenance == ["large"] * 14
        assert seq.audit("large").ok and seq.refresh("large") == 0
        assert seq.refresh("small") == 13 and seq.audit("small").ok


@pytest.mark.parametrize("last", [1, 2, 5])
def test_a_refresh_of_the_last_tokens_leaves_everything_before_them(
    model: ElasticModel, cache: Cache, last: int
) -> None:
    with (
        model.sequence(cache=cache, consistency="shared") as seq,
        model.sequence(cache=cache, consistency="shared") as other,
    ):
        seq.append(PROMPT, "small")
        row, kept = seq.slot.index, len(PROMPT) - 1 - last
        earlier = cache.keys[:, row, :kept].clone()
        assert seq.refresh("large", last=last) == last
        assert seq.provenance == ["small"] * kept + ["large"] * (last + 1)
        assert torch.allclose(cache.keys[:, row, :kept], earlier, atol=1e-6)
        # The rest is what the large slice writes behind tokens of the small one.
        other.append(PROMPT[: kept + 1], "small")
        other.append(PROMPT[kept + 1 :], "large")
        end = len(PROMPT) - 1  # the last token enters with the next pass
        for part in (cache.keys[:, :, :end], cache.values[:, :, :end], cache.state, cache.window):
            difference = part[:, row] - part[:, other.slot.index]
            assert float(difference.abs().max()) < 1e-5
        assert not seq.audit("large").ok
        assert seq.refresh("large", last=50) == len(PROMPT) - 1 and seq.audit("large").ok


@pytest.mark.parametrize("last", [0, -1, True, 2.0])
def test_a_refresh_of_no_tokens_is_refused(seq: Sequence, last: Any) -> None:
    seq.append(PROMPT, "small")
    with pytest.raises(RequestError, match="at least 1"):
        seq.refresh("large", last=last)


def test_provenance_names_a_slice_given_by_its_widths(seq: Sequence) -> None:
    seq.append(PROMPT, "24x16")
    seq.draft(1, "large")
    seq.commit(1)
    assert seq.provenance == ["24x16"] * 9 + ["large"] * 2


# ---- audit ----


def test_audit_finds_the_first_bad_position(model: ElasticModel, seq: Sequence) -> None:
    seq.append(PROMPT, "large")
    clean = seq.audit("large")
    assert clean.ok and clean.first_bad_position is None and clean.tokens == 9
    assert [(d.layer, d.part) for d in clean.by_layer] == [
        *[(0, "conv"), (0, "ssm"), (1, "key"), (1, "value")],
        *[(3, "key"), (3, "value"), (4, "conv"), (4, "ssm")],
    ]
    bits, cache, row = cache_bits(seq.cache), seq.cache, seq.slot.index
    for place, at, layer, part in (
        (cache.keys[1, row, 6], 6, 3, "key"),
        (cache.values[0, row, 2], 2, 1, "value"),
        (cache.state[1, row], 8, 4, "ssm"),
        (cache.window[0, row], 8, 0, "conv"),
    ):
        whole = place.clone()
        place[..., 0] += 0.5
        report = seq.audit("large")
        assert not report.ok and report.first_bad_position == at
        worst = max(report.by_layer, key=lambda d: d.relative)
        assert (worst.layer, worst.part) == (layer, part)
        assert report.max_relative_error == worst.relative > 1e-3
        assert seq.audit("large", tolerance=1e4).ok
        place[..., 0] = torch.nan
        assert seq.audit("large", tolerance=1e4).first_bad_position == at
        place.copy_(whole)
    assert all(torch.equal(a, b) for a, b in zip(cache_bits(seq.cache), bits, strict=True))
    assert not seq.audit("small").ok


def test_two_caches_are_compared_without_moving_them(model: ElasticModel) -> None:
    cache = model.cache(max_batch=3, max_length=160)
    with model.sequence(cache=cache) as seq:
        seq.append(PROMPT * 15, "large")
        (fork,) = seq.fork()
        known = seq.digest()
        assert known == fork.digest() and known.differences(fork.digest()) == []
        assert known.tokens == 149 and [layer for layer, _ in known.attention] == [1, 3]
        assert [len(blocks) for _, blocks in known.attention] == [3, 3]
        seq.draft(4, "small")  # what is not committed does not count
        seq.verify("large")
        assert seq.digest() == known
        row = fork.slot.index
        for place, found in (
            (cache.keys[1, row, 70, 0, :1], [(3, 64)]),
            (cache.values[0, row, 148, 1, :1], [(1, 128)]),
            (cache.window[0, row, 0, :1], [(0, None)]),
            (cache.state[1, row, 0, 0, :1], [(4, None)]),
            (cache.keys[1, row, 149, 0, :1], []),
        ):
            before = place.clone()
            place += 1
            assert known.differences(fork.digest()) == found
            place.copy_(before)
        seq.commit(4)
        assert (1, 128) in known.differences(seq.digest())
        other = model.sequence(cache=cache)
        other.append(PROMPT * 3, "large")
        assert (3, 128) in known.differences(other.digest())


def test_bf16_stays_within_its_stated_tolerance() -> None:
    model = elastic(parent("MEM*EME*-").to(torch.bfloat16))  # type: ignore[arg-type]
    with model.sequence() as seq:
        seq.append(PROMPT * 4, "large")
        for n in (8, 0, 3, 5, 1) * 4:
            seq.draft(8, "small")
            seq.verify("large")
            seq.commit(n, bonus=n)
        assert seq.audit("large", tolerance=BF16_TOLERANCE).ok
        assert not seq.audit("small", tolerance=10 * BF16_TOLERANCE).ok


# ---- the same for rows of a batch ----


def test_ragged_rows_of_a_batch_are_as_each_row_alone(model: ElasticModel) -> None:
    cache = model.cache(max_batch=8, max_length=64, max_draft=8)
    prompts = [PROMPT, PROMPT[:1], PROMPT[:4]]
    rows = [model.sequence(cache=cache) for _ in prompts]
    alone = [model.sequence(cache=cache) for _ in prompts]
    batch = Batch(rows)

    def each(verb: str, *columns: list[Any], **kw: Any) -> list[Any]:
        arguments = zip(*columns, strict=True)
        return [getattr(s, verb)(*a, **kw) for s, a in zip(alone, arguments, strict=True)]

    def agree() -> None:
        for row, single in zip(rows, alone, strict=True):
            assert row.tokens == single.tokens and row.drafted == single.drafted
            assert row.provenance == single.provenance
            with replayed(row, row.provenance) as replay:
                assert max(replay.deviation(row), replay.deviation(single)) <= TOLERANCE

    same(batch.append(prompts, "medium"), each("append", prompts, ["medium"] * 3))
    k = [0, 5, 3]
    assert batch.draft(k, "small") == each("draft", k, ["small"] * 3)
    more: list[Any] = [[], [7], torch.tensor([8, 9])]
    batch.propose(more)
    each("propose", more)
    alone[0].propose([7])  # a row alone may not verify nothing
    tables = batch.verify("large")
    same(tables[1:], [single.verify("large") for single in alone][1:])
    assert [len(table) for table in tables] == [1, 7, 6]
    same(tables[0][0], alone[0].rows[0])
    alone[0].commit(0, bonus=5)
    alone[1].commit(0)
    alone[2].commit(5, bonus=6)
    batch.commit([0, 0, 5], [5, None, 6])
    agree()
    same(
        batch.append([[1], [2, 3], [4]], "large"), each("append", [[1], [2, 3], [4]], ["large"] * 3)
    )
    agree()
    batch.rollback([4, 3, 9])
    each("rollback", [4, 3, 9])
    agree()
    assert batch.refresh("small") == each("refresh", ["small"] * 3) == [3, 2, 8]
    agree()
    rows[0].close()
    alone[0].close()
    forks = Batch(rows[1:]).fork(2)
    assert [[f.tokens for f in of] for of in forks] == [[r.tokens] * 2 for r in rows[1:]]


# ---- memory ----


def test_sixteen_drafted_tokens_of_the_30b_take_less_than_80_mib() -> None:
    """Beyond windows and states: journal, K and V of the drafts, a stored state, logits, proposals.

    Computed: tensors without storage.
    """
    from transformers import NemotronHConfig

    arch = Architecture.from_config(NemotronHConfig(**SHAPES["30b"]["config"]))
    drafted, length, dtype = 16, 512, torch.bfloat16

    def cache(max_draft: int) -> Cache:
        device = torch.device("meta")
        decay = torch.empty(arch.num_mamba, arch.heads, device=device)
        return Cache(arch, decay, 1, length, max_draft, device, dtype, torch.float32, reference)

    one = cache(drafted)
    journal = sum(part.nbytes for part in one.journal.tensors())
    assert journal == arch.journal_bytes(drafted + 1, dtype) < 10 * 2**20
    assert one.nbytes - cache(drafted - 1).nbytes == arch.journal_bytes(1, dtype)
    rest = one.nbytes - journal - length * (arch.bytes_per_token(dtype) + 1)
    assert rest == arch.state_bytes() + arch.window_bytes(dtype)
    assert arch.state_bytes() == 46 * 2**20 and arch.bytes_per_token(dtype) == 6144

    snapshot = arch.state_bytes() + arch.window_bytes(dtype)
    logits = (2 * drafted + 1) * arch.vocab_size * 4
    keys_and_values = (drafted + 1) * arch.bytes_per_token(dtype)
    assert journal + snapshot + logits + keys_and_values < 80 * 2**20


def test_no_state_is_stored_for_a_drafted_token(
    seq: Sequence, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Drafting, verifying and rejecting write neither windows nor states, nor copy them."""
    seq.append(PROMPT, "large")
    before, cache, row = seq.slot.snapshot, seq.cache, seq.slot.index
    state, window = cache.state[:, row].clone(), cache.window[:, row].clone()
    monkeypatch.setattr(Cache, "take_snapshot", pytest.fail)
    monkeypatch.setattr(Cache, "save", pytest.fail)
    for _ in range(2):
        seq.draft(8, "small")
        seq.verify("large")
        seq.commit(0)
    assert torch.equal(cache.state[:, row], state) and torch.equal(cache.window[:, row], window)
    assert seq.slot.snapshot is before
    seq.draft(8, "small")
    seq.verify("large")
    seq.commit(5)
    assert not torch.equal(cache.state[:, row], state)


def test_logits_kept_behind_a_commit_do_not_keep_a_whole_pass_alive(seq: Sequence) -> None:
    seq.append(PROMPT, "large")
    seq.draft(8, "small")
    seq.verify("large")
    seq.commit(3)
    assert len(seq.rows) == 1
    assert seq.rows[0].untyped_storage().nbytes() == VOCABULARY * 4
