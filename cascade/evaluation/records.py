"""One line of the results: an item, which is a problem answered by a run."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from cascade.problems import Problem
from cascade.results import Candidate, Metrics, Result, Step, Usage


@dataclass(frozen=True, slots=True)
class Record:
    """What became of one problem under one run. `id` and `run` name it.

    answer:    the text after the thought; reference: the right one; score: 0 to 1
    finish:    `stop`, `length` or `error`; error: what went wrong, of the request or the grader
    seed:      drawn from the evaluation's seed and the id
    tries:     above 1 where memory ran out and it was tried again
    session:   number of the sitting it was finished in, from 0; worker: of several, which one
    clock:     seconds from the start of the run in that sitting until the item was finished
    usage, metrics: those of `Result`; steps: of `Step`, without token ids where there is text
    candidates: what `explore` chose from
    """

    id: str
    run: str
    answer: str | None
    score: float
    reference: str
    kind: str
    finish: str
    error: str | None
    seed: int
    tries: int
    session: int
    worker: int
    clock: float
    usage: Mapping[str, Any] = field(default_factory=dict)
    metrics: Mapping[str, Any] = field(default_factory=dict)
    steps: tuple[Mapping[str, Any], ...] = ()
    candidates: tuple[Mapping[str, Any], ...] = ()

    @property
    def key(self) -> tuple[str, str]:
        return self.id, self.run

    @property
    def seconds(self) -> float:
        return float(self.metrics.get("seconds", 0.0))

    @property
    def tokens(self) -> int:
        """Generated tokens that were kept."""
        return int(self.usage.get("reasoning", 0)) + int(self.usage.get("answer", 0))

    def to_line(self) -> bytes:
        values = {name: getattr(self, name) for name in _NAMES}
        return json.dumps(values, separators=(",", ":"), allow_nan=False).encode() + b"\n"

    @classmethod
    def from_line(cls, line: bytes) -> Record:
        """Raises ValueError or TypeError for what `to_line` did not write."""
        values = json.loads(line)
        if not isinstance(values, dict):
            raise ValueError(f"a {type(values).__name__} instead of an object")
        known = {name: values[name] for name in _NAMES if name in values}
        for name in ("steps", "candidates"):
            known[name] = tuple(known.get(name, ()))
        return cls(**known)


_NAMES = tuple(f.name for f in fields(Record))


def record_of(
    problem: Problem,
    run: str,
    result: Result | None,
    *,
    score: float,
    error: str | None,
    seed: int,
    tries: int,
    session: int,
    worker: int,
    clock: float,
    kept: Mapping[int, int],
) -> Record:
    """The line of a finished item; `result` is None for one that could not be started.

    kept: characters of a step's text that its drafter wrote, by the step's index
    """
    head = (problem.id, run, result.answer if result else None, score, problem.answer, problem.kind)
    place = (seed, tries, session, worker, round(clock, 4))
    if result is None:
        return Record(*head, "error", error, *place)
    return Record(
        *head,
        result.finish_reason,
        error or result.error,
        *place,
        usage=_values(result.usage, Usage),
        metrics=_values(result.metrics, Metrics),
        steps=tuple(_step(step, kept) for step in result.steps),
        candidates=tuple(map(_candidate, result.candidates)),
    )


def item_seed(seed: int, id: str) -> int:
    """The seed of an item: the same in every run, process and sitting."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{id}".encode()).digest()[:8], "big") >> 2


def _step(step: Step, kept: Mapping[int, int]) -> dict[str, Any]:
    values = _values(step, Step)
    values["tokens"] = step.tokens
    if step.index in kept:
        values["drafted_characters"] = kept[step.index]
    if step.text is not None:
        del values["token_ids"], values["retracted_ids"]
    return values


def _candidate(candidate: Candidate) -> dict[str, Any]:
    values = _values(candidate, Candidate)
    if candidate.text is not None:
        del values["token_ids"]
    return values


def _values(value: Any, kind: type[Any]) -> dict[str, Any]:
    """Fields as JSON has them, floats to six digits: a shallow `asdict`, which is much faster."""
    found = {}
    for f in fields(kind):
        inner = getattr(value, f.name)
        if isinstance(inner, float):
            inner = float(f"{inner:.6g}")
        elif isinstance(inner, Mapping):
            inner = dict(inner)
        found[f.name] = inner
    return found
