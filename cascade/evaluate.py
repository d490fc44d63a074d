"""`cascade.evaluate(...)`, and `python -m cascade.evaluate`, which is `cascade eval`.

The module itself can be called, since function and module share their name:

>>> import cascade
>>> from cascade.evaluation import GymSource
>>> reasoner = cascade.Reasoner.from_pretrained("nano")
>>> found = cascade.evaluate(reasoner, GymSource(task="chain_sum", size=100, seed=7), ["stepwise"])
>>> found.summaries["stepwise"].accuracy.mean
0.97
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from rich.console import Console

    from cascade.evaluation.engine import Recipe
    from cascade.evaluation.evaluation import Evaluation
    from cascade.evaluation.graders import Grader
    from cascade.evaluation.sources import Source
    from cascade.problems import Problem
    from cascade.reasoner import Reasoner
    from cascade.sampling import SamplingParams


def evaluate(
    reasoner: Reasoner | Recipe | str | Path,
    problems: Source | Mapping[str, Any] | Iterable[Problem | Mapping[str, Any]],
    runs: Iterable[Any] | Mapping[str, Any] = ("stepwise",),
    *,
    grader: str | Grader | None = None,
    baselines: bool = True,
    params: SamplingParams | None = None,
    seed: int = 0,
    out: str | Path | None = None,
    resume: bool = False,
    backend: Literal["local", "ray"] = "local",
    workers: int | None = None,
    console: Console | None = None,
) -> Evaluation:
    """Answer every problem under every run, grade, and summarise.

    reasoner:  a Reasoner, or what `Reasoner.from_pretrained` takes. Under several processes, or
               Ray, every process loads the same.
    problems:  a source (`GymSource`, `FileSource`, `HubSource`), or problems as `Problem`s or as
               mappings with `question` and `answer`
    runs:      strategies by name or object, policies (under `stepwise`), `Run`s, or mappings with
               `strategy`, `policy`, `params`, `name`
    grader:    `auto` (the source's own, `choice` or `exact`), `exact`, `numeric`, `choice`,
               `math`, `reasoning-gym`, or a function of a problem and an answer, 0 to 1
    baselines: add large alone, small alone, and a majority vote of eight small drafts
    params:    sampling; each item has a seed of its own, made of `seed` and the problem's id, so
               that it does not depend on the order, the batch or the process
    out:       a directory in which every item is kept as it finishes; resume: go on with it
    backend:   `ray` runs `workers` engines over a Ray cluster
    console:   shows progress there, where it is a terminal

    An item that fails has its `error` and scores 0; the others go on. Raises ProblemError,
    RequestError, SliceError and RunDirectoryError before any work.
    """
    from cascade.errors import RequestError, unknown
    from cascade.evaluation.engine import LocalEngine, Recipe
    from cascade.evaluation.graders import Grading
    from cascade.evaluation.processes import Processes
    from cascade.evaluation.progress import LiveProgress
    from cascade.evaluation.retries import Retries
    from cascade.evaluation.runner import AnyEngine, Runner
    from cascade.evaluation.runs import plan
    from cascade.evaluation.sources import HubSource, load, source_of
    from cascade.sampling import SamplingParams

    if backend not in ("local", "ray"):
        raise RequestError(unknown("backend", backend, ["local", "ray"]))
    if workers is not None and (backend != "ray" or workers < 1):
        raise RequestError(f"workers={workers}: a number from 1, with backend='ray'")
    if isinstance(problems, Mapping):
        problems = source_of(problems)
    retries = Retries()
    grading = Grading(grader or (problems.grader if isinstance(problems, HubSource) else None))
    found, facts = load(problems, retries)
    engine: AnyEngine
    processes = Processes()
    if isinstance(reasoner, (str, Path)):
        reasoner = Recipe(model=str(reasoner))
    if backend == "ray":
        from cascade.evaluation.cluster import RayEngine

        recipe = reasoner if isinstance(reasoner, Recipe) else Recipe.of(reasoner)
        engine = RayEngine(recipe, workers=workers)
    else:
        if isinstance(reasoner, Recipe):
            processes = Processes.current(reasoner.device)
            place = {"device": processes.device} if processes.device else {}
            reasoner = reasoner.model_copy(update=place).build(retries)
        else:
            processes = Processes.current(str(reasoner.model.device))
        engine = LocalEngine(reasoner, worker=processes.index, retries=retries)
    try:
        facts_of_model = engine.describe()
        runner = Runner(
            engine=engine,
            problems=found,
            source=facts,
            runs=plan(
                runs,
                small=facts_of_model.draft,
                large=facts_of_model.verify,
                baselines=baselines,
            ),
            grading=grading,
            params=params or SamplingParams(),
            seed=seed,
            out=Path(out) if out is not None else None,
            resume=resume,
            processes=processes,
            retries=retries,
        )
        if console is None or not processes.first:
            return runner.evaluate()
        with LiveProgress(console, list(facts_of_model.slices)) as runner.progress:
            return runner.evaluate()
    finally:
        grading.close()
        engine.close()


class _Callable(ModuleType):
    """The type of this module: calling it calls `evaluate`."""

    def __call__(self, *args: Any, **kwargs: Any) -> Evaluation:
        return evaluate(*args, **kwargs)

    @property
    def __signature__(self) -> inspect.Signature:
        return inspect.signature(evaluate)


sys.modules[__name__].__class__ = _Callable

if __name__ == "__main__":
    from cascade.cli import main

    sys.argv.insert(1, "eval")
    main()
