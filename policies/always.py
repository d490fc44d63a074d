"""The same decision for every step."""

from __future__ import annotations

from typing import Literal

from .base import Policy, rejection
from .decisions import Accept, AnyDecision, Decision
from .scores import Need, StepScores


class Always(Policy):
    """Decide alike for every step: `Always()` keeps all, `Always(decision=Rewrite())` none.

    The steps of the answer cannot end a thought: there `EndThinking` becomes a rewrite.
    """

    kind: Literal["always"] = "always"
    decision: Decision = Accept()

    @property
    def needs(self) -> frozenset[Need]:
        return frozenset()

    def decide(self, scores: StepScores) -> AnyDecision:
        return rejection(self.decision, scores, 0)
