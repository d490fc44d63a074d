"""Intervals and tests for scores of the same problems under several runs."""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from cascade.policies.binomial import binomial_cdf

LEVEL = 0.95
DRAWS = 10_000

Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Interval:
    """A mean and where it may lie, at 95 %."""

    mean: float
    low: float
    high: float


@dataclass(frozen=True, slots=True)
class Comparison:
    """Two runs over the problems that both have finished.

    difference: of the mean scores, the first less the second, with its bootstrap interval
    better, worse: problems on which the first scored more, or less
    p: two-sided; McNemar's exact test where scores are 0 or 1, else a test that flips the signs of
       the differences at random
    adjusted: p after Holm's correction for the comparisons made together
    """

    first: str
    second: str
    problems: int
    difference: Interval
    better: int
    worse: int
    p: float
    adjusted: float


def mean_interval(values: Seq[float], *, seed: int = 0) -> Interval:
    """The mean with its bootstrap percentile interval (10,000 resamples of the problems).

    Where all values are 0, or all are 1, resampling shows nothing; the interval is then the exact
    binomial one of Clopper and Pearson.
    """
    data = np.asarray(values, np.float64)
    n = len(data)
    if not n:
        return Interval(float("nan"), float("nan"), float("nan"))
    if data.min() == data.max() and data[0] in (0.0, 1.0):
        edge = ((1 - LEVEL) / 2) ** (1 / n)
        return Interval(1.0, edge, 1.0) if data[0] else Interval(0.0, 0.0, 1 - edge)
    # Resampling n values with replacement draws how often each distinct one occurs.
    distinct, counts = np.unique(data, return_counts=True)
    drawn = np.random.default_rng(seed).multinomial(n, counts / n, size=DRAWS)
    low, high = np.quantile(drawn @ distinct / n, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Interval(float(data.mean()), float(low), float(high))


def compare(scores: dict[str, dict[str, float]], pairs: Seq[tuple[str, str]]) -> list[Comparison]:
    """Paired comparisons of runs. scores: by run, then by problem."""
    found = []
    for first, second in pairs:
        shared = scores[first].keys() & scores[second].keys()
        d = np.array([scores[first][id] - scores[second][id] for id in sorted(shared)], np.float64)
        found.append(
            Comparison(
                first, second, len(d),
                _difference(d), int((d > 0).sum()), int((d < 0).sum()), paired_p(d), 1.0,
            )
        )  # fmt: skip
    adjusted = holm([c.p for c in found])
    return [replace(c, adjusted=p) for c, p in zip(found, adjusted, strict=True)]


def paired_p(differences: Floats) -> float:
    """Two-sided p for "the differences are as likely one way as the other"."""
    d = differences[differences != 0]
    if not len(d):
        return 1.0
    if set(np.abs(d)) == {1.0}:
        less = int(min((d > 0).sum(), (d < 0).sum()))
        return min(1.0, 2 * binomial_cdf(less, len(d), 0.5))
    signs = np.random.default_rng(0).choice([-1.0, 1.0], size=(DRAWS, len(d)))
    extreme = np.abs(signs @ d) >= abs(d.sum()) - 1e-12
    return float((extreme.sum() + 1) / (DRAWS + 1))


def holm(ps: Seq[float]) -> list[float]:
    """Holm's adjustment of p-values of tests that were made together."""
    adjusted, highest = [1.0] * len(ps), 0.0
    for rank, i in enumerate(sorted(range(len(ps)), key=ps.__getitem__)):
        highest = max(highest, min(1.0, ps[i] * (len(ps) - rank)))
        adjusted[i] = highest
    return adjusted


def wilson(right: float, n: int, z: float = 1.96) -> tuple[float, float]:
    """Wilson's interval for a share, for the small counts of a bin."""
    if not n:
        return 0.0, 1.0
    p, zz = right / n, z * z
    middle, half = p + zz / (2 * n), z * ((p * (1 - p) + zz / (4 * n)) / n) ** 0.5
    return max((middle - half) / (1 + zz / n), 0.0), min((middle + half) / (1 + zz / n), 1.0)


def auroc(scores: Seq[float], right: Seq[bool]) -> float | None:
    """Chance that a right item scores above a wrong one; None where all are the same."""
    s, r = np.asarray(scores, np.float64), np.asarray(right, bool)
    if r.all() or not r.any():
        return None
    ranks = np.empty(len(s))
    _, inverse, counts = np.unique(s, return_inverse=True, return_counts=True)
    ends = np.cumsum(counts)
    ranks = (ends - (counts - 1) / 2)[inverse]
    ups = int(r.sum())
    return float((ranks[r].sum() - ups * (ups + 1) / 2) / (ups * (len(s) - ups)))


def pareto(points: Seq[tuple[float, float]]) -> list[int]:
    """Which points (cost, gain) no other beats in both, by rising cost."""
    best, front = float("-inf"), []
    for i in sorted(range(len(points)), key=lambda i: (points[i][0], -points[i][1])):
        if points[i][1] > best:
            best = points[i][1]
            front.append(i)
    return front


def _difference(d: Floats) -> Interval:
    if not len(d):
        return Interval(float("nan"), float("nan"), float("nan"))
    if d.min() == d.max():
        return Interval(float(d[0]), float(d[0]), float(d[0]))
    return mean_interval(list(d))
