"""A policy with a guarantee, from a run directory: its problems, its model, its records.

`labels` lets both slices write from the same states on the directory's problems, once, kept item by
item in `labels.ndjson`; every setting is then replayed on them. `runs` uses what the directory has
already: runs that differ in the setting alone, beside large alone.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import ValidationError

from cascade.calibration import calibrate as calibrated_by_labels
from cascade.calibration import labelled_runs
from cascade.errors import CalibrationError, RequestError, RunDirectoryError
from cascade.evaluation.engine import DEFAULT_BATCH, Recipe, describe
from cascade.evaluation.evaluation import Evaluation
from cascade.evaluation.graders import Grading
from cascade.evaluation.manifest import problems_digest
from cascade.evaluation.records import Record, item_seed
from cascade.evaluation.runs import Run, run_of
from cascade.evaluation.sources import load
from cascade.evaluation.store import cut_torn_line
from cascade.policies import (
    Calibrated,
    LabelledRun,
    Policy,
    Target,
    TargetNotMet,
    Threshold,
    TooFewRuns,
    Trial,
)
from cascade.policies import calibrate as choose
from cascade.problems import Problem
from cascade.reasoner import Reasoner
from cascade.sampling import SamplingParams
from cascade.strategies import Single, Stepwise

LABELS = "labels.ndjson"
_TARGET = re.compile(r"\s*(loss|escalate)\s*<=\s*([\d.eE+-]+)\s*|\s*(delta)\s*=\s*([\d.eE+-]+)\s*")


def parse_target(text: str) -> Target:
    """`loss<=0.01,delta=0.05`, or `escalate<=0.2,delta=0.1`. Raises RequestError."""
    found: dict[str, float] = {}
    for part in text.split(","):
        match = _TARGET.fullmatch(part)
        if match is None:
            raise RequestError(
                f"target {text!r}: {part!r} is not loss<=X, escalate<=X or delta=X; for example "
                "loss<=0.01,delta=0.05"
            )
        name, value = (g for g in match.groups() if g is not None)
        try:
            found["lose" if name == "loss" else name] = float(value)
        except ValueError:
            raise RequestError(f"target {text!r}: {value!r} is no number") from None
    try:
        return Target.model_validate(found)
    except ValidationError as error:
        raise RequestError(f"target {text!r}: {error.errors()[0]['msg']}") from None


def calibrate(
    directory: Path,
    target: Target,
    *,
    policy: Policy | None = None,
    dial: str = "probability",
    source: Literal["labels", "runs"] = "labels",
    model: str | None = None,
    batch: int = DEFAULT_BATCH,
) -> Calibrated:
    """The policy whose setting holds the target on the problems of an evaluation.

    policy: that of the first stepwise run unless given; dial: the field of it that is set
    model:  where the checkpoint is, if it has moved; its digest must be that of the evaluation

    Raises CalibrationError where the problems are too few or no setting passes, RunDirectoryError
    where the directory does not fit, RequestError for a policy that cannot be replayed.
    """
    evaluation = Evaluation.load(directory)
    if source == "runs":
        return _by_runs(evaluation, target, policy, dial)
    policy = policy or _policy_of(evaluation) or Threshold()
    reasoner = _reasoner(evaluation, model, batch)
    labels = _Labels(directory, evaluation, reasoner)
    runs = labels.complete()
    return calibrated_by_labels(reasoner, [], policy, target=target, dial=dial, runs=runs)


# ---- labels ----


@dataclass
class _Graded:
    """A problem as `labelled_runs` takes it, graded as the evaluation was."""

    problem: Problem
    grading: Grading

    @property
    def question(self) -> str:
        return self.problem.prompt

    def score(self, answer: str | None) -> float:
        return self.grading.submit(self.problem, answer).result()


@dataclass
class _Labels:
    """The labelled runs of a directory's problems: those that are kept, and those yet to make."""

    directory: Path
    evaluation: Evaluation
    reasoner: Reasoner

    def complete(self) -> list[LabelledRun]:
        """One run a problem, in the problems' order; each is kept as soon as it is there."""
        path = self.directory / LABELS
        problems = _problems(self.evaluation)
        needed = describe(self.reasoner).digest
        found = dict(_kept(path, needed))
        left = [p for p in problems if p.id not in found]
        params = SamplingParams.model_validate(dict(self.evaluation.manifest.params))
        seed, grading = self.evaluation.manifest.seed, Grading(self.evaluation.manifest.grader)
        each = [params.model_copy(update={"seed": item_seed(seed, p.id)}) for p in left]
        graded = [_Graded(problem, grading) for problem in left]
        cut_torn_line(path)
        with contextlib.closing(grading), path.open("ab", buffering=0) as file:
            for scored, run in labelled_runs(self.reasoner, graded, params=each) if left else ():
                assert isinstance(scored, _Graded)
                found[scored.problem.id] = run
                line = {"id": scored.problem.id, "digest": needed, "run": run.model_dump()}
                try:
                    file.write(json.dumps(line, separators=(",", ":")).encode() + b"\n")
                except OSError as error:
                    raise RunDirectoryError(
                        f"{path} could not be written: {os.strerror(error.errno or 0)}"
                    ) from error
        return [found[p.id] for p in problems]


def _kept(path: Path, digest: str) -> Iterator[tuple[str, LabelledRun]]:
    """Labelled runs of this checkpoint that an earlier call has kept."""
    if not path.exists():
        return
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if not line.endswith(b"\n"):
                return
            try:
                data = json.loads(line)
                if data["digest"] == digest:
                    yield str(data["id"]), LabelledRun.model_validate(data["run"])
            except (ValueError, KeyError, TypeError) as error:
                raise RunDirectoryError(f"{path}, line {number} is damaged: {error}") from error


def _problems(evaluation: Evaluation) -> list[Problem]:
    """The evaluation's problems with their graders, checked against its digest."""
    source = evaluation.manifest.source
    if source["kind"] == "list":
        fields = ("id", "question", "answer", "kind", "ask", "facts")
        problems = [
            Problem(**{f: p[f] for f in fields}, choices=tuple(p["choices"]))
            for p in evaluation.problems
        ]
    else:
        problems, _ = load(source)
    if problems_digest(problems) != evaluation.manifest.problems:
        raise RunDirectoryError(
            f"{evaluation.directory} was made on other problems than {source} gives today"
        )
    return problems


def _reasoner(evaluation: Evaluation, model: str | None, batch: int) -> Reasoner:
    engine = evaluation.manifest.engine
    sessions: tuple[Mapping[str, Any], ...] = evaluation.manifest.sessions or ({},)
    reasoner = Recipe(
        model=model or sessions[-1].get("path") or engine.model,
        draft=engine.draft,
        verify=engine.verify,
        dtype=engine.dtype,
        max_batch=batch,
        max_length=engine.max_length,
        consistency=engine.consistency,
    ).build()
    found = describe(reasoner)
    if found.digest != engine.digest:
        raise RunDirectoryError(
            f"{evaluation.directory} was made with another checkpoint: {engine.digest}, and "
            f"{reasoner.model.directory} has {found.digest}"
        )
    return reasoner


def _policy_of(evaluation: Evaluation) -> Policy | None:
    """The policy of the first stepwise run."""
    for run in _runs(evaluation):
        if isinstance(run.strategy, Stepwise):
            return run.policy or run.strategy.policy
    return None


# ---- runs ----


def _by_runs(
    evaluation: Evaluation, target: Target, policy: Policy | None, dial: str
) -> Calibrated:
    """Learn then test over the runs that the directory has."""
    large = next((r.name for r in _runs(evaluation) if r.strategy == Single()), None)
    if large is None:
        raise CalibrationError(f"{evaluation.directory} has no run of the large slice alone")
    reference = {r.id: r.score for r in evaluation.runs.get(large, [])}
    small = evaluation.manifest.engine.draft
    settings: dict[float, tuple[Policy, list[Trial]]] = {}
    wanted = policy or _policy_of(evaluation) or Threshold()
    for run in _runs(evaluation):
        own = run.policy or getattr(run.strategy, "policy", None)
        if run.strategy == Stepwise() and own is None:
            own = Threshold()
        if type(own) is not type(wanted) or not isinstance(run.strategy, Stepwise):
            continue
        records = {r.id: r for r in evaluation.runs.get(run.name, [])}
        if records.keys() != reference.keys():
            raise CalibrationError(f"run {run.name!r} is not finished; --resume goes on with it")
        trials = [_trial(records[id], score, small) for id, score in reference.items()]
        settings[float(getattr(own, dial))] = (own, trials)
    if not settings:
        raise CalibrationError(
            f"{evaluation.directory} has no stepwise run under a {type(wanted).__name__} policy"
        )
    values = sorted(settings, reverse=True)
    try:
        return choose(
            settings[values[0]][0],
            target,
            lambda candidate: settings[float(getattr(candidate, dial))][1],
            dial=dial,
            values=values,
            source="runs",
        )
    except (TooFewRuns, TargetNotMet) as error:
        raise CalibrationError(str(error)) from error


def _trial(record: Record, reference: float, small: str) -> Trial:
    steps = [s for s in record.steps if s["decision"] != "forced"]
    alone = sum(s["drafter"] == small and s["drafted_tokens"] == s["tokens"] for s in steps)
    return Trial(loss=max(reference - record.score, 0.0), escalated=1 - alone / max(len(steps), 1))


def _runs(evaluation: Evaluation) -> Iterator[Run]:
    """The runs of the manifest that this process can read back."""
    for name, data in evaluation.manifest.runs.items():
        with contextlib.suppress(RequestError):  # a strategy of one's own
            yield run_of({**data, "name": name})
