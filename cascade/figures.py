"""From logits to the plain numbers that policies see. All at temperature 1, before any filter."""

from __future__ import annotations

from collections.abc import Sequence as Seq

import torch
from torch import Tensor


def logprobs_of(ids: Seq[int], table: Tensor) -> list[float]:
    """Natural-log probability of each id under its row of logits [at least len(ids), V]."""
    chosen = torch.tensor(ids, dtype=torch.int64, device=table.device)[:, None]
    picked: list[float] = table[: len(ids)].log_softmax(-1).gather(1, chosen)[:, 0].tolist()
    return picked


def draft_figures(ids: Seq[int], table: Tensor) -> dict[str, tuple[float, ...]]:
    """The drafter's own view of its ids, by field of DraftScores; table: its logits [k, V]."""
    logs = table.log_softmax(-1)
    probs = logs.exp()
    best = probs.topk(2, -1).values
    entropies = -(probs * logs.clamp(min=torch.finfo(logs.dtype).min)).sum(-1)
    return {
        "draft_logprobs": tuple(logprobs_of(ids, table)),
        "entropies": tuple(entropies.tolist()),
        "margins": tuple((best[:, 0] - best[:, 1]).tolist()),
    }


def divergences(drafter: Tensor, verifier: Tensor) -> tuple[float, ...]:
    """Kullback-Leibler divergence in nats of the drafter from the verifier; logits [k, V] of both.

    Sum over the vocabulary of q (log q - log p), q the drafter's probabilities.
    """
    q, p = drafter.log_softmax(-1), verifier.log_softmax(-1)
    found: list[float] = (q.exp() * (q - p)).sum(-1).clamp(min=0).tolist()
    return tuple(found)


def likeliest(row: Tensor, token: int, count: int) -> dict[int, float]:
    """Log-probabilities under logits [V]: of the `count` likeliest ids, and of `token`."""
    logs = row.log_softmax(0)
    found: dict[int, float] = {}
    if count:
        top = logs.topk(min(count, len(logs)))
        found = dict(zip(top.indices.tolist(), top.values.tolist(), strict=True))
    found[token] = float(logs[token])
    return found
