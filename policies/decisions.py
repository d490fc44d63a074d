"""What a policy may decide about a drafted step."""

from __future__ import annotations

from typing import Annotated, Literal, TypeAlias

from pydantic import BaseModel, ConfigDict, Field


class _Decided(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Accept(_Decided):
    """Keep the whole step."""

    kind: Literal["accept"] = "accept"


class Rewrite(_Decided):
    """Keep the first `start` drafted tokens; the verifier writes the step from there on."""

    kind: Literal["rewrite"] = "rewrite"
    start: Annotated[int, Field(ge=0)] = 0


class Escalate(_Decided):
    """Ask the next larger slice; the policy is then asked again.

    by: `draft` drops the step and lets that slice draft it anew; `score` lets it score the same
        draft, where `Stepwise(middle_scores=True)` had a smaller one score it first
    With no slice left between, the verifying slice writes the step.
    """

    kind: Literal["escalate"] = "escalate"
    by: Literal["draft", "score"] = "draft"


class Refresh(_Decided):
    """Keep the step, and re-run under the verifier whatever of the sequence it did not write."""

    kind: Literal["refresh"] = "refresh"


class Lead(_Decided):
    """Drop the step; the verifier writes it and the steps after it, `steps` in all, undrafted."""

    kind: Literal["lead"] = "lead"
    steps: Annotated[int, Field(ge=1)] = 1


class EndThinking(_Decided):
    """End the thought on a line of its own. Only for a step of the thinking phase.

    keep: keep the drafted step first, instead of dropping it
    """

    kind: Literal["end_thinking"] = "end_thinking"
    keep: bool = False


AnyDecision: TypeAlias = Accept | Rewrite | Escalate | Refresh | Lead | EndThinking
Decision: TypeAlias = Annotated[AnyDecision, Field(discriminator="kind")]
DECISIONS = (Accept, Rewrite, Escalate, Refresh, Lead, EndThinking)
