"""Speculative on nano: the verifier's own output, cut at the same place everywhere."""

from __future__ import annotations

from collections import Counter

import pytest
import torch

from cascade import Reasoner, SamplingParams
from cascade.problems import nano_problems
from cascade.results import Result
from cascade.strategies import Single, Speculative
from cascade.strategies.base import Roles, Strategy
from cascade.task import Task
from cascade.verbs import Run

QUESTION = "State the final answer to the following arithmetic problem: 57 + 87 + 70 - 12 ="
EQUALS = 54
QUESTIONS = [QUESTION.replace("57", str(n)) for n in (3, 21, 57, 888, 4096)]


@pytest.fixture(scope="module")
def reasoner() -> Reasoner:
    return Reasoner.from_pretrained("nano", max_batch=64, max_length=256)


def check(result: Result) -> None:
    """What must hold of every result."""
    usage, metrics = result.usage, result.metrics
    assert result.error is None
    assert sum(step.tokens for step in result.steps) == len(result.token_ids) == usage.completion
    assert "".join(step.text or "" for step in result.steps) == result.text
    assert [i for step in result.steps for i in step.token_ids] == list(result.token_ids)
    assert usage.accepted == sum(step.drafted_tokens for step in result.steps) <= usage.drafted
    assert usage.by_slice.get("small", 0) == usage.accepted
    assert usage.rewritten <= usage.by_slice.get("large", 0)
    if usage.drafted:
        assert metrics.acceptance_rate == usage.accepted / usage.drafted
    if result.logprobs is not None:
        assert len(result.logprobs) == len(result.token_ids)


def test_greedy_equals_the_large_slice_token_by_token(reasoner: Reasoner) -> None:
    """200 prompts in fp32."""
    questions = [problem.question for problem in nano_problems(200, 303)]
    together = reasoner.generate(questions, strategy=Speculative(draft_tokens=4))
    alone = reasoner.generate(questions, strategy=Single(slice="large"))
    for one, other in zip(together, alone, strict=True):
        check(one)
        assert one.token_ids == other.token_ids
        assert one.answer == other.answer
    assert sum(r.usage.rewritten for r in together) > 20  # the drafter was wrong in places
    assert Counter(s.decision for r in together for s in r.steps).keys() == {"verified"}


def test_in_bf16_greedy_differs_at_near_ties_and_nowhere_else() -> None:
    """Prompts of noise, after which the slice is unsure: ties within bf16's rounding decide."""
    rounded = Reasoner.from_pretrained("nano", dtype="bfloat16", max_batch=24, max_length=96)
    noise = torch.Generator().manual_seed(1)
    prompts = [
        {"prompt_token_ids": torch.randint(10, 110, (24,), generator=noise).tolist()}
        for _ in range(24)
    ]
    limits = {"max_tokens": 40, "ignore_eos": True}
    alone = rounded.generate(prompts, strategy="single", **limits)
    together = rounded.generate(prompts, strategy=Speculative(draft_tokens=4), **limits)
    assert sum(r.usage.rewritten for r in together) > 50
    for one, other in zip(alone, together, strict=True):
        pairs = enumerate(zip(one.token_ids, other.token_ids, strict=True))
        first = next((i for i, (a, b) in pairs if a != b), None)
        if first is None:
            continue
        with rounded.model.sequence() as sequence:
            ids = [*one.prompt_token_ids, *one.token_ids[:first]]
            logits = sequence.append(ids, "large")
        gap = logits[one.token_ids[first]] - logits[other.token_ids[first]]
        assert abs(float(gap)) <= 2**-6 * float(logits.abs().max())


@pytest.mark.parametrize(
    "setting",
    [
        {"temperature": 1.0},
        {"temperature": 1.5, "top_k": 8, "top_p": 0.9},
        {"temperature": 0.8, "repetition_penalty": 1.2, "min_p": 0.05},
        {"temperature": 1.0, "presence_penalty": 0.5, "frequency_penalty": 0.2, "min_tokens": 45},
        {"temperature": 1.0, "logit_bias": {10: 2.0}},
    ],
    ids=str,
)
def test_a_seed_gives_the_tokens_that_it_gives_without_drafts(
    reasoner: Reasoner, setting: dict
) -> None:
    params = SamplingParams(seed=12, max_tokens=50, **setting)
    alone = reasoner.generate(QUESTIONS, params, strategy=Single(slice="large"))
    for k in (5, None):
        together = reasoner.generate(QUESTIONS, params, strategy=Speculative(draft_tokens=k))
        assert [r.token_ids for r in together] == [r.token_ids for r in alone]


@pytest.mark.parametrize("coupling", ["common", "maximal"])
def test_a_seed_gives_the_same_tokens_whatever_else_is_in_the_batch(
    reasoner: Reasoner, coupling: str
) -> None:
    strategy = Speculative(coupling=coupling, draft_tokens=3)
    params = [SamplingParams(temperature=1.2, seed=i, max_tokens=40) for i in range(5)]
    together = reasoner.generate(QUESTIONS, params, strategy=strategy)
    for question, setting, result in zip(QUESTIONS, params, together, strict=True):
        alone = reasoner.generate(question, setting, strategy=strategy)
        assert alone.token_ids == result.token_ids


def test_requests_of_one_call_have_seeds_of_their_own(reasoner: Reasoner) -> None:
    results = reasoner.generate(
        [QUESTION] * 4, strategy=Speculative(draft_tokens=3), temperature=9.0, seed=7, max_tokens=30
    )
    assert len({r.token_ids for r in results}) == len({r.seed for r in results}) == 4


LIMITS = [
    {"stop": "144"},
    {"stop": [" + ", "87 ="]},
    {"stop": "\n2"},  # over the end of a step
    {"stop_token_ids": [EQUALS]},
    {"stop_token_ids": [EQUALS], "min_tokens": 11},
    {"max_tokens": 13},
    {"max_tokens": 1},
    {"stop": "</think>"},
    {"ignore_eos": True, "max_tokens": 70},
    {},
]


@pytest.fixture(scope="module")
def uncut(reasoner: Reasoner) -> list[Result]:
    """What `single` gives under each of the limits."""
    params = [SamplingParams(logprobs=1, **limits) for limits in LIMITS]
    return reasoner.generate([QUESTION] * len(LIMITS), params, strategy="single")


@pytest.mark.parametrize("k", [1, 3, 16])
def test_generation_is_cut_inside_an_accepted_block(
    reasoner: Reasoner, uncut: list[Result], k: int
) -> None:
    """At a stop string, a stop id, the end token and the limit: everywhere where `single` does."""
    assert reasoner.codec.encode("=") == [EQUALS]
    params = [SamplingParams(logprobs=1, **limits) for limits in LIMITS]
    strategy = Speculative(draft_tokens=k)
    found = reasoner.generate([QUESTION] * len(LIMITS), params, strategy=strategy)
    for limits, one, other in zip(LIMITS, found, uncut, strict=True):
        check(one)
        assert one.token_ids == other.token_ids, limits
        assert (one.text, one.answer, one.finish_reason) == (
            other.text,
            other.answer,
            other.finish_reason,
        )
        assert [s.text for s in one.steps] == [s.text for s in other.steps]
        assert one.logprobs and other.logprobs
        for token, mine, its in zip(one.token_ids, one.logprobs, other.logprobs, strict=True):
            assert mine[token] == pytest.approx(its[token], abs=1e-3)


class Watched(Strategy):
    """Another strategy, and afterwards what its cache holds."""

    inner: Speculative

    def run(self, task: Task, roles: Roles) -> Run:
        yield from self.inner.run(task, roles)
        assert task.sequence.tokens == [*task.prompt_ids, *task.transcript.ids]
        task.memory["length"] = task.sequence.length
        task.memory["report"] = task.sequence.audit(roles.verify)


@pytest.mark.parametrize("limits", [{}, {"stop": "144"}, {"max_tokens": 13}], ids=str)
@pytest.mark.parametrize("coupling", ["common", "maximal"])
def test_the_cache_ends_where_the_tokens_end(
    reasoner: Reasoner, limits: dict, coupling: str
) -> None:
    """After rejections too: a stale state would show in the audit, not in the acceptance rate."""
    strategy = Watched(inner=Speculative(draft_tokens=4, coupling=coupling))
    result = reasoner.generate(QUESTION, strategy=strategy, temperature=6.0, seed=2, **limits)
    assert result.error is None
    assert limits or result.usage.rewritten > 0
    memory = reasoner._memory
    assert memory["length"] == len(result.prompt_token_ids) + len(result.token_ids)
    assert memory["report"].ok


def test_the_end_of_a_thought_inside_a_block_is_the_end_of_a_step(reasoner: Reasoner) -> None:
    result = reasoner.generate(QUESTION, strategy=Speculative(draft_tokens=16))
    tag = next(step for step in result.steps if step.text and step.text.endswith("</think>"))
    assert tag.phase == "thinking"
    assert {step.phase for step in result.steps[tag.index + 1 :]} == {"answer"}
    assert result.usage.reasoning == sum(s.tokens for s in result.steps if s.phase == "thinking")


@pytest.mark.parametrize("budget", [0, 1, 7, 12, 13, 200])
def test_a_thinking_budget_is_kept_to_the_token(reasoner: Reasoner, budget: int) -> None:
    one = reasoner.generate(
        QUESTION, strategy=Speculative(draft_tokens=5), thinking_token_budget=budget
    )
    other = reasoner.generate(QUESTION, strategy="single", thinking_token_budget=budget)
    check(one)
    assert one.token_ids == other.token_ids
    assert [s.decision for s in one.steps].count("forced") == (budget < 30)


def test_rows_of_different_draft_lengths_share_a_batch(reasoner: Reasoner) -> None:
    """Budgets leave some rows with one draft, some with none, and most with all."""
    params = [SamplingParams(max_tokens=n) for n in (1, 2, 3, 9, 60)]
    together = reasoner.generate(QUESTIONS, params, strategy=Speculative(draft_tokens=6))
    alone = reasoner.generate(QUESTIONS, params, strategy="single")
    assert [r.token_ids for r in together] == [r.token_ids for r in alone]
    for result in together:
        check(result)


def test_drafts_that_are_dropped_are_told(reasoner: Reasoner) -> None:
    question = nano_problems(60, 303)[5].question
    events = list(reasoner.stream(question, strategy=Speculative(draft_tokens=6)))
    result = events[-1].result
    drafted = sum(len(e.token_ids) for e in events if e.kind == "draft_delta")
    dropped = sum(len(e.token_ids) for e in events if e.kind == "step_retracted")
    assert drafted == result.usage.drafted
    assert dropped == result.usage.drafted - result.usage.accepted
    assert [e.step for e in events if e.kind == "step_committed"] == list(result.steps)


def test_a_slice_that_drafts_for_itself_is_always_right(reasoner: Reasoner) -> None:
    strategy = Speculative(draft="medium", verify="medium", draft_tokens=4)
    for coupling in ("common", "maximal"):
        again = strategy.model_copy(update={"coupling": coupling})
        result = reasoner.generate(QUESTION, strategy=again, temperature=1.0, seed=1)
        assert result.metrics.acceptance_rate > 0.95  # but for what follows an end
        assert set(result.metrics.passes) == {"medium"}
