"""Parallel drafts on nano: how one is chosen, what it costs, and what is left behind."""

import pytest

from cascade import Reasoner
from cascade.errors import RequestError
from cascade.results import Result
from cascade.strategies import Explore, Single

QUESTIONS = [
    "State the final answer to the following arithmetic problem: 57 + 87 + 70 =",
    "Find the Least Common Multiple (LCM) of these numbers: 48, 75",
    "State the final answer to the following arithmetic problem: 512 - 377 + 94 - 266 =",
]


@pytest.fixture(scope="module")
def reasoner() -> Reasoner:
    return Reasoner.from_pretrained("nano", max_batch=5, max_length=384)


def check(result: Result) -> None:
    assert result.error is None
    assert result.finish_reason == "stop"
    assert "".join(step.text or "" for step in result.steps) == result.text
    assert sum(step.tokens for step in result.steps) == len(result.token_ids)
    assert result.usage.accepted == len(result.token_ids) <= result.usage.drafted


@pytest.mark.parametrize("choose", ["best", "majority", "vote", "beam"])
def test_every_way_of_choosing_ends_with_an_answer(reasoner: Reasoner, choose: str) -> None:
    strategy = Explore(drafts=3, choose=choose)
    for result in reasoner.generate(QUESTIONS, strategy=strategy, seed=1):
        check(result)
        assert result.answer
    assert reasoner.cache.free_slots == reasoner.max_batch


def test_best_is_the_draft_that_the_verifier_finds_likeliest(reasoner: Reasoner) -> None:
    strategy = Explore(drafts=6, enough=None, temperature=2.0)
    result = reasoner.generate(QUESTIONS[2], strategy=strategy, seed=3)
    assert len(result.candidates) == 6
    assert len({c.token_ids for c in result.candidates}) > 1
    [chosen] = [c for c in result.candidates if c.chosen]
    assert chosen.token_ids == result.token_ids
    assert chosen.score == max(c.score or 0 for c in result.candidates)
    scores = [step.score for step in result.steps]
    assert chosen.score == pytest.approx(min(s for s in scores if s is not None), rel=1e-3)


def test_the_score_is_what_the_verifier_alone_gives_the_text(reasoner: Reasoner) -> None:
    result = reasoner.generate(QUESTIONS[0], strategy=Explore(drafts=3), seed=4)
    ids, lowest = list(result.token_ids), 0.0
    with reasoner.model.sequence() as sequence:
        logits = sequence.append(result.prompt_token_ids, "large")
        for token in ids:
            lowest = min(lowest, float(logits.log_softmax(0)[token]))
            logits = sequence.append([token], "large")
    [chosen] = [c for c in result.candidates if c.chosen]
    assert chosen.score == pytest.approx(2.718281828459045**lowest, rel=1e-3)


def test_logprobs_are_those_of_the_slice_that_judged(reasoner: Reasoner) -> None:
    result = reasoner.generate(QUESTIONS[0], strategy=Explore(drafts=2), seed=4, logprobs=0)
    assert result.logprobs is not None and len(result.logprobs) == len(result.token_ids)
    with reasoner.model.sequence() as sequence:
        logits = sequence.append(result.prompt_token_ids, "large")
        for token, entry in zip(result.token_ids, result.logprobs, strict=True):
            assert entry[token] == pytest.approx(float(logits.log_softmax(0)[token]), abs=1e-3)
            logits = sequence.append([token], "large")


def test_the_majority_wins_and_the_verifier_is_not_asked(reasoner: Reasoner) -> None:
    strategy = Explore(drafts=5, choose="majority", temperature=1.5)
    for result in reasoner.generate(QUESTIONS, strategy=strategy, seed=8):
        assert set(result.metrics.passes) == {"small"}
        answers = [c.answer for c in result.candidates]
        assert answers.count(result.answer) == max(answers.count(a) for a in answers)
        assert all(c.score is None for c in result.candidates)


def test_a_decided_vote_stops_the_other_drafts(reasoner: Reasoner) -> None:
    strategy = Explore(drafts=8, choose="majority", temperature=0.01)
    result = reasoner.generate(QUESTIONS[0], strategy=strategy, seed=2)
    # Four slots for drafts: five equal answers of eight decide.
    assert 5 <= len(result.candidates) < 8
    check(result)


def test_enough_stops_at_the_first_good_draft(reasoner: Reasoner) -> None:
    all_of_them = Explore(drafts=8, enough=None)
    first = Explore(drafts=8, enough=1e-6)
    many = reasoner.generate(QUESTIONS[0], strategy=all_of_them, seed=5)
    few = reasoner.generate(QUESTIONS[0], strategy=first, seed=5)
    assert len(many.candidates) == 8
    assert len(few.candidates) < 8
    assert few.usage.drafted < many.usage.drafted


def test_a_plan_is_the_large_slices_own(reasoner: Reasoner) -> None:
    large = reasoner.generate(QUESTIONS[2], strategy=Single(slice="large"))
    result = reasoner.generate(QUESTIONS[2], strategy=Explore(drafts=3, plan_steps=1), seed=6)
    assert result.steps[0].slice == "large"
    assert result.steps[0].token_ids == large.steps[0].token_ids
    assert {step.slice for step in result.steps[1:]} == {"small"}


def test_the_cache_that_is_left_is_the_verifiers(reasoner: Reasoner) -> None:
    for choose in ("best", "beam"):
        reasoner.strategy = Explore(drafts=3, choose=choose)
        assert reasoner.audit(QUESTIONS[0], seed=7).ok


def test_a_seed_gives_the_same_drafts_alone_and_in_a_batch(reasoner: Reasoner) -> None:
    strategy = Explore(drafts=3, choose="vote", temperature=1.0)
    alone = reasoner.generate(QUESTIONS[0], strategy=strategy, seed=11)
    [together, *_] = reasoner.generate(QUESTIONS, strategy=strategy, seed=11)
    assert together.token_ids == alone.token_ids
    assert [c.token_ids for c in together.candidates] == [c.token_ids for c in alone.candidates]


def test_drafts_of_one_temperature_differ(reasoner: Reasoner) -> None:
    strategy = Explore(drafts=8, enough=None, temperature=2.0)
    result = reasoner.generate(QUESTIONS[1], strategy=strategy, seed=12)
    assert len({c.token_ids for c in result.candidates}) > 1


def test_a_reasoner_with_one_slot_cannot_explore() -> None:
    reasoner = Reasoner.from_pretrained("nano", max_batch=1, max_length=256)
    with pytest.raises(RequestError, match="max_batch=1 leaves none"):
        reasoner.generate(QUESTIONS[0], strategy="explore")
