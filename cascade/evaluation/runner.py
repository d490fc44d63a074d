"""Every run over every problem: asks engines, grades, and writes each item as it finishes."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterable, Mapping
from collections.abc import Sequence as Seq
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from cascade.errors import RequestError
from cascade.evaluation.engine import Finished, Request
from cascade.evaluation.evaluation import Evaluation
from cascade.evaluation.graders import Grading, require_math
from cascade.evaluation.manifest import Engine, Manifest, problems_digest, session
from cascade.evaluation.processes import Processes
from cascade.evaluation.progress import LiveProgress
from cascade.evaluation.records import Record, item_seed, record_of
from cascade.evaluation.retries import Retries
from cascade.evaluation.runs import Run
from cascade.evaluation.store import RunDirectory
from cascade.problems import Problem
from cascade.sampling import SamplingParams

OWED = 256  # scores that may be outstanding before the engine waits for the grader


class AnyEngine(Protocol):
    """What a runner needs: `LocalEngine` and `RayEngine` have it."""

    workers: int

    @property
    def batch(self) -> int: ...
    @property
    def device(self) -> str: ...
    @property
    def path(self) -> str: ...
    def describe(self) -> Engine: ...
    def check(self, run: Run, params: SamplingParams) -> None: ...
    def run(self, run: Run, requests: Seq[Request]) -> Iterable[Finished]: ...


@dataclass
class Runner:
    """One evaluation while it runs.

    processes: of which this is one; progress: shown while it runs, if anything is
    """

    engine: AnyEngine
    problems: Seq[Problem]
    source: Mapping[str, Any]
    runs: Seq[Run]
    grading: Grading
    params: SamplingParams
    seed: int
    out: Path | None
    resume: bool
    processes: Processes = field(default_factory=Processes)
    progress: LiveProgress | None = None
    retries: Retries = field(default_factory=Retries)

    def evaluate(self) -> Evaluation:
        """Run to the end. What is finished is kept, whatever is raised."""
        if self.grading.name == "math":
            require_math()
        sampling = {run.name: run.sampling(self.params) for run in self.runs}
        for run in self.runs:
            self.engine.check(run, sampling[run.name])
        if self.out is not None:
            return self._evaluate_in(RunDirectory(self.out), sampling)
        if self.processes.count > 1:
            raise RequestError("several processes need a run directory: give out=, or --out")
        places = {key: i for i, key in enumerate(self._order(run.name for run in self.runs))}
        records = self._run_all([], sampling, None, 0)
        records.sort(key=lambda record: places[record.key])
        return Evaluation(self._manifest(), [p.described for p in self.problems], records)

    def _evaluate_in(
        self, store: RunDirectory, sampling: Mapping[str, SamplingParams]
    ) -> Evaluation:
        """Every item is in the directory as soon as it is finished."""
        manifest = self._manifest()
        self.processes.first_then_all(
            lambda: store.open(manifest, self.problems, resume=self.resume)
        )
        try:
            manifest = store.manifest
            store.start(self.processes.index)
            try:
                self._run_all(store.records(), sampling, store, len(manifest.sessions) - 1)
            finally:
                if self.processes.first:
                    manifest = self._end_session(store, manifest)
            self.processes.wait()
            order = self._order(manifest.runs)
            self.processes.first_then_all(lambda: store.finish(order))
            return Evaluation(manifest, store.problems(), store.records(), self.out)
        finally:
            store.close()

    # ---- inside ----

    def _run_all(
        self,
        before: Seq[Record],
        sampling: Mapping[str, SamplingParams],
        store: RunDirectory | None,
        sitting: int,
    ) -> list[Record]:
        done = {record.key for record in before}
        fresh: list[Record] = []
        mine = self.processes.share(self.problems)
        for run in self.runs:
            left = [p for p in mine if (p.id, run.name) not in done]
            if self.progress is not None:
                ids = {p.id for p in mine}
                earlier = [r for r in before if r.run == run.name and r.id in ids]
                self.progress.begin(run.name, len(mine), earlier)
            for record in self._run(run, left, sampling[run.name], sitting):
                if store is not None:
                    store.append(record)
                fresh.append(record)
                if self.progress is not None:
                    self.progress.advance(record)
        return fresh

    def _run(
        self, run: Run, problems: Seq[Problem], params: SamplingParams, sitting: int
    ) -> Iterable[Record]:
        """Records of one run, graded, roughly in the order in which they finish."""
        if not problems:
            return
        seeds = [item_seed(self.seed, problem.id) for problem in problems]
        requests = [
            Request(i, problem.prompt, params.model_copy(update={"seed": seed}))
            for i, (problem, seed) in enumerate(zip(problems, seeds, strict=True))
        ]
        began = time.perf_counter()
        owed: deque[tuple[Finished, float, Future[float]]] = deque()

        def settle(most: int) -> Iterable[Record]:
            """Records whose scores are there, waiting for some where more than `most` are not."""
            while owed and (owed[0][2].done() or len(owed) > most):
                finished, clock, score = owed.popleft()
                value, error = _outcome(finished, score)
                yield record_of(
                    problems[finished.number],
                    run.name,
                    finished.result,
                    score=value,
                    error=error,
                    seed=seeds[finished.number],
                    tries=finished.tries,
                    session=sitting,
                    worker=finished.worker,
                    clock=clock,
                    kept=finished.kept,
                )

        stream = self.engine.run(run, requests)
        try:
            for finished in stream:
                problem, result = problems[finished.number], finished.result
                if result is None or result.error is not None:
                    score: Future[float] = Future()
                    score.set_result(0.0)
                else:
                    score = self.grading.submit(problem, result.answer)
                owed.append((finished, time.perf_counter() - began, score))
                yield from settle(OWED)
            yield from settle(0)
        finally:
            stream.close()  # type: ignore[attr-defined]

    def _order(self, runs: Iterable[str]) -> list[tuple[str, str]]:
        """The items by run, and then by problem."""
        return [(problem.id, name) for name in runs for problem in self.problems]

    def _manifest(self) -> Manifest:
        return Manifest(
            created=time.strftime("%Y-%m-%dT%H:%M:%S%z"),
            engine=self.engine.describe(),
            source=self.source,
            size=len(self.problems),
            problems=problems_digest(self.problems),
            grader=self.grading.name,
            seed=self.seed,
            params=self.params.model_dump(mode="json", exclude_unset=True),
            runs={run.name: run.model_dump(mode="json", exclude={"name"}) for run in self.runs},
            sessions=(
                session(
                    self.engine.workers * self.processes.count,
                    self.engine.batch,
                    self.engine.device,
                    self.engine.path,
                ),
            ),
        )

    def _end_session(self, store: RunDirectory, manifest: Manifest) -> Manifest:
        """Note when this sitting ended, and what was tried again in it."""
        retries = dict(self.retries.counts)
        if restarts := getattr(self.engine, "restarts", 0):
            retries["worker died"] = restarts
        ended = {"ended": time.strftime("%Y-%m-%dT%H:%M:%S%z"), "retries": retries}
        sessions = (*manifest.sessions[:-1], {**manifest.sessions[-1], **ended})
        manifest = manifest.model_copy(update={"sessions": sessions})
        store.write_manifest(manifest)
        return manifest


def _outcome(finished: Finished, score: Future[float]) -> tuple[float, str | None]:
    """The score of an item and what went wrong, if anything did."""
    if finished.error is not None:
        return 0.0, finished.error
    error = score.exception()
    if error is not None:
        return 0.0, f"grader: {type(error).__name__}: {error}"
    return score.result(), None
