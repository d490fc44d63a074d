"""Labels from both slices on nano, and policies calibrated on them."""

from __future__ import annotations

import math
from dataclasses import dataclass

import pytest

from cascade import Reasoner
from cascade.calibration import labelled_runs
from cascade.errors import CalibrationError, RequestError
from cascade.policies import (
    Always,
    AtMost,
    Escalate,
    LabelledRun,
    Logistic,
    Rewrite,
    Target,
    Threshold,
    replay,
)
from cascade.policies.scores import NEEDS
from cascade.problems import Problem, nano_problems
from cascade.strategies import Single, Stepwise

PROBLEMS = nano_problems(40, 501)


@pytest.fixture(scope="module")
def reasoner() -> Reasoner:
    return Reasoner.from_pretrained("nano", max_batch=40, max_length=384)


@pytest.fixture(scope="module")
def labels(reasoner: Reasoner) -> list[tuple[Problem, LabelledRun]]:
    return list(labelled_runs(reasoner, PROBLEMS, needs=NEEDS))  # type: ignore[arg-type]


def test_the_labelled_path_is_the_large_slices_own(
    reasoner: Reasoner, labels: list[tuple[Problem, LabelledRun]]
) -> None:
    assert {problem.id for problem, _ in labels} == {problem.id for problem in PROBLEMS}
    questions = [problem.question for problem, _ in labels]
    alone = reasoner.generate(questions, strategy=Single(slice="large"))
    for (problem, run), result in zip(labels, alone, strict=True):
        assert run.reference == problem.score(result.answer)
        assert len(run.steps) == len(result.steps)
        for labelled, step in zip(run.steps, result.steps, strict=True):
            draft = reasoner.codec.encode(labelled.scores.text or "")
            assert draft[: labelled.agreed] == list(step.token_ids[: labelled.agreed])
            assert labelled.good == (draft == list(step.token_ids))
            figures = labelled.scores
            assert figures.divergences and figures.entropies and figures.judge is not None
    steps = [step for _, run in labels for step in run.steps]
    assert 0.02 < sum(not step.good for step in steps) / len(steps) < 0.3


def test_drafts_are_those_that_stepwise_makes(
    reasoner: Reasoner, labels: list[tuple[Problem, LabelledRun]]
) -> None:
    """A policy that rewrites from the first token that disagrees walks the same states."""
    problem, run = next((p, r) for p, r in labels if any(not s.good for s in r.steps))
    result = reasoner.generate(problem.question, policy=Always(decision=Rewrite()))
    assert [s.retracted for s in result.steps] == [s.scores.text for s in run.steps]
    found = [math.log(s.score or 0) for s in result.steps]
    assert found == pytest.approx([s.scores.min_logprob for s in run.steps], abs=1e-3)


def test_replays_bound_what_runs_lose(
    reasoner: Reasoner, labels: list[tuple[Problem, LabelledRun]]
) -> None:
    for probability in (0.9, 0.01):
        policy = Threshold(probability=probability)
        questions = [problem.question for problem, _ in labels]
        results = reasoner.generate(questions, policy=policy)
        for (problem, run), result in zip(labels, results, strict=True):
            lost = max(run.reference - problem.score(result.answer), 0)
            trial = replay(policy, run)
            assert lost <= trial.loss
            if run.reference and trial.loss == 0:  # the path was never left
                escalated = sum(s.decision == "rewrite" for s in result.steps) / len(result.steps)
                assert trial.escalated == pytest.approx(escalated)


def test_a_threshold_is_calibrated_to_lose_little(
    reasoner: Reasoner, labels: list[tuple[Problem, LabelledRun]]
) -> None:
    found = reasoner.calibrate(PROBLEMS, "threshold", target=Target(lose=0.15, delta=0.2))
    again = reasoner.calibrate(
        [],
        Threshold(),
        target=Target(lose=0.15, delta=0.2),
        runs=[run for _, run in labels],
    )
    assert found == again
    assert found.runs == len(PROBLEMS) and found.source == "labels"
    assert found.tests[0].p_value <= 0.2
    result = reasoner.generate(PROBLEMS[0].question, policy=found)
    assert result.error is None


def test_any_policy_is_calibrated_by_running_it(reasoner: Reasoner) -> None:
    found = reasoner.calibrate(
        PROBLEMS[:16],
        Threshold(reject=Escalate()),
        target=Target(escalate=0.4, delta=0.2),
        source="runs",
        values=(0.9, 0.5),
    )
    assert found.source == "runs"
    assert found.policy.reject == Escalate()  # type: ignore[attr-defined]
    assert 0 < found.tests[0].mean < 0.4


def test_a_policy_that_learns_is_fitted_on_other_problems_than_it_is_tested_on(
    reasoner: Reasoner, labels: list[tuple[Problem, LabelledRun]]
) -> None:
    runs = [run for _, run in labels]
    found = reasoner.calibrate(
        [], Logistic(scores=("min", "divergence")), target=Target(lose=0.3, delta=0.2), runs=runs
    )
    assert found.runs == len(runs) - len(runs) // 2
    first_half = Logistic(scores=("min", "divergence")).fitted(runs[: len(runs) // 2])
    assert found.policy.weights == first_half.weights  # type: ignore[attr-defined]


def test_too_few_problems_are_said_before_any_work(reasoner: Reasoner) -> None:
    with pytest.raises(CalibrationError, match=r"40 problems to test on are too few.*at least 230"):
        reasoner.calibrate(PROBLEMS, Threshold(), target=Target(lose=0.01))
    with pytest.raises(CalibrationError, match="20 problems to test on"):
        reasoner.calibrate(PROBLEMS, Logistic(), target=Target(lose=0.05))


def test_a_target_that_no_setting_holds_is_an_error(
    reasoner: Reasoner, labels: list[tuple[Problem, LabelledRun]]
) -> None:
    runs = [run for _, run in labels]
    with pytest.raises(CalibrationError, match="the safest setting"):
        reasoner.calibrate(
            [], Threshold(score="draft_mean"), target=Target(lose=0.1), runs=runs, values=(0.01,)
        )


@pytest.mark.parametrize(
    ("policy", "settings", "message"),
    [
        (Threshold(reject=Escalate()), {}, "source='runs'"),
        (AtMost(share=0.2, policy=Threshold()), {"dial": "share"}, "AtMost decides by"),
        (Always(), {}, "no field 'probability'"),
        (Threshold(), {"values": (2.0,)}, "does not fit"),
    ],
    ids=["escalates", "progress", "no dial", "values"],
)
def test_what_labels_cannot_show_is_refused(
    reasoner: Reasoner,
    labels: list[tuple[Problem, LabelledRun]],
    policy: object,
    settings: dict,
    message: str,
) -> None:
    runs = [run for _, run in labels]
    with pytest.raises(RequestError, match=message):
        reasoner.calibrate([], policy, target=Target(lose=0.3), runs=runs, **settings)  # type: ignore[arg-type]


def test_labels_belong_to_exact_mode(reasoner: Reasoner) -> None:
    shared = Reasoner(reasoner.model, max_batch=1, max_length=64, consistency="shared")
    with pytest.raises(RequestError, match="exact mode"):
        shared.calibrate(PROBLEMS, Threshold(), target=Target(lose=0.3))


@dataclass
class Odd:
    question: str = PROBLEMS[0].question

    def score(self, answer: str | None) -> float:
        return 17.0


def test_a_score_is_a_share(reasoner: Reasoner) -> None:
    with pytest.raises(RequestError, match="a score is 0 to 1"):
        list(labelled_runs(reasoner, [Odd()]))


def test_labelled_runs_come_one_by_one_and_can_be_stopped(reasoner: Reasoner) -> None:
    runs = labelled_runs(reasoner, PROBLEMS[:30], strategy=Stepwise(draft="medium"))
    _, run = next(runs)
    assert run.steps[0].scores.drafter == "medium"
    runs.close()  # type: ignore[attr-defined]
    assert reasoner.cache.free_slots == reasoner.max_batch
