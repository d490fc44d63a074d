"""Intervals and tests do what they say, at a stated false-alarm rate."""

import numpy as np
import pytest

from cascade.evaluation.statistics import (
    auroc,
    compare,
    holm,
    mean_interval,
    paired_p,
    pareto,
    wilson,
)


def test_intervals_cover_the_mean_about_as_often_as_they_say() -> None:
    """300 samples of 80 items; outside 91 to 98.5 % with probability below 1e-3 if 95 % is true.

    The percentile bootstrap covers slightly less than 95 % of the time at this size.
    """
    rng = np.random.default_rng(0)
    inside = 0
    for i in range(300):
        found = mean_interval(list(rng.random(80) < 0.7), seed=i)
        inside += found.low <= 0.7 <= found.high
    assert 0.91 <= inside / 300 <= 0.985


def test_an_interval_of_equal_scores_is_the_exact_binomial_one() -> None:
    assert mean_interval([1.0] * 20).low == pytest.approx(0.8316, abs=1e-4)
    assert mean_interval([0.0] * 20).high == pytest.approx(0.1684, abs=1e-4)
    assert mean_interval([1.0] * 20).high == 1
    assert np.isnan(mean_interval([]).mean)


def test_an_interval_of_partial_scores_holds_their_mean() -> None:
    values = list(np.random.default_rng(1).random(50))
    found = mean_interval(values)
    assert found.low < np.mean(values) == found.mean < found.high
    assert found == mean_interval(values)  # seeded


def test_mcnemar_is_exact() -> None:
    def p(better: int, worse: int) -> float:
        return paired_p(np.array([1.0] * better + [-1.0] * worse + [0.0] * 30))

    assert p(0, 0) == 1
    assert p(6, 0) == pytest.approx(2 / 2**6)
    assert p(9, 1) == pytest.approx(2 * 11 / 2**10)
    assert p(5, 5) == 1


def test_partial_scores_are_tested_by_flipping_signs() -> None:
    rng = np.random.default_rng(2)
    assert paired_p(rng.normal(0.5, 0.3, 40)) < 0.001
    under_null = [paired_p(rng.normal(0, 1, 25)) for _ in range(100)]
    assert sum(p < 0.05 for p in under_null) <= 14  # binomial(100, 0.05) passes 14 with p < 1e-3


def test_runs_are_compared_on_what_both_have_finished() -> None:
    scores = {
        "a": {"1": 1.0, "2": 1.0, "3": 0.0, "4": 1.0},
        "b": {"1": 1.0, "2": 0.0, "3": 0.0},
        "c": {},
    }
    first, second = compare(scores, [("a", "b"), ("a", "c")])
    assert (first.problems, first.better, first.worse) == (3, 1, 0)
    assert first.difference.mean == pytest.approx(1 / 3)
    assert second.problems == 0 and np.isnan(second.difference.mean)


def test_holm_is_what_holm_wrote() -> None:
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.5, 0.9]) == [1.0, 1.0]
    assert holm([]) == []


def test_auroc_counts_ties_half() -> None:
    assert auroc([0.1, 0.9], [False, True]) == 1
    assert auroc([0.5, 0.5], [False, True]) == 0.5
    assert auroc([0.2, 0.4, 0.4, 0.6], [True, False, True, True]) == pytest.approx(0.5)
    assert auroc([0.2], [True]) is None


def test_the_frontier_holds_what_nothing_beats() -> None:
    points = [(1, 0.5), (2, 0.4), (2, 0.9), (3, 0.9), (4, 0.95), (0.5, 0.1)]
    assert pareto(points) == [5, 0, 2, 4]
    assert pareto([]) == []


def test_wilson_is_inside_the_unit_interval() -> None:
    low, high = wilson(10, 10)
    assert 0.72 < low < 0.73 and high == 1
    assert wilson(0, 0) == (0, 1)
