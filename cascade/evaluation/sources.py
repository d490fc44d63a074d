"""Where problems come from: a description that can be written down, and the problems it stands for.

`GymSource(task="chain_sum", size=60, seed=4242)`, `FileSource(path="mine.jsonl")`,
`HubSource(dataset="gsm8k")`, or a list of `Problem`s or of dicts.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, TypeAlias

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from cascade.errors import ProblemError, RequestError
from cascade.evaluation.hub import PRESETS, load_dataset, load_preset
from cascade.evaluation.lines import problem_of, read_problems
from cascade.evaluation.retries import Retries
from cascade.problems import Problem, nano_problems, stream

Limit = Annotated[int, Field(ge=1)] | None


class GymSource(BaseModel):
    """reasoning-gym tasks in turn, `size` problems in all; `nano` is nano's held-out mixture.

    task:     a name, or several, each with the settings that it takes: `{"chain_sum": {}}`
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Literal["gym"] = "gym"
    task: str | tuple[str, ...] | Mapping[str, Mapping[str, Any]]
    size: Annotated[int, Field(ge=1)] = 100
    seed: Annotated[int, Field(ge=0)] = 0

    def problems(self, retries: Retries) -> list[Problem]:
        if self.task == "nano":
            return nano_problems(self.size, self.seed)
        names = (self.task,) if isinstance(self.task, str) else self.task
        tasks = names if isinstance(names, Mapping) else {name: {} for name in names}
        if not tasks:
            raise RequestError("no reasoning-gym task is named")
        streams = [stream(name, self.seed, **settings) for name, settings in tasks.items()]
        return [next(streams[i % len(streams)]) for i in range(self.size)]


class FileSource(BaseModel):
    """A file of JSON lines: `question`, `answer`, and perhaps `choices`, `id` and `kind`.

    shuffle: put the choices of each problem in an order drawn from (seed, id)
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Literal["file"] = "file"
    path: Path
    size: Limit = None
    seed: Annotated[int, Field(ge=0)] = 0
    shuffle: bool = True

    def problems(self, retries: Retries) -> list[Problem]:
        return read_problems(self.path, limit=self.size, seed=self.seed if self.shuffle else None)


class HubSource(BaseModel):
    """A Hugging Face dataset: a preset's name, or any dataset by id with its columns.

    path: for a preset, the directory or Hub id to read its rows from instead
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Literal["hub"] = "hub"
    dataset: str
    path: str | None = None
    config: str | None = None
    split: str = "test"
    columns: Mapping[str, str] = Field(default_factory=dict)
    size: Limit = None
    seed: Annotated[int, Field(ge=0)] = 0
    shuffle: bool = True

    @property
    def grader(self) -> str | None:
        """The grader that fits a preset's answers."""
        return PRESETS[self.dataset].grader if self.dataset in PRESETS else None

    def problems(self, retries: Retries) -> list[Problem]:
        seed = self.seed if self.shuffle else None
        if self.dataset in PRESETS or "/" not in self.dataset:
            return load_preset(
                self.dataset, path=self.path, limit=self.size, seed=seed, retries=retries
            )
        return load_dataset(
            self.path or self.dataset,
            config=self.config,
            split=self.split,
            columns=self.columns,
            limit=self.size,
            seed=seed,
            retries=retries,
        )


Source: TypeAlias = GymSource | FileSource | HubSource
_SOURCES: TypeAdapter[Source] = TypeAdapter(Annotated[Source, Field(discriminator="kind")])


def source_of(data: Any) -> Source:
    """A source from a mapping with its `kind`. Raises ProblemError."""
    if isinstance(data, (GymSource, FileSource, HubSource)):
        return data
    try:
        return _SOURCES.validate_python(data)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise ProblemError(f"problems: {where + ': ' if where else ''}{first['msg']}") from None


def load(
    problems: Source | Mapping[str, Any] | Iterable[Problem | Mapping[str, Any]],
    retries: Retries | None = None,
) -> tuple[list[Problem], dict[str, Any]]:
    """Problems, and how the manifest describes where they came from.

    Raises ProblemError for a source that cannot be read, and for an id that stands twice.
    """
    given: object = problems
    if isinstance(given, (str, bytes)):
        raise ProblemError(
            f"problems={given!r} is a text; give a list of problems, or a source such as "
            "GymSource(task='chain_sum', size=100)"
        )
    if isinstance(problems, (GymSource, FileSource, HubSource, Mapping)):
        source = source_of(problems)
        found, facts = source.problems(retries or Retries()), source.model_dump(mode="json")
        if isinstance(source, FileSource):
            facts["path"] = str(source.path.absolute())
    else:
        found = [
            p if isinstance(p, Problem) else problem_of(p, f"problem {i}", f"problem-{i}")
            for i, p in enumerate(problems)
        ]
        facts = {"kind": "list"}
    if not found:
        raise ProblemError("there are no problems")
    seen: dict[str, int] = {}
    for number, problem in enumerate(found):
        if problem.id in seen:
            raise ProblemError(
                f"problems {seen[problem.id]} and {number} have the same id, {problem.id!r}"
            )
        seen[problem.id] = number
    return found, facts
