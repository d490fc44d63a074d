"""Skip verification where the draft slice is sure of itself."""

from __future__ import annotations

import math
from typing import Annotated, Literal

from pydantic import Field

from .base import Policy
from .combinators import Wrapping
from .decisions import AnyDecision
from .registry import AnyPolicy
from .scores import DraftScore, DraftScores, Need, StepScores, log_value, needs_of
from .threshold import Threshold


class Gate(Wrapping):
    """Keep a step unverified while the drafter's own score of it is at least `probability`.

    at_most: steps in a row that may go unverified; the verifying pass after them repairs the cache
    policy:  decides about the steps that are verified
    """

    kind: Literal["gate"] = "gate"
    policy: AnyPolicy = Threshold()
    score: DraftScore = "draft_min"
    probability: Annotated[float, Field(gt=0, lt=1)] = 0.9
    at_most: Annotated[int, Field(ge=1)] = 4

    @property
    def parts(self) -> tuple[Policy, ...]:
        return (self.policy,)

    @property
    def needs(self) -> frozenset[Need]:
        return super().needs | needs_of(self.score)

    def skips(self, draft: DraftScores) -> bool:
        sure = log_value(self.score, draft) >= math.log(self.probability)
        return sure and draft.progress.unverified < self.at_most

    def decide(self, scores: StepScores) -> AnyDecision:
        return self.policy.decide(scores)
