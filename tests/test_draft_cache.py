"""A cache of its own for the draft slice, where slices cannot read each other's.

The random nested model here was not trained for sharing: its slices cannot.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from cascade import ElasticModel, Reasoner, batch
from cascade.architecture import Architecture
from cascade.batch import Batch
from cascade.cache import Cache, DraftCache
from cascade.errors import CacheFull, NumericalError, RequestError, SequenceClosed
from cascade.handoff import handoff_report
from cascade.kernels import reference
from cascade.sampling import SamplingParams
from cascade.sequence import MODES, Consistency, Sequence
from cascade.shapes import SHAPES
from cascade.strategies import Explore, Single, Speculative
from tests.nested import Replay, elastic, parent
from tests.test_sequence import PROMPT, TOLERANCE, replay_logits, same

SAMPLED = SamplingParams(temperature=1.5, top_k=20, seed=11)


@pytest.fixture(scope="module")
def model() -> ElasticModel:
    return elastic(parent("M*E*M"))


@pytest.fixture
def cache(model: ElasticModel) -> Cache:
    return model.cache(max_batch=4, max_length=64, max_draft=8, draft_cache="own")


@pytest.fixture
def seq(model: ElasticModel, cache: Cache) -> Iterator[Sequence]:
    with model.sequence(cache=cache, draft_cache="own") as sequence:
        yield sequence


def alone(model: ElasticModel, tokens: list[int], k: int, slice: str) -> Any:
    """What a slice drafts from a cache that it wrote itself: ids and distributions."""
    with model.sequence() as sequence:
        sequence.append(tokens, slice)
        return sequence.draft(k, slice, SAMPLED), sequence.proposals, sequence.rows


def passes_of(seq: Sequence, slice: str) -> list[int]:
    """Tokens of each pass of a slice so far."""
    writer = seq.model.slice_index(slice)
    passes = seq.meter.passes
    return [tokens for (by, tokens), n in passes.items() if by == writer for _ in range(n)]


def slot_bits(seq: Sequence) -> list[torch.Tensor]:
    """Everything in a sequence's slot but its journal."""
    cache, row = seq.cache, seq.slot.index
    parts = (cache.keys, cache.values, cache.window, cache.state)
    return [*(part[:, row].clone() for part in parts), cache.provenance[row].clone()]


def unchanged(seq: Sequence, bits: list[torch.Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(slot_bits(seq), bits, strict=True))


# ---- what it is for ----


@pytest.mark.parametrize("mode", MODES)
def test_drafts_are_those_of_the_slice_alone_where_a_shared_cache_gives_others(
    model: ElasticModel, cache: Cache, mode: Consistency
) -> None:
    """Through accepted, partly accepted and rejected drafts, bonus tokens and a rollback."""
    same_ids: dict[DraftCache, int] = {"own": 0, "shared": 0}
    for draft_cache in same_ids:
        with model.sequence(cache=cache, consistency=mode, draft_cache=draft_cache) as seq:
            seq.append(PROMPT, "large")
            for kept, bonus in ((6, 3), (2, 9), (0, None), (6, None), (0, 1), (3, 8)):
                ids = seq.draft(6, "small", SAMPLED)
                expected, proposals, rows = alone(model, seq.tokens, 6, "small")
                same_ids[draft_cache] += ids == expected
                if draft_cache == "own":
                    same(seq.proposals, proposals)
                    same(seq.rows, rows)
                seq.verify("large")
                seq.commit(kept, bonus)
                if seq.length > 30:
                    seq.rollback(15)
            assert set(seq.provenance) == {"large"} and seq.audit("large").ok
    assert same_ids["own"] == 6
    assert same_ids["shared"] <= 3


def test_handoff_report_recommends_it_and_is_right(model: ElasticModel) -> None:
    report = handoff_report(model, [PROMPT], slices=["small", "large"])
    assert not report.can_share and 'draft_cache="own"' in report.recommendation


def test_the_shared_cache_holds_what_it_would_with_proposed_ids(
    model: ElasticModel, cache: Cache, seq: Sequence
) -> None:
    twin = model.sequence(cache=cache)
    for sequence in (seq, twin):
        sequence.append(PROMPT, "large")
    for kept in (5, 0, 3):
        bits = slot_bits(seq)
        ids = seq.draft(5, "small")
        assert unchanged(seq, bits)
        twin.propose(ids)
        same(seq.verify("large"), twin.verify("large"))
        for sequence in (seq, twin):
            sequence.commit(kept)
        assert seq.provenance == twin.provenance == ["large"] * seq.length
        assert seq.exact_length("large") == seq.length - 1
        same(slot_bits(seq)[2:4], slot_bits(twin)[2:4])


def test_a_slice_that_wrote_everything_reads_the_shared_cache(seq: Sequence) -> None:
    seq.append(PROMPT, "small")
    ids = seq.draft(4, "small", SAMPLED)
    assert ids == alone(seq.model, PROMPT, 4, "small")[0] and seq.companion is None
    seq.commit(4)
    assert seq.provenance == ["small"] * 14 and seq.companion is None
    seq.draft(2, "large", SAMPLED)
    assert seq.companion is not None and seq.companion.provenance == ["large"] * 14
    seq.commit(0)
    assert seq.refresh("large") == 13
    assert seq.draft(3, "large", SAMPLED) == alone(seq.model, seq.tokens, 3, "large")[0]
    assert len(seq.rows) == 3


# ---- it lags behind and catches up ----


def test_it_catches_up_in_one_chunk_and_keeps_what_it_drafted(seq: Sequence) -> None:
    seq.append(PROMPT, "large")
    seq.draft(5, "small")
    assert passes_of(seq, "small") == [9, 1, 1, 1, 1, 1]  # the prompt, then the last token on
    seq.verify("large")
    seq.commit(2, bonus=7)
    before = passes_of(seq, "small")
    seq.draft(4, "small")  # two of its own tokens are in its journal, the bonus is the next to run
    assert sorted(passes_of(seq, "small")) == sorted([*before, 1, 1, 1, 1])
    seq.verify("large")
    seq.commit(4)  # the last draft was never run
    seq.append([1, 2, 3, 4], "large")
    before = passes_of(seq, "small")
    companion = seq.companion
    assert companion is not None and companion.length == 13
    seq.draft(1, "small")
    # One pass: the draft that it has not run, and the tokens that it lags behind by.
    assert sorted(passes_of(seq, "small")) == sorted([*before, 1 + 4])
    assert companion is seq.companion and companion.tokens == seq.tokens
    seq.append([5] * 30, "large")  # more than its journal holds
    ids = seq.draft(3, "small", SAMPLED)
    assert ids == alone(seq.model, seq.tokens, 3, "small")[0]
    assert companion.provenance == ["small"] * seq.length and companion.audit("small").ok


def test_drafting_goes_on_behind_its_own_and_other_drafts(seq: Sequence) -> None:
    seq.append(PROMPT, "large")
    ids = seq.draft(2, "small", SAMPLED)
    before = passes_of(seq, "small")
    ids += seq.draft(2, "small", SAMPLED)
    assert sorted(passes_of(seq, "small")) == sorted([*before, 1, 1])
    assert ids == alone(seq.model, PROMPT, 4, "small")[0] == seq.drafted
    seq.propose([7, 8])
    ids += [7, 8, *seq.draft(1, "small", SAMPLED)]
    assert ids[-1:] == alone(seq.model, PROMPT + ids[:6], 1, "small")[0]
    assert [int(q[i] > 0) for q, i in zip(seq.proposals, ids, strict=True)] == [1] * 7
    assert [float(q.max()) for q in seq.proposals[4:6]] == [1, 1]
    same(seq.verify("large")[7], replay_logits(seq.model, PROMPT + ids, "large"))
    seq.commit(0)
    seq.propose([9])  # not what it drafted
    more = seq.draft(2, "small", SAMPLED)
    assert more == alone(seq.model, [*PROMPT, 9], 2, "small")[0]


def test_another_draft_slice_starts_it_anew(seq: Sequence) -> None:
    seq.append(PROMPT, "large")
    for drafter in ("small", "medium", "small"):
        assert seq.draft(3, drafter, SAMPLED) == alone(seq.model, seq.tokens, 3, drafter)[0]
        assert seq.companion is not None
        assert seq.companion.provenance == [drafter] * seq.length
        seq.verify("large")
        seq.commit(2)
    assert seq.audit("large").ok


def test_after_a_rollback_nothing_of_what_was_dropped_is_left(seq: Sequence) -> None:
    seq.append(PROMPT, "large")
    seq.draft(5, "small")
    seq.verify("large")
    seq.commit(5)
    seq.draft(2, "small")
    seq.rollback(12)
    seq.append([1, 2], "large")
    assert seq.draft(4, "small", SAMPLED) == alone(seq.model, seq.tokens, 4, "small")[0]
    assert seq.companion is not None and seq.companion.audit("small").ok


# ---- committed unverified ----


@pytest.mark.parametrize("mode", MODES)
def test_drafts_committed_unverified_wait_and_are_run_in_one_chunk(
    model: ElasticModel, cache: Cache, mode: Consistency
) -> None:
    with model.sequence(cache=cache, consistency=mode, draft_cache="own") as seq:
        seq.append(PROMPT, "large")
        before = passes_of(seq, "large")
        for _ in range(4):
            seq.draft(4, "small", SAMPLED)
            seq.commit(4)
        assert passes_of(seq, "large") == before
        assert seq.provenance == ["large"] * 26 and seq.slot.folded == 9
        # As the slice alone would have gone on.
        assert seq.tokens == [*PROMPT, *alone(model, PROMPT, 16, "small")[0]]
        (fork,) = seq.fork()
        seq.draft(4, "small")
        same(seq.verify("large")[4], replay_logits(model, seq.tokens + seq.drafted, "large"))
        assert sorted(passes_of(seq, "large")) == sorted([*before, 16, 5])
        seq.commit(4)
        assert seq.audit("large").ok and fork.audit("large").ok
        fork.draft(3, "small")
        fork.commit(3)
        fork.rollback(28)
        same(fork.append([3], "large"), replay_logits(model, [*fork.tokens[:28], 3], "large"))
        assert fork.provenance == ["large"] * 29


# ---- forks and batches ----


def test_a_fork_takes_it_along_and_shares_nothing(seq: Sequence) -> None:
    seq.append(PROMPT, "large")
    seq.draft(3, "small")
    seq.verify("large")
    seq.commit(2)
    seq.draft(2, "small")
    forks = seq.fork(2)
    for number, fork in enumerate(forks):
        assert fork.drafted == [] and fork.companion is not None
        assert fork.companion.length == 12 and fork.companion.drafted == []
        fork.append([number], "large")
        fork.draft(3, "small", SAMPLED)
        assert 9 not in passes_of(fork, "small")  # the prompt was not run again
    for fork in forks:
        assert fork.drafted == alone(fork.model, fork.tokens, 3, "small")[0]
    assert seq.draft(2, "small") == alone_greedy(seq, 4)[2:]


def alone_greedy(seq: Sequence, k: int) -> list[int]:
    with seq.model.sequence() as sequence:
        sequence.append(seq.tokens, "small")
        return sequence.draft(k, "small")


def test_forks_that_have_none_yet_run_their_prefix_once(model: ElasticModel, seq: Sequence) -> None:
    seq.append(PROMPT, "large")
    rows = [seq, *seq.fork(3)]
    drafted = Batch(rows).draft([3, 0, 2, 4], "small")
    expected = alone(model, PROMPT, 4, "small") and alone_greedy(seq, 4)
    assert drafted == [expected[:3], [], expected[:2], expected]
    assert rows[1].companion is None
    assert sum(9 in passes_of(row, "small") for row in rows) == 1
    for row in rows:
        assert row.companion is None or row.companion.audit("small").ok


def test_rows_with_and_without_one_are_as_each_alone(model: ElasticModel) -> None:
    cache = model.cache(max_batch=8, max_length=64, max_draft=8, draft_cache="own")
    prompts = [PROMPT, PROMPT[:1], PROMPT[:4], PROMPT[:6]]
    kinds: list[DraftCache] = ["own", "own", "shared", "own"]
    rows = [model.sequence(cache=cache, draft_cache=kind) for kind in kinds]
    single = [model.sequence(cache=cache, draft_cache=kind) for kind in kinds]
    together = Batch(rows)
    together.append(prompts, "large")
    for row, prompt in zip(single, prompts, strict=True):
        row.append(prompt, "large")
    for k, n, bonus in (
        ([4, 3, 5, 0], [2, 3, 1, 0], [1, None, 2, 3]),
        ([2, 4, 2, 6], [2, 0, 2, 6], [None, 5, None, None]),
    ):
        drafted = together.draft(k, "small", [SAMPLED] * 4)
        assert drafted == [s.draft(c, "small", SAMPLED) for s, c in zip(single, k, strict=True)]
        tables = together.verify("large")
        for row, table, count, more, drafts in zip(single, tables, n, bonus, k, strict=True):
            if drafts:
                same(row.verify("large"), table)
            row.commit(count, more)
        together.commit(n, bonus)
    for row, other in zip(rows, single, strict=True):
        assert row.tokens == other.tokens and row.provenance == other.provenance
        assert row.audit("large").ok
        assert (row.companion is None) == (row.draft_cache == "shared")


# ---- memory and capacity ----


def test_a_second_slot_a_sequence_is_all_that_it_takes(model: ElasticModel) -> None:
    def size(rows: int, draft_cache: DraftCache) -> int:
        return model.cache(max_batch=rows, max_length=32, draft_cache=draft_cache).nbytes

    assert size(3, "own") == size(6, "shared") == 6 * size(1, "shared")
    cache = model.cache(max_batch=2, max_length=32, draft_cache="own")
    rows = [model.sequence(cache=cache, draft_cache="own") for _ in range(2)]
    assert cache.free_slots == 0
    with pytest.raises(CacheFull, match="all 2 slots"):
        model.sequence(cache=cache, draft_cache="own")
    for number, row in enumerate(rows):
        row.append([*PROMPT, number], "large")
    for row in rows:
        assert row.draft(2, "small", SAMPLED) == alone(model, row.tokens, 2, "small")[0]
    companion = rows[0].companion
    assert companion is not None
    rows[0].close()
    assert cache.free_slots == 1
    with pytest.raises(SequenceClosed):
        companion.append([1], "small")
    with model.sequence(cache=cache, draft_cache="own") as again:
        again.append(PROMPT, "large")
        assert again.draft(3, "small", SAMPLED) == alone(model, PROMPT, 3, "small")[0]
    assert cache.free_slots == 1


def test_at_the_30b_shape_it_is_6_kb_a_token_and_one_state() -> None:
    """Computed: tensors without storage."""
    from transformers import NemotronHConfig

    arch = Architecture.from_config(NemotronHConfig(**SHAPES["30b"]["config"]))
    device, dtype = torch.device("meta"), torch.bfloat16

    def size(length: int, draft_cache: DraftCache) -> int:
        decay = torch.empty(arch.num_mamba, arch.heads, device=device)
        return Cache(
            arch, decay, 1, length, 16, device, dtype, torch.float32, reference, draft_cache
        ).nbytes

    assert size(512, "shared") == arch.slot_bytes(512, 16, dtype)
    own = {length: size(length, "own") - size(length, "shared") for length in (512, 1024)}
    assert own[1024] - own[512] == 512 * (6144 + 1)  # and a byte of provenance
    state = arch.state_bytes() + arch.window_bytes(dtype) + arch.journal_bytes(17, dtype)
    assert own[512] - 512 * 6145 == state < 57 * 2**20


def test_a_cache_without_slots_for_it_refuses_it(model: ElasticModel) -> None:
    plain = model.cache(max_batch=1, max_length=8)
    with pytest.raises(RequestError, match=r"model.cache\(draft_cache=\"own\"\)"):
        model.sequence(cache=plain, draft_cache="own")
    assert plain.free_slots == 1
    for call in (model.cache, model.sequence):
        with pytest.raises(RequestError, match="unknown draft_cache 'owm'; did you mean 'own'"):
            call(draft_cache="owm")  # type: ignore[operator]
    with model.sequence(draft_cache="own") as own, model.sequence() as shared:
        assert own.cache is not shared.cache  # a default cache of each kind
        own.append(PROMPT, "large")
        assert own.draft(3, "small") == alone_greedy(own, 3)


# ---- failures: see also test_failure.py ----


def test_a_draft_slice_with_nan_weights_leaves_the_shared_cache_alone() -> None:
    source = parent("M*EM")
    source.model.embeddings.weight[:, 30] = torch.nan  # in the parent alone
    model = elastic(source)
    with model.sequence(draft_cache="own") as seq:
        seq.append(PROMPT, "small")
        bits = slot_bits(seq)
        for _ in range(2):
            with pytest.raises(NumericalError, match=r"'large' gave .* not finite"):
                seq.draft(2, "large")
            assert seq.drafted == [] and seq.companion is None and unchanged(seq, bits)
        assert seq.draft(3, "medium", SAMPLED) == alone(model, PROMPT, 3, "medium")[0]


def test_nan_of_a_failed_catch_up_reaches_no_later_pass() -> None:
    """A row is padded to the longest of its batch, with what its slot holds behind its tokens."""
    source = parent("M*EM")
    source.model.embeddings.weight[:, 30] = torch.nan
    model = elastic(source)
    cache = model.cache(max_batch=2, max_length=64, max_draft=8, draft_cache="own")
    rows = [model.sequence(cache=cache, draft_cache="own") for _ in range(2)]
    for row in rows:
        row.append(PROMPT * 2, "small")
    with pytest.raises(NumericalError):
        rows[0].draft(2, "large")  # in its own cache
    rows[0].append([1, 2], "medium")
    rows[0].slot.entry_slice = model.slice_index("large")  # as if it had run these tokens
    rows[0].propose([1, 2, 3, 4])
    rows[0].commit(4)
    with pytest.raises(NumericalError):
        rows[0].append([1], "medium")  # what waited for `large` is run first
    rows[0].rollback(4)
    for drafter in ("small", "medium"):  # in the shared cache and in their own
        drafted = Batch(rows).draft([3, 3], drafter, [SAMPLED] * 2)
        assert drafted == [alone(model, row.tokens, 3, drafter)[0] for row in rows]
        Batch(rows).commit([0, 0])
        Batch(rows).append([[7], [8]], "small")


def test_a_commit_interrupted_at_its_end_does_not_count_as_run(
    seq: Sequence, monkeypatch: pytest.MonkeyPatch
) -> None:
    seq.append(PROMPT, "large")
    seq.propose([1, 2, 3])
    seq.verify("large")

    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(batch, "extend", interrupted)
        with pytest.raises(KeyboardInterrupt):
            seq.commit(3)
    assert seq.tokens == PROMPT and seq.drafted == [1, 2, 3]
    seq.commit(0)
    seq.propose([7, 8, 9, 10])
    seq.commit(4)
    assert seq.audit("large").ok and seq.tokens == [*PROMPT, 7, 8, 9, 10]


# ---- for a whole request ----


def test_a_reasoner_allocates_what_it_takes_and_answers_as_large_alone() -> None:
    sizes: dict[str, Any] = {"max_batch": 3, "max_length": 256}
    reasoner = Reasoner.from_pretrained("nano", draft_cache="own", **sizes)
    assert reasoner.cache.nbytes == 2 * Reasoner.from_pretrained("nano", **sizes).cache.nbytes
    prompts = ["57 + 87 + 70", "12 - 7", "5 + 8 - 2", "41 + 32"]
    together = reasoner.generate(prompts)
    alone = reasoner.generate(prompts, strategy=Single(slice="large"))
    assert [r.token_ids for r in together] == [r.token_ids for r in alone]
    for settings in ({}, {"temperature": 0.8, "seed": 5}):
        speculated = reasoner.generate(prompts, strategy=Speculative(draft_tokens=4), **settings)
        alone = reasoner.generate(prompts, strategy=Single(slice="large"), **settings)
        assert [r.token_ids for r in speculated] == [r.token_ids for r in alone]
        assert all(r.usage.accepted > 0 for r in speculated)
    assert all(r.usage.by_slice["small"] > 0 and r.metrics.passes["small"] > 0 for r in together)
    assert reasoner.audit(prompts[0]).ok
    best = reasoner.generate(prompts[0], strategy=Explore(drafts=2), seed=3)
    assert best.answer == "214" and len(best.candidates) >= 1
    assert reasoner.cache.free_slots == 3


def test_consistency_is_chosen_per_model_or_per_call() -> None:
    reasoner = Reasoner.from_pretrained("nano", max_batch=1, max_length=256, consistency="shared")
    shared = reasoner.generate("57 + 87 + 70")
    exact = reasoner.generate("57 + 87 + 70", consistency="exact")
    assert shared.answer == exact.answer == "214"
    report = reasoner.audit("57 + 87 + 70", consistency="exact")
    assert report.ok
    with pytest.raises(RequestError, match="unknown consistency mode 'exac'; did you mean 'exact'"):
        reasoner.generate("1 + 1", consistency="exac")
    with pytest.raises(RequestError, match="unknown consistency mode"):
        Reasoner(reasoner.model, consistency="none")  # type: ignore[arg-type]


def test_the_replay_of_a_companion_is_the_slice_alone(seq: Sequence) -> None:
    seq.append(PROMPT, "large")
    seq.draft(3, "medium")
    assert seq.companion is not None
    with Replay(seq.model, PROMPT, ["medium"] * 10) as replay:
        assert replay.deviation(seq.companion) <= TOLERANCE
