"""Policies made of policies."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import Field

from .always import Always
from .base import Policy
from .decisions import Accept, AnyDecision, Refresh
from .registry import AnyPolicy
from .runs import LabelledRun
from .scores import DraftScores, Need, StepScores


class Wrapping(Policy):
    """A policy that asks others: it needs and learns what they do."""

    @property
    @abstractmethod
    def parts(self) -> tuple[Policy, ...]:
        """The policies that it asks."""

    @property
    def needs(self) -> frozenset[Need]:
        return frozenset().union(*(part.needs for part in self.parts))

    @property
    def learns(self) -> bool:
        return any(part.learns for part in self.parts)

    def fitted(self, runs: Sequence[LabelledRun]) -> Policy:
        def fit(value: Any) -> Any:
            if isinstance(value, Policy):
                return value.fitted(runs)
            return tuple(map(fit, value)) if isinstance(value, tuple) else value

        return replaced(self, **{name: fit(getattr(self, name)) for name in _fields(self)})


class AllOf(Wrapping):
    """Keep a step that every policy keeps; otherwise the first that does not decides."""

    kind: Literal["all_of"] = "all_of"
    policies: Annotated[tuple[AnyPolicy, ...], Field(min_length=1)]

    @property
    def parts(self) -> tuple[Policy, ...]:
        return self.policies

    def skips(self, draft: DraftScores) -> bool:
        return all(policy.skips(draft) for policy in self.policies)

    def decide(self, scores: StepScores) -> AnyDecision:
        kept: AnyDecision = Accept()
        for policy in self.policies:
            decision = policy.decide(scores)
            if not keeps(decision):
                return decision
            kept = decision if isinstance(decision, Refresh) else kept
        return kept


class AnyOf(Wrapping):
    """Keep a step that any policy keeps; otherwise the first policy decides."""

    kind: Literal["any_of"] = "any_of"
    policies: Annotated[tuple[AnyPolicy, ...], Field(min_length=1)]

    @property
    def parts(self) -> tuple[Policy, ...]:
        return self.policies

    def skips(self, draft: DraftScores) -> bool:
        return any(policy.skips(draft) for policy in self.policies)

    def decide(self, scores: StepScores) -> AnyDecision:
        decisions = []
        for policy in self.policies:
            decision = policy.decide(scores)
            if keeps(decision):
                return decision
            decisions.append(decision)
        return decisions[0]


class FirstSteps(Wrapping):
    """One policy for the first `n` steps, another for those after them."""

    kind: Literal["first_n_steps"] = "first_n_steps"
    n: Annotated[int, Field(ge=1)]
    policy: AnyPolicy
    then: AnyPolicy = Always()

    @property
    def parts(self) -> tuple[Policy, ...]:
        return self.policy, self.then

    def skips(self, draft: DraftScores) -> bool:
        return self._at(draft.step).skips(draft)

    def decide(self, scores: StepScores) -> AnyDecision:
        return self._at(scores.step).decide(scores)

    def _at(self, step: int) -> Policy:
        return self.policy if step < self.n else self.then


def all_of(*policies: Policy) -> AllOf:
    """Keep a step that every policy keeps; otherwise the first that does not decides."""
    return AllOf(policies=policies)


def any_of(*policies: Policy) -> AnyOf:
    """Keep a step that any policy keeps; otherwise the first policy decides."""
    return AnyOf(policies=policies)


def first_n_steps(n: int, policy: Policy, then: Policy | None = None) -> FirstSteps:
    """One policy for the first `n` steps, `then` (which keeps all unless given) afterwards."""
    return FirstSteps(n=n, policy=policy, then=then or Always())


def keeps(decision: object) -> bool:
    """Whether a decision keeps the whole draft and lets the drafter go on."""
    return isinstance(decision, (Accept, Refresh))


def replaced(policy: Policy, **changes: Any) -> Policy:
    """A policy with other settings, checked as at its making."""
    values = {name: getattr(policy, name) for name in _fields(policy)}
    return type(policy).model_validate(values | changes)


def _fields(policy: Policy) -> list[str]:
    return list(type(policy).model_fields)
