"""p-values for "the mean loss is above a level", from independent losses in [0, 1]."""

from __future__ import annotations

import math
from collections.abc import Sequence


def binomial_cdf(k: int, n: int, p: float) -> float:
    """P(X <= k) for X binomial with n trials of probability p, 0 < p < 1."""
    if k < 0:
        return 0.0
    if k >= n:
        return 1.0
    log_p, log_q = math.log(p), math.log1p(-p)
    top = math.lgamma(n + 1)
    logs = [
        top - math.lgamma(i + 1) - math.lgamma(n - i + 1) + i * log_p + (n - i) * log_q
        for i in range(k + 1)
    ]
    return min(math.fsum(map(math.exp, logs)), 1.0)


def p_value(losses: Sequence[float], level: float) -> float:
    """Under a mean loss above `level`, this is at most t with probability at most t.

    Losses that are all 0 or 1: the exact binomial tail. Otherwise the bound of Hoeffding and
    Bentkus (Bates et al., Distribution-Free, Risk-Controlling Prediction Sets, 2021, section 3.1).
    """
    n, total = len(losses), math.fsum(losses)
    if is_binary(losses):
        return binomial_cdf(round(total), n, level)
    mean = total / n
    if mean >= level:
        return 1.0
    hoeffding = math.exp(-n * _relative_entropy(mean, level))
    bentkus = math.e * binomial_cdf(math.ceil(total), n, level)
    return min(hoeffding, bentkus, 1.0)


def is_binary(losses: Sequence[float]) -> bool:
    return all(loss in (0, 1) for loss in losses)


def runs_needed(rate: float, level: float, delta: float) -> int | None:
    """About how many runs of this mean loss, 0 or 1 each, pass; None for a rate not below level."""
    if rate >= level:
        return None
    n = 1
    while binomial_cdf(math.ceil(rate * n), n, level) > delta and n < 10**6:
        n *= 2
    low, high = n // 2, n
    while high - low > 1:
        middle = (low + high) // 2
        if binomial_cdf(math.ceil(rate * middle), middle, level) > delta:
            low = middle
        else:
            high = middle
    return high


def _relative_entropy(a: float, b: float) -> float:
    """h(a, b) of two Bernoulli distributions, in nats."""
    first = a * math.log(a / b) if a else 0.0
    second = (1 - a) * math.log((1 - a) / (1 - b)) if a < 1 else 0.0
    return first + second
