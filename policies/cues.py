"""Words that say that a thought has gone astray: hesitation, repeated reflection, loops."""

from __future__ import annotations

import re
from functools import cache
from typing import Annotated, Literal

from pydantic import Field, field_validator

from .base import Policy, rejection
from .decisions import Accept, AnyDecision, Decision, EndThinking, Lead
from .scores import Need, StepScores

WORDS = (
    "wait",
    "hmm",
    "hold on",
    "actually",
    "on second thought",
    "let me double-check",
    "let me re-check",
    "that's not right",
    "i made a mistake",
)
_STUTTER = re.compile(r"(\S.{6,}?)\1{3,}", re.DOTALL)  # eight characters or more, four times


class Cues(Policy):
    """Step in where a drafted step of the thought hesitates or goes in circles; keep it otherwise.

    words:       cues, looked for as whole words, whatever their case
    takeover:    what to do at a cue
    reflections: cues in so many of the last `within` steps, this one included, go in circles
    repeats:     so does a step whose text has been written so many times before among the steps
                 that a policy is shown, and a phrase that comes four times in a row
    circles:     what to do then
    """

    kind: Literal["cues"] = "cues"
    words: Annotated[tuple[str, ...], Field(min_length=1)] = WORDS
    takeover: Decision = Lead(steps=2)
    reflections: Annotated[int, Field(ge=1)] = 3
    within: Annotated[int, Field(ge=1)] = 8
    repeats: Annotated[int, Field(ge=1)] = 2
    circles: Decision = EndThinking()

    @field_validator("words")
    @classmethod
    def _not_blank(cls, words: tuple[str, ...]) -> tuple[str, ...]:
        if any(not word.strip() for word in words):
            raise ValueError("a cue cannot be blank")
        return words

    @property
    def needs(self) -> frozenset[Need]:
        return frozenset()

    def decide(self, scores: StepScores) -> AnyDecision:
        if scores.text is None or scores.phase != "thinking":
            return Accept()
        texts = scores.progress.texts
        cued = self.has_cue(scores.text)
        recent = texts[-(self.within - 1) :] if self.within > 1 else ()
        reflections = cued + sum(map(self.has_cue, recent))
        if self._loops(scores.text, texts) or (cued and reflections >= self.reflections):
            return rejection(self.circles, scores, 0)
        return rejection(self.takeover, scores, 0) if cued else Accept()

    def has_cue(self, text: str) -> bool:
        return _pattern(self.words).search(text) is not None

    def _loops(self, text: str, earlier: tuple[str, ...]) -> bool:
        plain = _plain(text)
        if not plain:
            return False
        again = sum(_plain(other) == plain for other in earlier)
        return again >= self.repeats or _STUTTER.search(text) is not None


@cache
def _pattern(words: tuple[str, ...]) -> re.Pattern[str]:
    found = "|".join(map(re.escape, words))
    return re.compile(rf"(?<!\w)(?:{found})(?!\w)", re.IGNORECASE)


def _plain(text: str) -> str:
    return " ".join(text.lower().split())
