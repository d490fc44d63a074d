"""Labelled runs: what both slices wrote from the same states, for policies that are fitted."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, model_validator

from .scores import StepScores


class TooFewRuns(ValueError):
    """The labelled runs do not suffice for what was asked of them."""


class LabelledStep(BaseModel):
    """One state of a run in which the verifier wrote everything, and the draft from that state.

    scores: the draft's
    agreed: how many of its leading tokens are those that the verifier itself wrote there
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    scores: StepScores
    agreed: Annotated[int, Field(ge=0)]

    @model_validator(mode="after")
    def _agrees_with_the_draft(self) -> LabelledStep:
        if self.agreed > len(self.scores.logprobs):
            raise ValueError(f"{self.agreed} of {len(self.scores.logprobs)} tokens cannot agree")
        return self

    @property
    def good(self) -> bool:
        """Whether the verifier would have written the whole draft itself."""
        return self.agreed == len(self.scores.logprobs)


class LabelledRun(BaseModel):
    """One problem.

    reference: the score, 0 to 1, of the answer that the verifier reached alone
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    steps: tuple[LabelledStep, ...]
    reference: Annotated[float, Field(ge=0, le=1)]
