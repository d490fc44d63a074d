"""Binomial tails and p-values: exact where they can be, valid everywhere."""

import math
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cascade.policies.binomial import binomial_cdf, p_value, runs_needed


@given(st.integers(1, 40), st.integers(-1, 41), st.floats(0.01, 0.99))
def test_the_tail_is_the_sum_of_the_terms(n: int, k: int, p: float) -> None:
    terms = [math.comb(n, i) * p**i * (1 - p) ** (n - i) for i in range(min(k, n) + 1)]
    assert binomial_cdf(k, n, p) == pytest.approx(math.fsum(terms), abs=1e-12)


def test_binary_losses_are_tested_exactly() -> None:
    assert p_value([0.0] * 29, 0.1) == pytest.approx(0.9**29)
    assert p_value([1.0, *[0.0] * 49], 0.1) == pytest.approx(0.9**50 + 50 * 0.1 * 0.9**49)


def test_other_losses_by_hoeffding_and_bentkus() -> None:
    losses = [0.5, *[0.0] * 99]
    hoeffding = math.exp(-100 * (0.005 * math.log(0.005 / 0.1) + 0.995 * math.log(0.995 / 0.9)))
    bentkus = math.e * binomial_cdf(1, 100, 0.1)
    assert p_value(losses, 0.1) == pytest.approx(min(hoeffding, bentkus))
    assert p_value([0.5] * 10, 0.4) == 1.0


@pytest.mark.parametrize("kind", ["binary", "thirds", "uniform"])
@pytest.mark.parametrize("n", [20, 150])
def test_a_true_mean_at_the_level_is_rarely_rejected(kind: str, n: int) -> None:
    """At most 10 % of 2,000 seeded samples; 12.5 % would be four standard errors above."""
    level = 0.2
    rng = random.Random(5)
    draw = {
        "binary": lambda: float(rng.random() < level),
        "thirds": lambda: rng.choice([0.0] * 7 + [1 / 3] * 2 + [1.0]),
        "uniform": lambda: rng.random() * 2 * level,
    }[kind]
    mean = {"binary": level, "uniform": level, "thirds": (2 / 3 + 1) / 10}[kind]
    rejected = sum(p_value([draw() for _ in range(n)], mean) <= 0.1 for _ in range(2000))
    assert rejected / 2000 <= 0.125


@pytest.mark.parametrize("rate", [0.0, 0.01, 0.04])
def test_the_number_of_runs_said_to_be_needed_suffices(rate: float) -> None:
    n = runs_needed(rate, 0.05, 0.1)
    assert n is not None
    assert binomial_cdf(math.ceil(rate * n), n, 0.05) <= 0.1
    fewer = n * 9 // 10
    assert binomial_cdf(math.ceil(rate * fewer), fewer, 0.05) > 0.1 or rate > 0


def test_no_number_of_runs_shows_what_is_not_so() -> None:
    assert runs_needed(0.05, 0.05, 0.1) is None
