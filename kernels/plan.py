"""Which experts a short pass runs for which of its tokens."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Choice(NamedTuple):
    """What the experts of each token are chosen by; see `reference.route`.

    router:    [E, K], possibly a prefix view
    bias:      [E] fp32, added to the scores for the choice alone
    counts:    [R], tokens that count of each row; the others choose none
    normalise: whether a token's weights are divided by their sum; scale: their factor
    """

    router: Tensor
    bias: Tensor
    counts: Tensor
    top_k: int
    normalise: bool
    scale: float


class Plan(NamedTuple):
    """Which experts run for which tokens: (token, expert) pairs by expert, cut into items.

    items:   [3, I] int32: expert, first pair and number of pairs, at most `item_tokens`
    counts:  [2] int32: items that are there, distinct experts
    tokens:  [n * k] int32, the pairs' tokens, ascending within an expert
    weights: [n * k] fp32
    places:  [n * k] int32, the pair of each token's choices, below zero for none
    shares:  [n * k] fp32, their weights
    bits:    [E, words of 32 tokens], arrived [1]: scratch, zero before and after every use
    logits:  [n, E] fp32 of the router; where `experts_up` makes the choice as it goes, blank (all
             bits set) before and after
    """

    items: Tensor
    counts: Tensor
    tokens: Tensor
    weights: Tensor
    places: Tensor
    shares: Tensor
    bits: Tensor
    arrived: Tensor
    logits: Tensor
    item_tokens: int

    @classmethod
    def empty(
        cls, tokens: int, experts: int, top_k: int, device: torch.device, item_tokens: int = 8
    ) -> Plan:
        """item_tokens: see `experts_pairs.item_tokens`; 8 is right for at most 32 tokens."""
        held = min(tokens * top_k, experts + tokens * top_k // item_tokens)
        pairs, words = tokens * top_k, -(-tokens // 32)

        def integers(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=torch.int32, device=device)

        def numbers(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=torch.float32, device=device)

        return cls(
            items=integers(3, held),
            counts=integers(2),
            tokens=integers(pairs),
            weights=numbers(pairs),
            places=integers(pairs),
            shares=numbers(pairs),
            bits=integers(experts, words),
            arrived=integers(1),
            logits=(integers(tokens, experts) - 1).view(torch.float32),
            item_tokens=item_tokens,
        )
