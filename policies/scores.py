"""What a policy is given: one drafted step in numbers, and the scores made of them."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal, TypeAlias, get_args

from pydantic import BaseModel, ConfigDict, Field

Phase = Literal["thinking", "answer"]

# Figures that are gathered only for a policy that names them in `Policy.needs`.
Need = Literal["draft", "divergence", "judge"]
NEEDS: frozenset[Need] = frozenset(get_args(Need))

Figures: TypeAlias = Annotated[tuple[float, ...], Field(min_length=1)]


class Progress(BaseModel):
    """The request before this step.

    tokens:        kept tokens by the slice that wrote them
    ran:           tokens that each slice has run, prompt, drafts and verification included
    thought:       kept tokens of the thought
    seconds:       wall time since the request began
    unverified:    steps kept without verification since the last one that was verified
    texts:         the latest steps' texts, newest last; none without a tokenizer
    token_seconds: measured wall time per token that a slice writes
    pass_seconds:  measured wall time per verifying pass of a slice
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    tokens: Mapping[str, int] = Field(default_factory=dict)
    ran: Mapping[str, int] = Field(default_factory=dict)
    thought: int = 0
    seconds: float = 0.0
    unverified: int = 0
    texts: tuple[str, ...] = ()
    token_seconds: Mapping[str, float] = Field(default_factory=dict)
    pass_seconds: Mapping[str, float] = Field(default_factory=dict)


class DraftScores(BaseModel):
    """One drafted step, as the slice that drafted it sees it. One figure per drafted token.

    step:           number of the step, from 0
    drafter:        name of the slice that drafted it; verifier: of the slice that would score it
    text:           the draft's text; None without a tokenizer
    draft_logprobs: the drafter's natural-log probability of each token, at temperature 1
    entropies:      entropy in nats of the distribution each token was drawn from, likewise
    margins:        probability of the likeliest token less that of the second likeliest
    The last three are None unless the policy needs `draft`.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    step: int
    phase: Phase
    drafter: str
    verifier: str
    text: str | None = None
    draft_logprobs: Figures | None = None
    entropies: Figures | None = None
    margins: Figures | None = None
    progress: Progress = Progress()


class StepScores(DraftScores):
    """One drafted step, as the verifying slice sees it.

    logprobs:    the verifier's natural-log probability of each drafted token, at temperature 1
    divergences: Kullback-Leibler divergence of the drafter from the verifier at each token, in
                 nats; None unless the policy needs `divergence`
    judge:       the verifier's probability that the step is right, asked as a question; None
                 unless the policy needs `judge`
    """

    logprobs: Figures
    divergences: Figures | None = None
    judge: Annotated[float, Field(ge=0, le=1)] | None = None

    @property
    def mean_logprob(self) -> float:
        return sum(self.logprobs) / len(self.logprobs)

    @property
    def min_logprob(self) -> float:
        return min(self.logprobs)


# Every score is on the scale of a probability: 0 to 1, more is better.
DraftScore = Literal["draft_min", "draft_mean", "entropy", "max_entropy", "margin", "min_margin"]
VerifierScore = Literal["min", "mean", "divergence", "max_divergence", "judge"]
ScoreName = Literal[VerifierScore, DraftScore]


def value_of(score: ScoreName, scores: DraftScores) -> float:
    """One number for a step, 0 to 1, more is better.

    min, draft_min:   probability of the least likely token, under the verifier or the drafter
    mean, draft_mean: geometric mean of the tokens' probabilities
    entropy, max_entropy:       exp(-x) of the drafter's entropy, its mean or its largest
    divergence, max_divergence: exp(-x) of the divergence between the slices, likewise
    margin, min_margin:         the drafter's margin, its geometric mean or its smallest
    judge:            the verifier's answer to the judge's question
    Raises ValueError where the figures were not gathered.
    """
    return math.exp(log_value(score, scores))


def log_value(score: ScoreName, scores: DraftScores) -> float:
    """The natural logarithm of `value_of`, -inf for zero."""
    logs = token_logs(score, scores)
    if logs is None:
        return _log(_gathered("judge", score, scores))
    return min(logs) if _FIGURES[score].worst else sum(logs) / len(logs)


def token_logs(score: ScoreName, scores: DraftScores) -> tuple[float, ...] | None:
    """Natural logarithm of the score of each token; None for `judge`, which is about the step."""
    if score == "judge":
        return None
    figure = _FIGURES[score]
    return tuple(figure.log(x) for x in _gathered(figure.field, score, scores))


def needs_of(*scores: ScoreName) -> frozenset[Need]:
    """What `Policy.needs` must name for these scores."""
    needed = (_FIGURES[score].need if score in _FIGURES else "judge" for score in scores)
    return frozenset(need for need in needed if need is not None)


def first_below(logs: tuple[float, ...] | None, least: float) -> int:
    """Position of the first token below `least`, or of the lowest where none is; 0 without any."""
    if not logs:
        return 0
    low = min(range(len(logs)), key=logs.__getitem__)
    return next((i for i, value in enumerate(logs) if value < least), low)


def _log(value: float) -> float:
    return math.log(value) if value > 0 else -math.inf


def _gathered(field: str, score: ScoreName, scores: DraftScores) -> Any:
    figures = getattr(scores, field, None)
    if figures is None:
        needed = ", ".join(map(repr, sorted(needs_of(score)))) or "nothing, but a verified step"
        raise ValueError(f"score {score!r} was not gathered: `Policy.needs` must name {needed}")
    return figures


@dataclass(frozen=True, slots=True)
class _Figure:
    """Where a score's figures are, and the logarithm of the score that each of them makes."""

    field: str
    log: Callable[[float], float]
    worst: bool
    need: Need | None


_FIGURES: Mapping[ScoreName, _Figure] = {
    "min": _Figure("logprobs", float, True, None),
    "mean": _Figure("logprobs", float, False, None),
    "divergence": _Figure("divergences", operator.neg, False, "divergence"),
    "max_divergence": _Figure("divergences", operator.neg, True, "divergence"),
    "draft_min": _Figure("draft_logprobs", float, True, "draft"),
    "draft_mean": _Figure("draft_logprobs", float, False, "draft"),
    "entropy": _Figure("entropies", operator.neg, False, "draft"),
    "max_entropy": _Figure("entropies", operator.neg, True, "draft"),
    "margin": _Figure("margins", _log, False, "draft"),
    "min_margin": _Figure("margins", _log, True, "draft"),
}
