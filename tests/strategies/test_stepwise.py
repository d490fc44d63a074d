"""Stepwise on nano: every decision, what a policy is told, and what is told about it afterwards."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
from pydantic import Field

from cascade import Reasoner, SamplingParams
from cascade.errors import PolicyError, RequestError
from cascade.judge import Judge
from cascade.policies import (
    Accept,
    Always,
    AnyDecision,
    CostAware,
    DraftScores,
    EndThinking,
    Escalate,
    Gate,
    Lead,
    Need,
    Policy,
    Refresh,
    Rewrite,
    StepScores,
    Threshold,
)
from cascade.policies.scores import NEEDS
from cascade.problems import nano_problems
from cascade.results import Result, Step
from cascade.strategies import Single, Stepwise
from cascade.strategies.base import Roles, Strategy
from cascade.task import Task
from cascade.verbs import Run

QUESTION = "State the final answer to the following arithmetic problem: 57 + 87 + 70 - 12 ="
HARD = [problem.question for problem in nano_problems(18, 303)]


@pytest.fixture(scope="module")
def reasoner() -> Reasoner:
    return Reasoner.from_pretrained("nano", max_batch=18, max_length=384)


class Script(Policy):
    """Decides by a function of the scores; `seen` and `asked` hold what it was given."""

    rule: Callable[[StepScores], Any] = lambda scores: Accept()
    gate: Callable[[DraftScores], Any] = lambda draft: False
    wanted: frozenset[str] = NEEDS - {"judge"}
    seen: list[StepScores] = Field(default_factory=list)
    asked: list[DraftScores] = Field(default_factory=list)

    def decide(self, scores: StepScores) -> AnyDecision:
        self.seen.append(scores)
        return self.rule(scores)

    def skips(self, draft: DraftScores) -> bool:
        self.asked.append(draft)
        return self.gate(draft)

    @property
    def needs(self) -> frozenset[Need]:
        return self.wanted  # type: ignore[return-value]


def script(rule: Callable[[StepScores], Any] = lambda scores: Accept(), **more: Any) -> Script:
    return Script(rule=rule, **more)


def at(step: int, decision: AnyDecision) -> Callable[[StepScores], AnyDecision]:
    return lambda scores: decision if scores.step == step else Accept()


def check(result: Result) -> None:
    """What must hold of every result."""
    usage, steps = result.usage, result.steps
    assert result.error is None
    assert "".join(step.text or "" for step in steps) == result.text
    assert [i for step in steps for i in step.token_ids] == list(result.token_ids)
    assert [step.index for step in steps] == list(range(len(steps)))
    assert sum(usage.by_slice.values()) == usage.completion == len(result.token_ids)
    assert usage.accepted == sum(step.drafted_tokens for step in steps) <= usage.drafted
    unverified = sum(step.tokens for step in steps if step.decision == "unverified")
    assert usage.unverified == unverified
    for step in steps:
        scored = step.decision in ("accept", "refresh", "rewrite", "escalate")
        assert (step.scorer is not None) >= scored
        assert (step.score is None) == (step.scorer is None)
        if step.decision in ("accept", "unverified", "refresh"):
            assert step.drafted_tokens == step.tokens and step.slice == step.drafter
        if step.decision == "rewrite":
            assert step.retracted_ids
        if step.decision in ("lead", "written", "forced"):
            assert step.drafted_tokens == 0


class Watched(Strategy):
    """Another strategy, and afterwards a look at its task."""

    inner: Strategy
    look: Callable[[Task], Any]

    def run(self, task: Task, roles: Roles) -> Run:
        yield from self.inner.run(task, roles)
        self.look(task)


def watched(reasoner: Reasoner, policy: Policy, look: Callable[[Task], Any], **more: Any) -> Result:
    strategy = Watched(inner=Stepwise(policy=policy), look=look)
    return reasoner.generate(QUESTION, strategy=strategy, **more)


# ---- what a policy is told ----


def test_the_figures_are_those_of_both_slices_alone(reasoner: Reasoner) -> None:
    """Recomputed for the first step from two sequences, after the same prompt."""
    policy = script()
    result = reasoner.generate(QUESTION, policy=policy, temperature=0.9, seed=3)
    scores, ids = policy.seen[0], result.steps[0].token_ids
    model = reasoner.model
    with model.sequence(consistency="shared") as seq:
        seq.append(result.prompt_token_ids, "large")
        seq.propose(ids)
        p = seq.verify("large")[:-1].log_softmax(-1).double()
        q = seq.verify("small")[:-1].log_softmax(-1).double()
    chosen = list(ids)
    at_chosen = range(len(chosen)), chosen
    assert scores.logprobs == pytest.approx(p[at_chosen].tolist(), abs=1e-3)
    assert scores.draft_logprobs == pytest.approx(q[at_chosen].tolist(), abs=1e-3)
    assert scores.entropies == pytest.approx((-(q.exp() * q).sum(-1)).tolist(), abs=1e-3)
    best = q.exp().topk(2).values
    assert scores.margins == pytest.approx((best[:, 0] - best[:, 1]).tolist(), abs=1e-3)
    assert scores.divergences == pytest.approx((q.exp() * (q - p)).sum(-1).tolist(), abs=1e-3)
    assert scores.judge is None
    assert (scores.step, scores.phase, scores.drafter, scores.verifier) == (
        0,
        "thinking",
        "small",
        "large",
    )
    assert scores.text == result.steps[0].text
    assert result.steps[0].score == pytest.approx(math.exp(min(scores.logprobs)))


def test_nothing_is_gathered_that_is_not_needed(reasoner: Reasoner) -> None:
    policy = script(wanted=frozenset())
    reasoner.generate(QUESTION, policy=policy)
    for scores in policy.seen:
        assert (scores.draft_logprobs, scores.entropies, scores.margins) == (None, None, None)
        assert (scores.divergences, scores.judge) == (None, None)


def test_progress_tells_what_has_happened(reasoner: Reasoner) -> None:
    policy = script(lambda s: Rewrite(start=1) if s.step == 1 else Accept())
    result = reasoner.generate(QUESTION, policy=policy)
    first, last = policy.seen[0].progress, policy.seen[-1].progress
    assert first.tokens == {} and first.texts == () and first.thought == 0
    assert first.ran["large"] == result.usage.prompt
    assert first.token_seconds.keys() == {"small"} and first.pass_seconds == {}
    before = result.steps[: policy.seen[-1].step]
    assert sum(last.tokens.values()) == sum(step.tokens for step in before)
    assert last.tokens["large"] == result.steps[1].tokens - 1
    assert last.texts == tuple(step.text for step in before)
    assert last.thought == result.usage.reasoning
    assert 0 < last.pass_seconds["large"] < last.seconds
    assert 0 < last.token_seconds["large"] < last.seconds
    assert last.ran["small"] == result.metrics.ran["small"]  # the last draft included
    assert result.metrics.ran["large"] > result.usage.prompt


def test_the_judge_is_asked_in_the_same_pass_and_leaves_nothing(reasoner: Reasoner) -> None:
    def look(task: Task) -> None:
        assert task.sequence.audit("large").ok
        assert task.sequence.tokens == [*task.prompt_ids, *task.generated]

    policy = script(wanted=frozenset({"judge"}))
    result = watched(reasoner, policy, look)
    plain = reasoner.generate(QUESTION, policy=Always())
    assert result.token_ids == plain.token_ids
    assert result.metrics.passes == plain.metrics.passes
    assert all(scores.judge is not None and 0 <= scores.judge <= 1 for scores in policy.seen)
    question = len(reasoner.codec.encode(Judge().question))
    extra = result.metrics.ran["large"] - plain.metrics.ran["large"]
    assert extra == question * len(policy.seen)


def test_the_judges_answer_is_the_probability_of_yes_against_no(reasoner: Reasoner) -> None:
    judge = Judge(question="ok? ", yes=("y",), no=("n", "x"))
    policy = script(wanted=frozenset({"judge"}))
    result = reasoner.generate(QUESTION, strategy=Stepwise(policy=policy, judge=judge))
    encode = reasoner.codec.encode
    with reasoner.model.sequence() as seq:
        ids = [*result.prompt_token_ids, *result.steps[0].token_ids, *encode("ok? ")]
        p = seq.append(ids, "large").softmax(0)
    yes, no = (float(p[[encode(w)[0] for w in words]].sum()) for words in ("y", "nx"))
    assert policy.seen[0].judge == pytest.approx(yes / (yes + no), rel=1e-3)


@pytest.mark.parametrize(
    ("judge", "message"),
    [
        (Judge(question="richtig? äöü"), "no tokens for all of the judge's question"),
        (Judge(yes=("right",), no=("rong",)), "cannot be told apart"),
        (Judge(question="x" * 70), "leaves none"),
    ],
)
def test_a_question_that_cannot_be_put_is_refused_before_any_work(
    reasoner: Reasoner, judge: Judge, message: str
) -> None:
    strategy = Stepwise(policy=Threshold(score="judge"), judge=judge)
    with pytest.raises(RequestError, match=message):
        reasoner.generate(QUESTION, strategy=strategy)


# ---- decisions ----


def test_accepting_all_writes_what_small_drafts(reasoner: Reasoner) -> None:
    result = reasoner.generate(QUESTION, policy=script())
    check(result)
    assert {step.decision for step in result.steps} == {"accept"}
    assert {step.scorer for step in result.steps} == {"large"}


def test_a_rewrite_keeps_the_beginning_and_goes_on_from_there(reasoner: Reasoner) -> None:
    policy = script(at(1, Rewrite(start=3)))
    result = reasoner.generate(QUESTION, policy=policy)
    check(result)
    step, draft = result.steps[1], policy.seen[1]
    assert (step.decision, step.slice, step.drafter) == ("rewrite", "large", "small")
    assert step.drafted_tokens == 3
    assert step.text and draft.text and step.text.startswith(draft.text[:1])
    assert reasoner.codec.encode(draft.text) == [*step.token_ids[:3], *step.retracted_ids]
    assert result.usage.rewritten == step.tokens - 3


def test_rewriting_all_writes_what_large_writes_alone(reasoner: Reasoner) -> None:
    alone = reasoner.generate(HARD, strategy=Single(slice="large"))
    for needs in (frozenset(), NEEDS):
        policy = script(lambda scores: Rewrite(), wanted=needs)
        results = reasoner.generate(HARD, policy=policy)
        assert [r.token_ids for r in results] == [r.token_ids for r in alone]
        for result in results:
            check(result)
            assert result.usage.rewritten == result.usage.completion


def test_an_escalated_draft_goes_to_the_next_tier(reasoner: Reasoner) -> None:
    """Small's draft of step 1 is dropped, medium drafts it, and the policy is asked again."""
    policy = script(
        lambda s: Escalate() if s.step == 1 and s.drafter == "small" else Accept(),
    )
    result = reasoner.generate(QUESTION, policy=policy)
    check(result)
    assert [(s.step, s.drafter) for s in policy.seen[:4]] == [
        (0, "small"),
        (1, "small"),
        (1, "medium"),
        (2, "small"),
    ]
    step = result.steps[1]
    assert (step.decision, step.slice, step.drafter) == ("accept", "medium", "medium")
    assert step.retracted == policy.seen[1].text
    assert result.usage.by_slice["medium"] == step.tokens


def test_the_last_tier_writes_the_step_itself(reasoner: Reasoner) -> None:
    policy = script(at(1, Escalate()))
    result = reasoner.generate(QUESTION, policy=policy)
    check(result)
    step = result.steps[1]
    assert [(s.step, s.drafter) for s in policy.seen[1:3]] == [(1, "small"), (1, "medium")]
    assert (step.decision, step.slice, step.drafter) == ("escalate", "large", "medium")
    assert step.retracted == f"{policy.seen[1].text}{policy.seen[2].text}"
    assert result.usage.rewritten == step.tokens
    alone = reasoner.generate(
        {"prompt_token_ids": [*result.prompt_token_ids, *result.steps[0].token_ids]},
        strategy=Single(slice="large"),
    )
    assert step.token_ids == alone.steps[0].token_ids


def test_a_middle_slice_may_score_first(reasoner: Reasoner) -> None:
    policy = script(
        lambda s: Escalate(by="score") if s.step == 1 and s.verifier == "medium" else Accept()
    )
    strategy = Stepwise(policy=policy, middle_scores=True)
    result = reasoner.generate(QUESTION, strategy=strategy)
    check(result)
    assert [(s.step, s.verifier) for s in policy.seen[:4]] == [
        (0, "medium"),
        (1, "medium"),
        (1, "large"),
        (2, "medium"),
    ]
    assert [step.scorer for step in result.steps[:3]] == ["medium", "large", "medium"]
    assert policy.seen[1].logprobs != policy.seen[2].logprobs
    assert policy.seen[1].draft_logprobs == policy.seen[2].draft_logprobs
    # The large slice first ran the step that medium had let pass.
    assert result.metrics.refreshed == result.steps[0].tokens


def test_a_lead_is_the_large_slices_for_as_many_steps(reasoner: Reasoner) -> None:
    policy = script(at(0, Lead(steps=2)))
    result = reasoner.generate(QUESTION, policy=policy)
    check(result)
    assert [s.decision for s in result.steps[:3]] == ["lead", "lead", "accept"]
    assert [s.step for s in policy.seen[:2]] == [0, 2]
    assert result.steps[0].retracted == policy.seen[0].text
    assert result.steps[1].retracted is None
    assert result.usage.rewritten == result.steps[0].tokens
    alone = reasoner.generate(QUESTION, strategy=Single(slice="large"))
    assert [s.token_ids for s in result.steps[:2]] == [s.token_ids for s in alone.steps[:2]]


@pytest.mark.parametrize("keep", [False, True])
def test_a_thought_can_be_ended(reasoner: Reasoner, keep: bool) -> None:
    policy = script(at(1, EndThinking(keep=keep)))
    result = reasoner.generate(QUESTION, policy=policy)
    check(result)
    decisions = [s.decision for s in result.steps if s.phase == "thinking"]
    assert decisions == (["accept", "accept", "forced"] if keep else ["accept", "forced"])
    forced: Step = next(s for s in result.steps if s.decision == "forced")
    assert forced.text == "</think>"
    assert (forced.retracted is None) == keep
    assert result.text and result.text.startswith(f"{result.reasoning}\n</think>")
    assert result.answer


def test_refreshing_makes_a_shared_cache_the_verifiers(reasoner: Reasoner) -> None:
    shared = Reasoner(reasoner.model, max_batch=1, max_length=384, consistency="shared")
    last: dict[str, Any] = {}

    def look(task: Task) -> None:
        last["audit"] = task.sequence.audit("large")

    def last_step(scores: StepScores) -> AnyDecision:
        return Refresh() if scores.phase == "answer" else Accept()

    gate = script(last_step, gate=lambda draft: draft.phase == "thinking")
    result = watched(shared, gate, look)
    check(result)
    assert result.steps[-1].decision == "refresh"
    assert last["audit"].ok
    assert result.metrics.refreshed >= result.usage.unverified
    assert result.metrics.refresh_seconds > 0
    stale = watched(shared, script(gate=lambda draft: draft.phase == "thinking"), look)
    assert stale.metrics.refreshed == 0 and not last["audit"].ok


# ---- steps that are kept unverified ----


def test_skipped_steps_are_repaired_by_the_next_verification(reasoner: Reasoner) -> None:
    policy = script(gate=lambda draft: draft.step in (0, 1))
    result = reasoner.generate(QUESTION, policy=policy)
    check(result)
    assert [s.decision for s in result.steps[:3]] == ["unverified", "unverified", "accept"]
    assert [d.progress.unverified for d in policy.asked[:4]] == [0, 1, 2, 0]
    assert [s.score is None for s in result.steps[:3]] == [True, True, False]
    assert result.metrics.refreshed == sum(s.tokens for s in result.steps[:2])
    verified = reasoner.generate(QUESTION, policy=Always())
    assert result.token_ids == verified.token_ids
    assert result.metrics.passes["large"] == verified.metrics.passes["large"] - 2 + 1


def test_after_a_verification_the_cache_is_the_verifiers_again(reasoner: Reasoner) -> None:
    found: list[bool] = []
    policy = script(gate=lambda draft: draft.phase == "thinking")
    watched(reasoner, policy, lambda task: found.append(task.sequence.audit("large").ok))
    policy = script(gate=lambda draft: True)
    watched(reasoner, policy, lambda task: found.append(task.sequence.audit("large").ok))
    assert found == [True, False]


def test_a_gate_saves_verifying_passes(reasoner: Reasoner) -> None:
    gated = reasoner.generate(HARD, policy=Gate())
    plain = reasoner.generate(HARD, policy=Threshold())
    for result in gated:
        check(result)
    passes = [sum(r.metrics.passes["large"] for r in results) for results in (gated, plain)]
    assert passes[0] < 0.7 * passes[1]


def test_cost_aware_decides_by_measured_times(reasoner: Reasoner) -> None:
    cheap = reasoner.generate(HARD, policy=CostAware(price=1e-9, gate=True))
    dear = reasoner.generate(HARD, policy=CostAware(price=1e9, gate=True))
    assert all(result.error is None for result in (*cheap, *dear))
    assert sum(r.usage.rewritten for r in cheap) == 0
    assert sum(r.usage.unverified for r in cheap) > sum(r.usage.unverified for r in dear)


# ---- settings ----


def test_a_delimiter_of_several_characters_may_span_tokens(reasoner: Reasoner) -> None:
    strategy = Stepwise(delimiter="= ", policy=Always(decision=Rewrite()))
    result = reasoner.generate(QUESTION, strategy=strategy)
    check(result)
    assert result.token_ids == reasoner.generate(QUESTION, strategy="single").token_ids
    thought = [s.text for s in result.steps if s.phase == "thinking" and s.text]
    assert len(thought) > 2
    assert all(text.endswith("= ") and text.count("= ") == 1 for text in thought[:-1])


def test_a_step_has_no_more_tokens_than_its_cap(reasoner: Reasoner) -> None:
    for policy in (Always(), script(lambda s: Rewrite(start=len(s.logprobs) - 1))):
        result = reasoner.generate(QUESTION, strategy=Stepwise(max_step_tokens=5, policy=policy))
        check(result)
        assert max(step.tokens for step in result.steps) == 5


def test_tiers_are_the_trained_slices_between(reasoner: Reasoner) -> None:
    roles = reasoner.roles
    assert Stepwise().tiers(reasoner.model, roles) == ("small", "medium", "large")
    assert Stepwise(draft="medium").tiers(reasoner.model, roles) == ("medium", "large")
    reasoner.model.slice_index("160x64")  # named on the way, not trained
    assert Stepwise().tiers(reasoner.model, roles) == ("small", "medium", "large")


def test_a_seed_fixes_the_tokens_in_any_batch(reasoner: Reasoner) -> None:
    params = [SamplingParams(temperature=1.5, seed=i) for i in range(len(HARD))]
    together = reasoner.generate(HARD, params, policy=Gate(policy=Threshold(reject=Escalate())))
    for i in (0, 7, 17):
        alone = reasoner.generate(
            HARD[i], params[i], policy=Gate(policy=Threshold(reject=Escalate()))
        )
        assert alone.token_ids == together[i].token_ids


def test_generation_may_end_in_any_part_of_a_step(reasoner: Reasoner) -> None:
    """In a kept beginning, in a rewrite, in a lead, in an escalated draft, in the forced end."""
    rules = {
        "rewrite": lambda s: Rewrite(start=len(s.logprobs) // 2),
        "lead": lambda s: Lead(steps=2),
        "escalate": lambda s: Escalate(),
        "end": lambda s: EndThinking(keep=True) if s.phase == "thinking" else Accept(),
        "gate": lambda s: Accept(),
    }
    ends = reasoner.codec.end_ids
    for name, rule in rules.items():
        gate = (lambda draft: draft.step % 2 == 0) if name == "gate" else (lambda draft: False)
        for limits in (
            {"stop": "4 "},
            {"stop": "k>"},
            *({"max_tokens": n} for n in range(1, 30, 7)),
        ):
            result = reasoner.generate(
                QUESTION, policy=script(rule, gate=gate), logprobs=0, **limits
            )
            check(result)
            assert result.logprobs and len(result.logprobs) == len(result.token_ids)
            if "max_tokens" in limits:
                assert len(result.token_ids) <= limits["max_tokens"]
                assert result.finish_reason == "length" or result.token_ids[-1] in ends
            else:
                assert result.text and limits["stop"] not in result.text


# ---- policies that fail ----


@pytest.mark.parametrize(
    ("policy", "message"),
    [
        (script(lambda s: 1 / 0), "raised ZeroDivisionError"),
        (script(gate=lambda d: 1 / 0), "raised ZeroDivisionError"),
        (script(lambda s: "accept"), r"returned 'accept'; decisions are Accept\(\)"),
        (script(lambda s: None), "returned None"),
        (script(lambda s: Rewrite(start=99)), "keep 99 tokens"),
        (script(gate=lambda d: "no"), "neither True nor False"),
        (script(lambda s: EndThinking() if s.phase == "answer" else Accept()), "of the answer"),
    ],
    ids=["raises", "gate raises", "text", "nothing", "too far", "gate's text", "no thought"],
)
def test_nonsense_ends_the_request_that_asked_and_no_other(
    reasoner: Reasoner, policy: Policy, message: str
) -> None:
    with pytest.raises(PolicyError, match=message):
        reasoner.generate(QUESTION, policy=policy)
    assert reasoner.cache.free_slots == reasoner.max_batch

    class Partly(Policy):
        """Sane for prompts other than QUESTION."""

        def decide(self, scores: StepScores) -> AnyDecision:
            return policy.decide(scores) if "57" in (scores.text or "57") else Accept()

        def skips(self, draft: DraftScores) -> bool:
            return policy.skips(draft) if "57" in (draft.text or "57") else False

    results = reasoner.generate([QUESTION.replace("57", "31"), QUESTION], policy=Partly())
    assert results[0].error is None and results[0].answer == "176"
    assert reasoner.cache.free_slots == reasoner.max_batch


def test_needs_that_do_not_exist_are_refused_with_those_that_do(reasoner: Reasoner) -> None:
    with pytest.raises(PolicyError, match=r"needs \['mood'\].*'divergence', 'draft', 'judge'"):
        reasoner.generate(QUESTION, policy=script(wanted=frozenset({"mood"})))
