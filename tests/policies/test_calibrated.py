"""Calibrated: the guarantee over many calibrations, the order of tests, and what it refuses."""

import random
from collections.abc import Callable

import pytest
from pydantic import ValidationError

from cascade.policies import (
    Accept,
    Always,
    Calibrated,
    EndThinking,
    Escalate,
    Gate,
    LabelledRun,
    LabelledStep,
    Lead,
    Policy,
    Rewrite,
    Target,
    TargetNotMet,
    Threshold,
    TooFewRuns,
    Trial,
    all_of,
    calibrate,
    replay,
)
from tests.policies.steps import known, step

VALUES = (0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1)


def risk(policy: Policy) -> float:
    """True rate of loss at a threshold in the simulations below: 0.02 at 0.9 up to 0.34 at 0.1."""
    assert isinstance(policy, Threshold)
    return 0.02 + 0.4 * (0.9 - policy.probability)


def simulated(count: int, seed: int) -> Callable[[Policy], list[Trial]]:
    """Independent problems: each is lost below a threshold of its own, so tests are dependent."""
    rng = random.Random(seed)
    limits = [rng.random() for _ in range(count)]

    def measure(policy: Policy) -> list[Trial]:
        rate = risk(policy)
        return [Trial(loss=limit < rate, escalated=(1 - rate) * limit) for limit in limits]

    return measure


@pytest.mark.parametrize(("lose", "delta"), [(0.1, 0.1), (0.2, 0.3), (0.141, 0.1)])
def test_the_target_is_missed_no_more_often_than_promised(lose: float, delta: float) -> None:
    """600 seeded calibrations on 120 problems each.

    The rate of those whose setting truly loses more than the target may pass delta only by three
    standard errors.
    """
    missed = passed = 0
    for seed in range(600):
        try:
            found = calibrate(
                Threshold(), Target(lose=lose, delta=delta), simulated(120, seed), values=VALUES
            )
        except TargetNotMet:
            continue
        passed += 1
        missed += risk(found.policy) > lose
    allowed = delta + 3 * (delta * (1 - delta) / 600) ** 0.5
    assert missed / 600 <= allowed
    assert passed > 400


def test_a_guarantee_on_escalation_holds_as_often() -> None:
    """Losses between 0 and 1: mean escalation is (1 - risk) / 2, at 0.9 above and at 0.1 below."""
    missed = passed = 0
    for seed in range(200):
        try:
            target = Target(escalate=0.42, delta=0.2)
            found = calibrate(Threshold(), target, simulated(400, seed), values=VALUES)
        except TargetNotMet:
            continue
        passed += 1
        missed += (1 - risk(found.policy)) / 2 > 0.42
    assert missed / 200 <= 0.2 + 3 * (0.2 * 0.8 / 200) ** 0.5
    assert passed > 100


def test_losing_little_is_tested_from_strict_to_lenient_until_the_first_failure() -> None:
    found = calibrate(Threshold(), Target(lose=0.15), simulated(300, 1), values=VALUES)
    tested = [test.value for test in found.tests]
    assert tested == list(VALUES[: len(tested)])
    assert all(test.p_value <= 0.1 for test in found.tests[:-1])
    assert found.tests[-1].p_value > 0.1
    assert found.policy == Threshold(probability=tested[-2])
    assert found.runs == 300


def test_escalating_little_is_tested_from_the_other_end() -> None:
    found = calibrate(Threshold(), Target(escalate=0.45), simulated(300, 1), values=VALUES)
    tested = [test.value for test in found.tests]
    assert tested == list(reversed(VALUES))[: len(tested)]


def test_it_decides_as_the_policy_that_it_chose() -> None:
    found = calibrate(Threshold(), Target(lose=0.2), simulated(300, 2), values=(0.9, 0.8))
    assert found.policy == Threshold(probability=0.8)
    assert found.decide(step(known(0.85))) == Accept()
    assert found.decide(step(known(0.75))) == Rewrite()
    assert Calibrated.model_validate_json(found.model_dump_json()) == found


@pytest.mark.parametrize(("lose", "delta", "fewest"), [(0.1, 0.1, 22), (0.02, 0.1, 114)])
def test_it_says_when_the_runs_are_too_few(lose: float, delta: float, fewest: int) -> None:
    target = Target(lose=lose, delta=delta)
    assert target.fewest_runs == fewest
    assert (1 - lose) ** fewest <= delta < (1 - lose) ** (fewest - 1)
    with pytest.raises(TooFewRuns, match=f"at least {fewest}"):
        calibrate(Threshold(), target, lambda p: [Trial(loss=0, escalated=0)] * (fewest - 1))
    calibrate(Threshold(), target, lambda p: [Trial(loss=0, escalated=0)] * fewest)


def test_it_says_how_many_runs_would_show_it_at_this_rate() -> None:
    trials = [Trial(loss=i < 3, escalated=0) for i in range(100)]
    with pytest.raises(TargetNotMet, match=r"loses 3.00% over 100 runs.* about \d+ runs"):
        calibrate(Threshold(), Target(lose=0.05), lambda p: trials)
    with pytest.raises(TargetNotMet, match="loosen the target"):
        calibrate(Threshold(), Target(lose=0.025), lambda p: trials)


def test_a_dial_that_the_policy_lacks_is_refused() -> None:
    with pytest.raises(ValueError, match=r"no field 'probability'.*decision"):
        calibrate(Always(), Target(lose=0.1), simulated(100, 1))
    with pytest.raises(ValidationError):
        calibrate(Threshold(), Target(lose=0.1), simulated(100, 1), values=(1.5,))


@pytest.mark.parametrize("settings", [{}, {"lose": 0.1, "escalate": 0.1}, {"lose": 0}, {"lose": 1}])
def test_a_target_is_one_thing(settings: dict) -> None:
    with pytest.raises(ValidationError):
        Target(**settings)


# ---- replay ----


def run(*steps: tuple[int, tuple[float, ...]], reference: float = 1.0) -> LabelledRun:
    """A run by (agreed, probabilities) of its steps."""
    return LabelledRun(
        steps=tuple(
            LabelledStep(scores=step(*map(known, p), step=i), agreed=agreed)
            for i, (agreed, p) in enumerate(steps)
        ),
        reference=reference,
    )


def test_a_run_is_lost_once_a_token_is_kept_that_the_verifier_would_not_have_written() -> None:
    labelled = run((2, (0.9, 0.9)), (1, (0.9, 0.6)))
    assert replay(Threshold(probability=0.7), labelled) == Trial(loss=0, escalated=0.5)
    assert replay(Threshold(probability=0.5), labelled) == Trial(loss=1, escalated=0)
    assert replay(Always(decision=Rewrite(start=1)), labelled) == Trial(loss=0, escalated=1)


def test_nothing_can_be_lost_where_the_verifier_was_wrong_itself() -> None:
    labelled = run((0, (0.9,)), reference=0.0)
    assert replay(Always(), labelled).loss == 0


def test_a_lead_escalates_the_steps_after_it_too() -> None:
    labelled = run(*[(0, (0.5,))] * 5)
    policy = Always(decision=Lead(steps=2))
    assert replay(policy, labelled) == Trial(loss=0, escalated=1)


@pytest.mark.parametrize("decision", [Escalate(), EndThinking()])
def test_what_labels_cannot_show_is_refused(decision: object) -> None:
    with pytest.raises(ValueError, match="in runs of its own"):
        replay(Always(decision=decision), run((1, (0.9,))))


def test_skipped_verification_is_refused_too() -> None:
    scores = step(known(0.9), draft_logprobs=(-0.001,))
    labelled = LabelledRun(steps=(LabelledStep(scores=scores, agreed=1),), reference=1)
    with pytest.raises(ValueError, match="skips verification"):
        replay(all_of(Gate()), labelled)


def test_no_more_tokens_can_agree_than_were_drafted() -> None:
    with pytest.raises(ValidationError, match="cannot agree"):
        LabelledStep(scores=step(-0.1), agreed=2)
