"""Logistic: the fit against its own optimality condition, and what it refuses to fit."""

import math
import random

import pytest

from cascade.policies import (
    Accept,
    LabelledRun,
    LabelledStep,
    Lead,
    Logistic,
    Rewrite,
    TooFewRuns,
    all_of,
)
from cascade.policies.logistic import fit_logistic, sigmoid
from tests.policies.steps import step


def examples(count: int, seed: int) -> tuple[list[list[float]], list[bool]]:
    """Rows drawn from a logistic model with weights 2 and -1 and bias 0.5."""
    rng = random.Random(seed)
    rows = [[rng.gauss(0, 1), rng.gauss(3, 2)] for _ in range(count)]
    return rows, [rng.random() < sigmoid(2 * a - b + 0.5) for a, b in rows]


def test_the_gradient_vanishes_at_the_fit() -> None:
    rows, good = examples(400, 1)
    weights, bias = fit_logistic(rows, good, 1e-9)
    residuals = [
        y - sigmoid(bias + sum(w * x for w, x in zip(weights, row, strict=True)))
        for row, y in zip(rows, good, strict=True)
    ]
    assert abs(math.fsum(residuals)) < 1e-6
    for j in range(2):
        assert abs(math.fsum(r * row[j] for r, row in zip(residuals, rows, strict=True))) < 1e-6


def test_the_true_model_is_found_again() -> None:
    weights, bias = fit_logistic(*examples(20_000, 2), 1.0)
    assert weights == pytest.approx([2, -1], abs=0.1)
    assert bias == pytest.approx(0.5, abs=0.15)


def test_separable_data_and_a_constant_feature_stay_finite() -> None:
    rows = [[float(i), 7.0] for i in range(40)]
    weights, bias = fit_logistic(rows, [i >= 20 for i in range(40)], 1.0)
    assert math.isfinite(bias) and all(map(math.isfinite, weights))
    assert weights[1] == pytest.approx(0)
    assert sigmoid(bias + weights[0] * 39) > 0.9 > 0.1 > sigmoid(bias)


def labelled(good: bool, number: int) -> LabelledStep:
    logs = (-0.1 - number % 5 / 50,) if good else (-0.2, -2.0 - number % 7 / 10)
    scores = step(*logs, divergences=tuple(-x for x in logs))
    return LabelledStep(scores=scores, agreed=1)


def test_a_fitted_policy_tells_good_steps_from_bad_ones() -> None:
    runs = [
        LabelledRun(steps=tuple(labelled(j % 3 > 0, i + j) for j in range(6)), reference=1)
        for i in range(20)
    ]
    policy = Logistic().fitted(runs)
    assert isinstance(policy, Logistic) and not policy.learns
    assert policy.decide(labelled(True, 3).scores) == Accept()
    assert policy.decide(labelled(False, 3).scores) == Rewrite(start=1)
    assert policy.fitted([]) is policy
    inside = all_of(Logistic()).fitted(runs)
    assert inside == all_of(policy)


def test_what_becomes_of_a_bad_step_can_be_chosen() -> None:
    policy = Logistic(scores=("min",), weights=(1.0,), bias=-5.0, reject=Lead())
    assert policy.decide(step(-3.0)) == Lead()


def test_it_refuses_to_decide_before_it_is_fitted() -> None:
    with pytest.raises(ValueError, match="fitted first"):
        Logistic(scores=("min",)).decide(step(-0.1))


@pytest.mark.parametrize("good", [[True] * 60, [False] * 60, [True, False] * 10])
def test_too_few_or_one_sided_steps_are_refused(good: list[bool]) -> None:
    steps = tuple(labelled(g, i) for i, g in enumerate(good))
    with pytest.raises(TooFewRuns, match="gather more runs"):
        Logistic().fitted([LabelledRun(steps=steps, reference=1)])
