"""Ways of thinking small and verifying large. Each is a generator over a `Task`'s verbs."""

from __future__ import annotations

from cascade.errors import RequestError, unknown
from cascade.strategies.base import Strategy
from cascade.strategies.budget import Budget
from cascade.strategies.explore import Explore
from cascade.strategies.single import Single
from cascade.strategies.stepwise import Stepwise

STRATEGIES: dict[str, type[Strategy]] = {
    "single": Single,
    "stepwise": Stepwise,
    "budget": Budget,
    "explore": Explore,
}

__all__ = ["STRATEGIES", "Budget", "Explore", "Single", "Stepwise", "Strategy", "resolve"]


def resolve(strategy: str | Strategy) -> Strategy:
    """A strategy by name or object. Raises RequestError for an unknown name."""
    if isinstance(strategy, Strategy):
        return strategy
    if strategy not in STRATEGIES:
        raise RequestError(unknown("strategy", strategy, STRATEGIES))
    return STRATEGIES[strategy]()
