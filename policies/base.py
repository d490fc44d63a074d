"""What a policy is given, what it may decide, and the class to derive from."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

Phase = Literal["thinking", "answer"]


class StepScores(BaseModel):
    """One drafted step, as the verifying slice sees it.

    step:      number of the step, from 0
    drafter:   name of the slice that drafted it; verifier: of the slice that scored it
    logprobs:  the verifier's natural-log probability of each drafted token, at temperature 1
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    step: int
    phase: Phase
    drafter: str
    verifier: str
    logprobs: Annotated[tuple[float, ...], Field(min_length=1)]

    @property
    def mean_logprob(self) -> float:
        return sum(self.logprobs) / len(self.logprobs)

    @property
    def min_logprob(self) -> float:
        return min(self.logprobs)


class Accept(BaseModel):
    """Keep the whole step."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    kind: Literal["accept"] = "accept"


class Rewrite(BaseModel):
    """Keep the first `start` drafted tokens; the verifier writes the step from there on."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    kind: Literal["rewrite"] = "rewrite"
    start: Annotated[int, Field(ge=0)] = 0


Decision = Annotated[Accept | Rewrite, Field(discriminator="kind")]


class Policy(BaseModel, ABC):
    """Derive from this and implement `decide`. Fields are the policy's settings."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    @abstractmethod
    def decide(self, scores: StepScores) -> Accept | Rewrite:
        """What to do with a drafted step. Must not depend on anything but `scores` and fields."""
