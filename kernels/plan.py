"""Which experts a short pass runs for which of its tokens."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Plan(NamedTuple):
    """Which experts run for which tokens: (token, expert) pairs by expert, cut into items.

    items:   [3, I] int32: expert, first pair and number of pairs, at most `item_tokens`
    counts:  [2] int32: items that are there, distinct experts
    tokens:  [n * k] int32, the pairs' tokens, ascending within an expert
    weights: [n * k] fp32
    """

    items: Tensor
    counts: Tensor
    tokens: Tensor
    weights: Tensor
    item_tokens: int

    @classmethod
    def empty(cls, tokens: int, experts: int, top_k: int, device: torch.device) -> Plan:
        item_tokens = 8 if tokens <= 64 else 16
        held = min(tokens * top_k, experts + tokens * top_k // item_tokens)
        return cls(
            torch.zeros(3, held, dtype=torch.int32, device=device),
            torch.zeros(2, dtype=torch.int32, device=device),
            torch.zeros(tokens * top_k, dtype=torch.int32, device=device),
            torch.zeros(tokens * top_k, dtype=torch.float32, device=device),
            item_tokens,
        )
