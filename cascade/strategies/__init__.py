"""Ways of thinking small and verifying large. Each is a generator over a `Task`'s verbs."""

from __future__ import annotations

from cascade.errors import RequestError, unknown
from cascade.strategies.base import Strategy
from cascade.strategies.budget import Budget
from cascade.strategies.explore import Explore
from cascade.strategies.single import Single
from cascade.strategies.speculative import Speculative
from cascade.strategies.stepwise import Stepwise

STRATEGIES: dict[str, type[Strategy]] = {
    "single": Single,
    "speculative": Speculative,
    "stepwise": Stepwise,
    "budget": Budget,
    "explore": Explore,
}

__all__ = [
    "STRATEGIES",
    "Budget",
    "Explore",
    "Single",
    "Speculative",
    "Stepwise",
    "Strategy",
    "resolve",
]


def resolve(strategy: str | Strategy) -> Strategy:
    """A strategy by name or object. Raises RequestError for anything else."""
    if isinstance(strategy, Strategy):
        return strategy
    if not isinstance(strategy, str):
        raise RequestError(f"a strategy is a name or a Strategy object, got {strategy!r}")
    if strategy not in STRATEGIES:
        raise RequestError(unknown("strategy", strategy, STRATEGIES))
    return STRATEGIES[strategy]()
