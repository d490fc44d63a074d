"""What is compared: runs, each a strategy with its policy and parameters, and baselines."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, TypeAlias

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainSerializer,
    ValidationError,
)

from cascade.errors import CascadeError, RequestError, unknown
from cascade.policies import Policy
from cascade.policies import load as load_policy
from cascade.policies.registry import build
from cascade.sampling import SamplingParams
from cascade.strategies import STRATEGIES, Explore, Single, Strategy, resolve

VOTES = 8  # drafts of the majority baseline


def build_strategy(data: Any) -> Any:
    """A strategy from its name, or from a mapping with its `name` and settings."""
    if isinstance(data, str):
        return resolve(data)
    if not isinstance(data, Mapping):
        return data
    settings = dict(data)
    name = settings.pop("name", None)
    if name not in STRATEGIES:
        raise RequestError(unknown("strategy", name, STRATEGIES))
    if "policy" in settings:
        settings["policy"] = _policy(settings["policy"])
    return STRATEGIES[name].model_validate(settings)


def describe_strategy(strategy: Strategy) -> dict[str, Any]:
    """What `build_strategy` takes; a strategy of one's own is named by its class."""
    known = {kind: name for name, kind in STRATEGIES.items()}
    kind = type(strategy)
    name = known.get(kind) or f"{kind.__module__}.{kind.__qualname__}"
    return {"name": name, **strategy.model_dump(mode="json")}


def _policy(data: Any) -> Any:
    """A policy, its name, a mapping, or the path of a file that holds one."""
    if isinstance(data, (str, Path)) and Path(data).suffix in (".json", ".yaml", ".yml"):
        return load_policy(data)
    return build(data)


AnyStrategy: TypeAlias = Annotated[
    Strategy, BeforeValidator(build_strategy), PlainSerializer(describe_strategy)
]
AnyPolicy: TypeAlias = Annotated[
    Policy, BeforeValidator(_policy), PlainSerializer(lambda p: p.model_dump(mode="json"))
]


class Run(BaseModel):
    """One way of answering the problems.

    name:     stands in every line of the results; made of the strategy and policy where not given
    params:   fields of SamplingParams that differ from those of the evaluation
    baseline: whether others are compared with it
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: Annotated[str, Field(min_length=1, max_length=80)]
    strategy: AnyStrategy
    policy: AnyPolicy | None = None
    params: Mapping[str, Any] = Field(default_factory=dict)
    baseline: bool = False

    def sampling(self, base: SamplingParams) -> SamplingParams:
        """The parameters of this run. Raises RequestError."""
        try:
            changes = SamplingParams.model_validate(dict(self.params)).model_dump(
                exclude_unset=True
            )
            params = SamplingParams.model_validate(base.model_dump(exclude_unset=True) | changes)
        except ValidationError as error:
            raise RequestError(f"run {self.name!r}: {brief(error)}") from None
        if params.n != 1:
            raise RequestError(f"run {self.name!r}: an evaluation takes one sample, not {params.n}")
        return params

    @property
    def settings(self) -> tuple[Any, ...]:
        """What makes two runs the same, whatever their names."""
        return self.strategy, self.policy, json.dumps(dict(self.params), sort_keys=True)


def run_of(data: Any) -> Run:
    """A run from a name, a strategy, a policy, or a mapping. Raises RequestError."""
    if isinstance(data, Run):
        return data
    if isinstance(data, (str, Strategy)):
        data = {"strategy": data}
    elif isinstance(data, Policy):
        data = {"strategy": "stepwise", "policy": data}
    if not isinstance(data, Mapping):
        raise RequestError(f"a run is a strategy, a policy or a mapping, not {data!r}")
    if unheard := sorted(set(data) - set(Run.model_fields)):
        raise RequestError(unknown("setting of a run", unheard[0], Run.model_fields))
    try:
        run = Run.model_validate({"name": "-", "strategy": "stepwise", **data})
    except ValidationError as error:
        raise RequestError(f"run {data.get('name', data)!r}: {brief(error)}") from None
    except (CascadeError, ValueError) as error:
        raise RequestError(f"run {data.get('name', data)!r}: {error}") from None
    return run if "name" in data else run.model_copy(update={"name": name_of(run)})


def name_of(run: Run) -> str:
    """The strategy, its settings that are not the default, and the policy likewise."""
    described = describe_strategy(run.strategy)
    head = str(described["name"]).rpartition(".")[2]
    changed = run.strategy.model_dump(mode="json", exclude_defaults=True)
    changed.pop("policy", None)
    parts = [f"{key}={_short(value)}" for key, value in changed.items()]
    policy = run.policy or getattr(run.strategy, "policy", None)
    if policy is not None:
        settings = policy.model_dump(mode="json", exclude_defaults=True)
        kind = getattr(policy, "kind", type(policy).__name__)
        values = [f"{k} {_short(v)}" for k, v in settings.items() if k != "kind"]
        parts.append(" ".join([kind, *values]))
    parts += [f"{key}={_short(value)}" for key, value in run.params.items()]
    return (f"{head} ({', '.join(parts)})" if parts else head)[:80]


def plan(
    runs: Iterable[Any] | Mapping[str, Any], *, small: str, large: str, baselines: bool = True
) -> tuple[Run, ...]:
    """The runs of an evaluation, baselines first. Raises RequestError for two of one name.

    A run that is a baseline under another name is compared as one, and not made twice.
    """
    if isinstance(runs, Mapping):
        runs = [
            {**value, "name": name}
            if isinstance(value, Mapping)
            else run_of(value).model_copy(update={"name": name})
            for name, value in runs.items()
        ]
    elif isinstance(runs, (str, Strategy, Policy, Run)):
        runs = [runs]
    chosen = [run_of(run) for run in runs]
    first: list[Run] = []
    for baseline in baseline_runs(small, large) if baselines else ():
        same = next((run for run in chosen if run.settings == baseline.settings), None)
        if same is not None:
            chosen.remove(same)
            same = same.model_copy(update={"baseline": True})
        first.append(same or baseline)
    planned = (*first, *chosen)
    names = [run.name for run in planned]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise RequestError(f"two runs are named {twice[0]!r}; give them names of their own")
    if not planned:
        raise RequestError("no runs: name a strategy, or leave the baselines in")
    return planned


def baseline_runs(small: str, large: str) -> tuple[Run, ...]:
    """Large alone, small alone, and a majority vote of small drafts."""
    runs = [
        Run(name="large-only", strategy=Single(), baseline=True),
        Run(name="small-only", strategy=Single(slice=small), baseline=True),
        Run(name="majority", strategy=Explore(choose="majority", drafts=VOTES), baseline=True),
    ]
    return tuple(runs if small != large else runs[:1])


class RunsFile(BaseModel):
    """What a YAML or JSON file of runs may say; flags of the command line go before it."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    runs: list[Any] | dict[str, Any] = Field(default_factory=list)
    problems: Any = None
    baselines: bool = True
    params: Mapping[str, Any] = Field(default_factory=dict)
    grader: str | None = None
    seed: int | None = None


def read_runs(path: Path) -> RunsFile:
    """A file of runs: `{"runs": [...], ...}`, or just the list. Raises RequestError."""
    try:
        text = path.read_text("utf-8")
    except FileNotFoundError:
        raise RequestError(f"there is no file {path}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise RequestError(f"{path} could not be read: {error}") from error
    import yaml

    try:
        data = json.loads(text) if path.suffix == ".json" else yaml.safe_load(text)
    except (ValueError, yaml.YAMLError) as error:
        raise RequestError(f"{path} is neither JSON nor YAML: {error}") from None
    if isinstance(data, list):
        data = {"runs": data}
    if not isinstance(data, Mapping):
        raise RequestError(f"{path} holds {type(data).__name__}, not a list of runs")
    if unheard := sorted(set(data) - set(RunsFile.model_fields)):
        raise RequestError(f"{path}: {unknown('setting', unheard[0], RunsFile.model_fields)}")
    try:
        return RunsFile.model_validate(dict(data))
    except ValidationError as error:
        raise RequestError(f"{path}: {brief(error)}") from None


def brief(error: ValidationError) -> str:
    """pydantic's findings in one sentence."""
    return "; ".join(
        f"{'.'.join(map(str, item['loc']))}: {item['msg']}" if item["loc"] else str(item["msg"])
        for item in error.errors()
    )


def _short(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= 24 else text[:21] + "..."
