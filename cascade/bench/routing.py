"""How many distinct experts a pass reads, counted on the tokens that were timed.

The plain pass is run once more over them and tells which experts each chose; it commits nothing.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from cascade.architecture import Architecture
from cascade.bench.report import Experts
from cascade.cache import Cache
from cascade.forward import Feed, forward
from cascade.sequence import Sequence as Row
from cascade.weights import ModelWeights


@torch.no_grad()
def chosen_experts(weights: ModelWeights, cache: Cache, rows: Sequence[Row]) -> list[Tensor]:
    """For every MoE layer the experts [R, T, k] that the rows' uncommitted tokens choose.

    Those are the last committed id and the drafted ids; every row must have as many.
    """
    feeds = [
        Feed(
            row.slot.index,
            row.slot.index,
            row.slot.folded,
            0,
            [*row.tokens[row.slot.folded :], *row.drafted],
        )
        for row in rows
    ]
    chosen: list[Tensor] = []
    forward(weights, cache.arch, cache.kernels, cache, cache.journal, feeds, chosen.append)
    return [experts.view(len(rows), len(feeds[0].ids), -1) for experts in chosen]


def distinct_a_step(chosen: Sequence[Tensor]) -> list[float]:
    """For every layer the distinct experts of one token a row, mean over the tokens of a row."""
    return [
        sum(len(step.unique()) for step in experts.unbind(1)) / experts.shape[1]
        for experts in chosen
    ]


def distinct_a_pass(chosen: Sequence[Tensor]) -> list[float]:
    """For every layer the distinct experts of all tokens together."""
    return [float(len(experts.unique())) for experts in chosen]


def summary(distinct: Sequence[float], arch: Architecture, tokens: int) -> Experts | None:
    """The mean over layers, beside what evenly spread routing gives: E (1 - (1 - k / E) ** b)."""
    if not distinct:
        return None
    spread = arch.experts * (1 - (1 - arch.top_k / arch.experts) ** tokens)
    return Experts(sum(distinct) / len(distinct), spread, arch.experts)
