"""Accept a step while the verifier finds it likely enough."""

from __future__ import annotations

import math
from typing import Annotated, Literal

from pydantic import Field

from .base import Accept, Policy, Rewrite, StepScores


class Threshold(Policy):
    """Reject a step whose score is below `probability`; rewrite from its first bad token.

    score: `min` compares the verifier's probability of the least likely token of the step,
           `mean` the geometric mean over its tokens. With `min` and a probability of at least
           0.5, greedy drafts that pass are what the verifier itself would have written.
    """

    kind: Literal["threshold"] = "threshold"
    score: Literal["min", "mean"] = "min"
    probability: Annotated[float, Field(gt=0, lt=1)] = 0.5

    def decide(self, scores: StepScores) -> Accept | Rewrite:
        limit = math.log(self.probability)
        value = scores.min_logprob if self.score == "min" else scores.mean_logprob
        if value >= limit:
            return Accept()
        return Rewrite(start=next(i for i, p in enumerate(scores.logprobs) if p < limit))
