"""The same evaluation over a Ray cluster: one engine an actor, restarted when it dies.

Needs the extra `cluster`. Actors load the model from its directory or Hub id, which every machine
must be able to reach; grading and writing stay in this process.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator, Mapping
from collections.abc import Sequence as Seq
from typing import Any

from cascade.errors import CascadeError, EvaluationError
from cascade.evaluation.engine import Finished, LocalEngine, Recipe, Request
from cascade.evaluation.manifest import Engine
from cascade.evaluation.runs import Run
from cascade.sampling import SamplingParams

DEATHS = 3  # of one worker without a finished item in between, before the evaluation gives up


class _Worker:
    """What runs in an actor: an engine, and where its outcomes come from."""

    def __init__(self, recipe: Recipe, index: int) -> None:
        self.engine = LocalEngine(recipe.build(), worker=index)

    def describe(self) -> tuple[Engine, str, int]:
        return self.engine.describe(), self.engine.device, self.engine.batch

    def check(self, run: Run, params: SamplingParams) -> None:
        self.engine.check(run, params)

    def run(self, run: Run, requests: Seq[Request]) -> Iterator[Finished]:
        yield from self.engine.run(run, requests)


class RayEngine:
    """Workers on a Ray cluster, which is joined where there is one and started here where not.

    workers: one for each GPU of the cluster unless given, or one where it has none
    address: of a cluster; also read from RAY_ADDRESS
    """

    def __init__(
        self, recipe: Recipe, *, workers: int | None = None, address: str | None = None
    ) -> None:
        self._ray = ray = _ray()
        self._started = not ray.is_initialized()
        if self._started:
            _join(ray, address or os.environ.get("RAY_ADDRESS"))
        gpus = int(ray.cluster_resources().get("GPU", 0))
        self.workers = workers or gpus or 1
        resources = {"num_gpus": 1} if gpus else {"num_cpus": 1}
        actor = ray.remote(_Worker).options(max_restarts=-1, max_task_retries=-1, **resources)
        self._actors = [actor.remote(recipe, index) for index in range(self.workers)]
        self.path = recipe.model
        self.restarts = 0
        described = self._ask(lambda worker: worker.describe.remote())
        self._facts: Engine = described[0][0]
        self.device, self.batch = described[0][1:]
        for index, (facts, _, _) in enumerate(described):
            if facts != self._facts:
                raise EvaluationError(f"worker {index} holds another model: {facts!r}")

    def describe(self) -> Engine:
        """What the manifest says about the model."""
        return self._facts

    def check(self, run: Run, params: SamplingParams) -> None:
        """Raise RequestError or SliceError for a run that this model cannot make."""
        self._ask(lambda worker: worker.check.remote(run, params), first=True)

    def run(self, run: Run, requests: Seq[Request]) -> Iterator[Finished]:
        """Outcomes as they come. What a worker had not finished when it died it is given again."""
        ray = self._ray
        left = [{r.number: r for r in requests[w :: self.workers]} for w in range(self.workers)]
        deaths: Counter[int] = Counter()
        streams = {self._start(w, run, left[w]): w for w in range(self.workers) if left[w]}
        back: dict[
            Any, int
        ] = {}  # replies of workers that have died, which come when they are back
        while streams or back:
            [ready], _ = ray.wait([*streams, *back], num_returns=1)
            if ready in back:
                worker = back.pop(ready)
                streams[self._start(worker, run, left[worker])] = worker
                continue
            worker = streams[ready]
            try:
                finished: Finished = ray.get(next(ready))
            except StopIteration:
                del streams[ready]
            except ray.exceptions.RayTaskError as error:
                raise EvaluationError(f"worker {worker} failed: {error.cause!r}") from error
            except ray.exceptions.RayError as error:  # it died, or its machine did
                del streams[ready]
                self.restarts += 1
                deaths[worker] += 1
                if deaths[worker] >= DEATHS:
                    raise EvaluationError(
                        f"worker {worker} died {DEATHS} times without finishing an item "
                        f"({type(error).__name__}). Finished items are kept; --resume goes on"
                    ) from error
                back[self._actors[worker].describe.remote()] = worker
            else:
                deaths[worker] = 0
                del left[worker][finished.number]
                yield finished

    def _start(self, worker: int, run: Run, requests: Mapping[int, Request]) -> Any:
        """A stream of outcomes. Ray must not repeat it by itself: some of it is finished."""
        method = self._actors[worker].run.options(max_task_retries=0)
        return method.remote(run, list(requests.values()))

    def close(self) -> None:
        """End the workers, and the cluster where it was started here."""
        for actor in self._actors:
            self._ray.kill(actor)
        self._actors = []
        if self._started:
            self._ray.shutdown()

    def _ask(self, question: Any, first: bool = False) -> list[Any]:
        """The workers' replies; errors of the library as they were raised there."""
        asked = self._actors[:1] if first else self._actors
        try:
            return list(self._ray.get([question(actor) for actor in asked]))
        except self._ray.exceptions.RayTaskError as error:
            if isinstance(error.cause, CascadeError):
                raise error.cause from None
            raise EvaluationError(f"a worker could not start: {error.cause!r}") from error
        except self._ray.exceptions.RayError as error:
            cause = getattr(error, "cause", None)
            raise EvaluationError(f"a worker could not start: {cause or error}") from error


def _ray() -> Any:
    # Ray reports its use to its makers unless it is told not to before it is imported.
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    try:
        import ray
    except ImportError as error:
        raise CascadeError(
            f"ray is not installed ({error}): pip install 'cascade-reasoning[cluster]'"
        ) from error
    return ray


def _join(ray: Any, address: str | None) -> None:
    quiet = {"log_to_driver": False, "logging_level": "ERROR"}
    if address:
        ray.init(address=address, **quiet)
    else:
        ray.init(include_dashboard=False, **quiet)
