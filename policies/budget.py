"""Limits on what a policy may spend: a share of large tokens, tokens, time, cost."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Literal

from pydantic import Field, model_validator

from .base import Policy, rejection
from .combinators import Wrapping, keeps
from .decisions import Accept, AnyDecision, Decision, Lead, Rewrite
from .registry import AnyPolicy
from .scores import DraftScores, Progress, StepScores


class AtMost(Wrapping):
    """Let a policy have steps rewritten only while the verifier's share stays at most `share`.

    The share is that of kept tokens, the draft's length taken for that of its replacement, which
    may be longer; so it can be passed by the difference in the last replaced step.
    """

    kind: Literal["at_most"] = "at_most"
    share: Annotated[float, Field(ge=0, le=1)]
    policy: AnyPolicy

    @property
    def parts(self) -> tuple[Policy, ...]:
        return (self.policy,)

    def skips(self, draft: DraftScores) -> bool:
        return self.policy.skips(draft)

    def decide(self, scores: StepScores) -> AnyDecision:
        decision, length = self.policy.decide(scores), len(scores.logprobs)
        if isinstance(decision, Rewrite):
            new, step = length - decision.start, length
        elif isinstance(decision, Lead):
            new = step = length * decision.steps
        else:
            return decision
        kept = scores.progress.tokens
        large, total = kept.get(scores.verifier, 0) + new, sum(kept.values()) + step
        return decision if large <= self.share * total else Accept()


class WithinBudget(Wrapping):
    """Ask a policy while a budget lasts; afterwards decide `then` without asking.

    tokens:  kept tokens written by the verifier; thought: tokens of the thought
    seconds: wall time of the request
    cost:    sum over the slices of every token they have run (prompt, drafts and verification
             included) times its price; `prices` by slice name, 1 where a slice is not named
    then:    keeps the step unless given; `EndThinking()` ends the thought
    """

    kind: Literal["within_budget"] = "within_budget"
    policy: AnyPolicy
    tokens: Annotated[int, Field(ge=0)] | None = None
    thought: Annotated[int, Field(ge=0)] | None = None
    seconds: Annotated[float, Field(ge=0)] | None = None
    cost: Annotated[float, Field(ge=0)] | None = None
    prices: Mapping[str, Annotated[float, Field(ge=0)]] = Field(default_factory=dict)
    then: Decision = Accept()

    @model_validator(mode="after")
    def _limits_something(self) -> WithinBudget:
        if (self.tokens, self.thought, self.seconds, self.cost) == (None,) * 4:
            raise ValueError("a budget needs one of tokens, thought, seconds and cost")
        if self.prices and self.cost is None:
            raise ValueError("prices have a meaning only beside cost")
        return self

    @property
    def parts(self) -> tuple[Policy, ...]:
        return (self.policy,)

    def skips(self, draft: DraftScores) -> bool:
        if self.spent(draft.progress, draft.verifier):
            return keeps(self.then)
        return self.policy.skips(draft)

    def decide(self, scores: StepScores) -> AnyDecision:
        if self.spent(scores.progress, scores.verifier):
            return rejection(self.then, scores, 0)
        return self.policy.decide(scores)

    def spent(self, progress: Progress, verifier: str) -> bool:
        """Whether any of the limits is reached."""
        cost = sum(self.prices.get(name, 1.0) * count for name, count in progress.ran.items())
        pairs = (
            (self.tokens, progress.tokens.get(verifier, 0)),
            (self.thought, progress.thought),
            (self.seconds, progress.seconds),
            (self.cost, cost),
        )
        return any(limit is not None and value >= limit for limit, value in pairs)


def at_most(share: float, policy: Policy) -> AtMost:
    """Let a policy have steps rewritten while the verifier's share of tokens is at most so much."""
    return AtMost(share=share, policy=policy)


def within_budget(
    policy: Policy,
    *,
    tokens: int | None = None,
    thought: int | None = None,
    seconds: float | None = None,
    cost: float | None = None,
    prices: Mapping[str, float] | None = None,
    then: AnyDecision | None = None,
) -> WithinBudget:
    """Ask a policy while a budget lasts; see WithinBudget."""
    return WithinBudget(
        policy=policy,
        tokens=tokens,
        thought=thought,
        seconds=seconds,
        cost=cost,
        prices=prices or {},
        then=then or Accept(),
    )
