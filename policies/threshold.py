"""Accept a step while its score is high enough."""

from __future__ import annotations

import math
from typing import Annotated, Literal

from pydantic import Field

from .base import Policy, rejection
from .decisions import Accept, AnyDecision, Decision
from .scores import Need, ScoreName, StepScores, first_below, log_value, needs_of, token_logs


class Threshold(Policy):
    """Reject a step whose score is below `probability`; rewrite from its first bad token.

    score:  any of `cascade.policies.value_of`. `min` compares the verifier's probability of the
            least likely token of the step, `mean` the geometric mean over its tokens. With `min`
            and a probability of at least 0.5, greedy drafts that pass are what the verifier itself
            would have written.
    reject: what becomes of a step below; unless given, it is rewritten from the first token that
            is below (as a whole with `judge`)
    """

    kind: Literal["threshold"] = "threshold"
    score: ScoreName = "min"
    probability: Annotated[float, Field(gt=0, lt=1)] = 0.5
    reject: Decision | None = None

    @property
    def needs(self) -> frozenset[Need]:
        return needs_of(self.score)

    def decide(self, scores: StepScores) -> AnyDecision:
        least = math.log(self.probability)
        if log_value(self.score, scores) >= least:
            return Accept()
        start = first_below(token_logs(self.score, scores), least)
        return rejection(self.reject, scores, start)
