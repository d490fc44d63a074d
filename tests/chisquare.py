"""Do observed outcomes follow known probabilities? Pearson's test, with small cells pooled."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Iterable, Mapping

import torch


def p_value(observed: Iterable[Hashable], expected: Mapping[Hashable, float]) -> float:
    """Chance of a deviation at least as large if outcomes have the expected probabilities.

    0 where something happened that has no probability. Outcomes expected fewer than five times are
    counted as one.
    """
    counts = Counter(observed)
    total = sum(counts.values())
    if any(expected.get(outcome, 0.0) <= 0 for outcome in counts):
        return 0.0
    cells: list[tuple[float, float]] = []
    rare = [0.0, 0.0]
    for outcome, probability in expected.items():
        seen, wanted = float(counts[outcome]), total * probability
        if wanted >= 5:
            cells.append((seen, wanted))
        else:
            rare[0] += seen
            rare[1] += wanted
    if rare[1] >= 5:
        cells.append((rare[0], rare[1]))
    statistic = sum((seen - wanted) ** 2 / wanted for seen, wanted in cells)
    half = torch.tensor([(len(cells) - 1) / 2, statistic / 2], dtype=torch.float64)
    return float(torch.special.gammaincc(half[0], half[1]))
