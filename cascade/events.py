"""What `Reasoner.stream` yields while a request runs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeAlias

from cascade.results import Result, Step


@dataclass(frozen=True, slots=True)
class DraftDelta:
    """Tokens were drafted; they may still be retracted."""

    text: str | None
    token_ids: tuple[int, ...]
    slice: str
    kind: Literal["draft_delta"] = "draft_delta"


@dataclass(frozen=True, slots=True)
class StepCommitted:
    """A step is final."""

    step: Step
    kind: Literal["step_committed"] = "step_committed"


@dataclass(frozen=True, slots=True)
class StepRetracted:
    """Drafted tokens were dropped; `score` is the verifier's lowest token probability."""

    text: str | None
    token_ids: tuple[int, ...]
    slice: str
    score: float | None
    kind: Literal["step_retracted"] = "step_retracted"


@dataclass(frozen=True, slots=True)
class SliceChanged:
    """Another slice writes from here on."""

    before: str
    after: str
    kind: Literal["slice_changed"] = "slice_changed"


@dataclass(frozen=True, slots=True)
class Done:
    """The request has ended."""

    result: Result
    kind: Literal["done"] = "done"


Event: TypeAlias = DraftDelta | StepCommitted | StepRetracted | SliceChanged | Done
