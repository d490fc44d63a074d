"""The steps of a request: the one that is being written, and the record of those that are done.

A step is handed out once nothing can change it: a stop string may reach back into text that was
committed before it was complete.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from copy import copy
from dataclasses import dataclass, field, replace

from cascade.errors import SequenceError
from cascade.policies import StepScores, value_of
from cascade.results import Step, StepDecision
from cascade.transcript import Transcript


@dataclass
class OpenStep:
    """A step that is being written.

    first, text_begins: its place among the generated ids and in their text
    """

    first: int
    text_begins: int
    began: float = field(default_factory=time.perf_counter)
    drafted: int = 0
    scores: StepScores | None = None  # of its last draft
    retracted: list[int] = field(default_factory=list)


class Steps:
    """The steps over one transcript."""

    def __init__(self, transcript: Transcript) -> None:
        self.transcript = transcript
        self.done: list[Step] = []
        self._spans: list[tuple[int, int]] = []  # of their texts
        self._final = 0  # steps that were handed out
        self._open: OpenStep | None = None

    @property
    def current(self) -> OpenStep:
        if self._open is None:
            raise SequenceError("a strategy wrote outside of a step; call task.open_step() first")
        return self._open

    @property
    def is_open(self) -> bool:
        return self._open is not None

    def open(self) -> None:
        self._open = OpenStep(len(self.transcript), len(self.transcript.text or ""))

    def close(self, decision: StepDecision, drafter: str | None) -> Step | None:
        """Record the open step; None where nothing of it was kept."""
        step, self._open = self.current, None
        ids, text = self.transcript.ids[step.first :], self.transcript.text
        if not ids:
            return None
        scores, decode = step.scores, self.transcript.codec.decode
        record = Step(
            index=len(self.done),
            text=None if text is None else text[step.text_begins :],
            token_ids=tuple(ids),
            slice=self.transcript.authors[-1],
            phase=self.transcript.phases[-1],
            score=None if scores is None else value_of("min", scores),
            mean_score=None if scores is None else value_of("mean", scores),
            decision=decision,
            drafter=drafter or self.transcript.authors[-1],
            drafted_tokens=step.drafted,
            milliseconds=(time.perf_counter() - step.began) * 1e3,
            retracted=decode(step.retracted) if step.retracted else None,
            retracted_ids=tuple(step.retracted),
            scorer=None if scores is None else scores.verifier,
        )
        self.add(record, (step.text_begins, len(text or "")))
        return record

    def add(self, step: Step, span: tuple[int, int]) -> None:
        self.done.append(step)
        self._spans.append(span)

    def hand_out(self, *, finished: bool) -> Iterator[Step]:
        """The steps that have become final."""
        text = self.transcript.text
        while self._final < len(self.done) and (finished or not self.transcript.may_be_cut):
            begin, end = self._spans[self._final]
            if text is not None:
                self.done[self._final] = replace(self.done[self._final], text=text[begin:end])
            yield self.done[self._final]
            self._final += 1

    def since(self, count: int) -> list[tuple[Step, tuple[int, int]]]:
        """Steps from number `count` on, with the spans of their texts."""
        return list(zip(self.done[count:], self._spans[count:], strict=True))

    def over(self, transcript: Transcript) -> Steps:
        """The same steps over another transcript with the same beginning; none of them open."""
        new = copy(self)
        new.transcript, new._open = transcript, None
        new.done, new._spans = list(self.done), list(self._spans)
        return new
