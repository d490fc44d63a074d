"""Which experts a short pass runs for which of its tokens."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

FEW, FEW_TOGETHER = 32, 8  # tokens that have kernels of their own, for items of so many pairs


ANY = 1 << 31  # no limit


class Limits(NamedTuple):
    """What short passes of a slice keep to: pairs of an item, and tokens of a pass, at most."""

    pairs: int
    tokens: int


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
        cls,
        tokens: int,
        experts: int,
        top_k: int,
        device: torch.device,
        pairs: int = FEW_TOGETHER,
    ) -> Plan:
        """pairs: of an item at most, where there are more than a few tokens (`Limits`)"""
        item_tokens = FEW_TOGETHER if tokens <= FEW else pairs
        held = min(tokens * top_k, experts + tokens * top_k // item_tokens)
        picks, words = tokens * top_k, -(-tokens // 32)

        def integers(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=torch.int32, device=device)

        def numbers(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=torch.float32, device=device)

        return cls(
            items=integers(3, held),
            counts=integers(2),
            tokens=integers(picks),
            weights=numbers(picks),
            places=integers(picks),
            shares=numbers(picks),
            bits=integers(experts, words),
            arrived=integers(1),
            logits=(integers(tokens, experts) - 1).view(torch.float32),
            item_tokens=item_tokens,
        )
