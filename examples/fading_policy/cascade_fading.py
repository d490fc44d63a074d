"""A threshold that fades: later steps build on early ones, so those are checked strictly."""

import math
from typing import Annotated, Literal

from pydantic import Field

from cascade.policies import Accept, AnyDecision, Policy, Rewrite, StepScores


class Fading(Policy):
    """Rewrite a step from its first token below `first * fade ** step`, but never below `least`."""

    kind: Literal["fading"] = "fading"
    first: Annotated[float, Field(gt=0, lt=1)] = 0.9
    fade: Annotated[float, Field(gt=0, le=1)] = 0.8
    least: Annotated[float, Field(ge=0, lt=1)] = 0.1

    def decide(self, scores: StepScores) -> AnyDecision:
        bar = max(self.first * self.fade**scores.step, self.least)
        for start, logprob in enumerate(scores.logprobs):
            if math.exp(logprob) < bar:
                return Rewrite(start=start)
        return Accept()
