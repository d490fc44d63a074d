"""Threshold: what it keeps, where it cuts, and that it survives JSON."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from cascade.policies import Accept, Policy, Rewrite, StepScores, Threshold

logprobs = st.lists(st.floats(-20, 0, allow_nan=False), min_size=1, max_size=40).map(tuple)


def scores(values: tuple[float, ...]) -> StepScores:
    return StepScores(step=0, phase="thinking", drafter="small", verifier="large", logprobs=values)


def test_a_step_of_likely_tokens_is_kept() -> None:
    assert Threshold(probability=0.5).decide(scores((-0.1, -0.2))) == Accept()


def test_a_step_is_rewritten_from_its_first_unlikely_token() -> None:
    decision = Threshold(probability=0.5).decide(scores((-0.1, -0.9, -5.0, -0.1)))
    assert decision == Rewrite(start=1)


@given(logprobs, st.floats(0.01, 0.99), st.sampled_from(["min", "mean"]))
def test_what_is_kept_before_a_rewrite_passed_the_threshold(
    values: tuple[float, ...], probability: float, score: str
) -> None:
    decision = Threshold(probability=probability, score=score).decide(scores(values))
    limit = math.log(probability)
    if isinstance(decision, Rewrite):
        assert values[decision.start] < limit
        assert all(value >= limit for value in values[: decision.start])
    else:
        summary = min(values) if score == "min" else sum(values) / len(values)
        assert summary >= limit


def test_a_policy_survives_json() -> None:
    policy = Threshold(score="mean", probability=0.25)
    assert Threshold.model_validate_json(policy.model_dump_json()) == policy


@pytest.mark.parametrize("probability", [0, 1, -0.5, 1.5])
def test_a_probability_outside_zero_and_one_is_refused(probability: float) -> None:
    with pytest.raises(ValidationError):
        Threshold(probability=probability)


def test_unknown_settings_are_refused() -> None:
    with pytest.raises(ValidationError):
        Threshold(treshold=0.5)


def test_a_step_without_tokens_has_no_score() -> None:
    with pytest.raises(ValidationError):
        scores(())


def test_policies_are_frozen() -> None:
    with pytest.raises(ValidationError):
        Threshold().probability = 0.9  # type: ignore[misc]


def test_a_policy_must_decide() -> None:
    with pytest.raises(TypeError):
        Policy()  # type: ignore[abstract]
