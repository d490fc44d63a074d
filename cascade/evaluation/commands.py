"""`cascade eval`, `cascade report` and `cascade calibrate`."""

from __future__ import annotations

import json
import shlex
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Optional

import typer
from rich.console import Console

from cascade.errors import RequestError

if TYPE_CHECKING:
    from cascade.evaluation.evaluation import Evaluation
    from cascade.evaluation.sources import Source

INTERRUPTED = 130  # exit code after ctrl-C, as shells have it

Problems = "problems"
Runs = "runs"


def evaluate(
    model: Annotated[
        str, typer.Option("--model", "-m", help="nano, a directory, or a Hub id")
    ] = "nano",
    task: Annotated[
        Optional[list[str]],  # noqa: UP045
        typer.Option(
            help="reasoning-gym task, with settings as NAME:KEY=VALUE,...; again for more; "
            "nano: its held-out mixture",
            rich_help_panel=Problems,
        ),
    ] = None,
    data: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(
            help="JSONL file with question, answer, and perhaps choices and id",
            rich_help_panel=Problems,
        ),
    ] = None,
    dataset: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(
            help="Hugging Face dataset: gsm8k, math-500, aime, aime25, gpqa, or OWNER/NAME",
            rich_help_panel=Problems,
        ),
    ] = None,
    dataset_path: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(help="directory or Hub id with a copy of it", rich_help_panel=Problems),
    ] = None,
    size: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option(min=1, help="number of problems", rich_help_panel=Problems),
    ] = None,
    seed: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option(min=0, help="of the problems and of sampling", rich_help_panel=Problems),
    ] = None,
    grader: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(
            help="auto, exact, numeric, choice, math, reasoning-gym, or MODULE:FUNCTION",
            rich_help_panel=Problems,
        ),
    ] = None,
    strategy: Annotated[
        Optional[list[str]],  # noqa: UP045
        typer.Option(help="stepwise, budget, ...; again for more", rich_help_panel=Runs),
    ] = None,
    policy: Annotated[
        Optional[list[str]],  # noqa: UP045
        typer.Option(
            help="policy by name or file, under each strategy; again for more",
            rich_help_panel=Runs,
        ),
    ] = None,
    runs: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(help="YAML or JSON file with runs", rich_help_panel=Runs),
    ] = None,
    baselines: Annotated[
        bool, typer.Option(help="large alone, small alone, majority vote", rich_help_panel=Runs)
    ] = True,
    temperature: Annotated[
        Optional[float],  # noqa: UP045
        typer.Option(help="0 is greedy", rich_help_panel=Runs),
    ] = None,
    max_tokens: Annotated[Optional[int], typer.Option(rich_help_panel=Runs)] = None,  # noqa: UP045
    thinking_budget: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option(help="most thinking tokens", rich_help_panel=Runs),
    ] = None,
    draft: Annotated[Optional[str], typer.Option(help="slice that drafts")] = None,  # noqa: UP045
    verify: Annotated[Optional[str], typer.Option(help="slice that verifies")] = None,  # noqa: UP045
    consistency: Annotated[str, typer.Option(help="exact, shared or refresh")] = "exact",
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, ...")] = "auto",
    dtype: Annotated[str, typer.Option()] = "auto",
    batch: Annotated[int, typer.Option(min=1, help="sequences at once")] = 16,
    max_length: Annotated[Optional[int], typer.Option(help="tokens of a sequence")] = None,  # noqa: UP045
    backend: Annotated[str, typer.Option(help="local, or ray for a cluster")] = "local",
    workers: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option(min=1, help="engines of the cluster; one a GPU unless given"),
    ] = None,
    out: Annotated[Path, typer.Option("--out", "-o", help="run directory")] = Path("evaluation"),
    resume: Annotated[bool, typer.Option("--resume", help="go on with what is in --out")] = False,
    figures: Annotated[bool, typer.Option(help="PNG and SVG beside the report")] = True,
    as_json: Annotated[bool, typer.Option("--json", help="print one JSON object")] = False,
) -> None:
    """Compare strategies and policies on a set of problems.

    Every item is kept in --out as it finishes; stopped or killed, the same command with --resume
    goes on. Under `accelerate launch -m cascade.evaluate` the processes share the problems.
    """
    from cascade.evaluate import evaluate as run
    from cascade.evaluation.engine import Recipe
    from cascade.evaluation.runs import RunsFile, read_runs
    from cascade.sampling import SamplingParams

    file = read_runs(runs) if runs is not None else RunsFile()
    seed = seed if seed is not None else file.seed or 0
    settings: dict[str, Any] = {
        "temperature": temperature,
        "max_tokens": max_tokens,
        "thinking_token_budget": thinking_budget,
    }
    given = {name: value for name, value in settings.items() if value is not None}
    chosen = _crossed(strategy or [], policy or [])
    if not chosen and not file.runs:
        chosen = ["stepwise"]
    listed = (
        [{**_mapping(value), "name": name} for name, value in file.runs.items()]
        if isinstance(file.runs, dict)
        else file.runs
    )
    recipe = _checked(
        Recipe,
        model=model, draft=draft, verify=verify, device=device, dtype=dtype,
        max_batch=batch, max_length=max_length, consistency=consistency,
    )  # fmt: skip
    try:
        with _stopped_by_sigterm():
            found = run(
                recipe,
                _source(task, data, dataset, dataset_path, size, seed, file.problems),
                [*listed, *chosen],
                grader=grader or file.grader,
                baselines=baselines and file.baselines,
                params=_checked(SamplingParams, **{**file.params, **given}),
                seed=seed,
                out=out,
                resume=resume,
                backend=backend,  # type: ignore[arg-type]
                workers=workers,
                console=Console(stderr=True, highlight=False),
            )
    except KeyboardInterrupt:
        _say_how_to_resume(out)
        raise typer.Exit(INTERRUPTED) from None
    if _is_first_process():
        _show(found, as_json=as_json, figures=figures)


def report(
    directory: Annotated[Path, typer.Argument(help="run directory of `cascade eval`")],
    out: Annotated[Optional[Path], typer.Option("--out", "-o", help="file to write")] = None,  # noqa: UP045
    figures: Annotated[bool, typer.Option(help="PNG and SVG beside the report")] = True,
    as_json: Annotated[bool, typer.Option("--json", help="print one JSON object")] = False,
) -> None:
    """Show what a run directory holds, finished or not, and write its report anew."""
    from cascade.evaluation.evaluation import Evaluation

    _show(Evaluation.load(directory), as_json=as_json, figures=figures, path=out)


def calibrate(
    directory: Annotated[Path, typer.Argument(help="run directory of `cascade eval`")],
    target: Annotated[str, typer.Option(help="loss<=X or escalate<=X, and delta=X")],
    policy: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(help="policy by name or file; that of the first stepwise run unless given"),
    ] = None,
    dial: Annotated[str, typer.Option(help="the field of it that is set")] = "probability",
    source: Annotated[
        str,
        typer.Option(
            help="labels: both slices write from the same states, and every setting is replayed; "
            "runs: compare the runs that are there"
        ),
    ] = "labels",
    model: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option("--model", "-m", help="where the checkpoint is now"),
    ] = None,
    batch: Annotated[int, typer.Option(min=1, help="sequences at once")] = 16,
    out: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option("--out", "-o", help="policy file; policy.json in the directory unless given"),
    ] = None,
) -> None:
    """Choose a policy's setting with a guarantee, on the problems of an evaluation.

    Writes a file that Reasoner and `cascade run --policy` load. Stopped, the same command goes on.
    """
    from cascade.admission import read_policy
    from cascade.errors import unknown
    from cascade.evaluation.calibration import calibrate as choose
    from cascade.evaluation.calibration import parse_target
    from cascade.evaluation.tables import calibration_table
    from cascade.policies import save

    if source not in ("labels", "runs"):
        raise RequestError(unknown("source", source, ["labels", "runs"]))
    path = out or directory / "policy.json"
    found = choose(
        directory,
        parse_target(target),
        policy=read_policy(policy) if policy is not None else None,
        dial=dial,
        source=source,  # type: ignore[arg-type]
        model=model,
        batch=batch,
    )
    try:
        save(found, path)
    except (OSError, ValueError) as error:
        raise RequestError(f"the policy could not be written: {error}") from error
    console = Console(highlight=False)
    console.print(calibration_table(found))
    console.print(f"policy: {path}", soft_wrap=True)


def _show(found: Evaluation, *, as_json: bool, figures: bool, path: Path | None = None) -> None:
    page = found.report(path)
    drawn = found.figures() if figures and find_spec("matplotlib") else []
    if as_json:
        facts = {name: summary.to_dict() for name, summary in found.summaries.items()}
        typer.echo(json.dumps({"runs": facts, "report": str(page)}))
        return
    console = Console(highlight=False)
    console.print(found.table())
    done, due = len(found.records), len(found.problems) * len(found.manifest.runs)
    if done < due:
        console.print(f"{done} of {due} items are finished; --resume goes on")
    console.print(f"report: {page}", soft_wrap=True)
    if drawn:
        console.print(f"figures: {drawn[0].parent}", soft_wrap=True)


def _source(
    task: list[str] | None,
    data: Path | None,
    dataset: str | None,
    dataset_path: str | None,
    size: int | None,
    seed: int,
    file: Any,
) -> Source:
    from cascade.evaluation.sources import FileSource, GymSource, HubSource, source_of

    if sum(given is not None for given in (task, data, dataset)) > 1:
        raise RequestError("give one of --task, --data and --dataset")
    if dataset_path is not None and dataset is None:
        raise RequestError("--dataset-path says where --dataset is; give that too")
    if data is not None:
        return FileSource(path=data, size=size, seed=seed)
    if dataset is not None:
        return HubSource(dataset=dataset, path=dataset_path, size=size, seed=seed)
    if task:
        named = dict(map(_task, task))
        plain = len(named) == 1 and not any(named.values())
        return GymSource(task=next(iter(named)) if plain else named, size=size or 100, seed=seed)
    if file is not None:
        return source_of(file)
    return GymSource(task="nano", size=size or 100, seed=seed)


def _task(text: str) -> tuple[str, dict[str, Any]]:
    """`chain_sum:min_terms=2,max_terms=3` as a name and its settings."""
    name, _, rest = text.partition(":")
    settings: dict[str, Any] = {}
    for pair in filter(None, rest.split(",")):
        key, found, value = pair.partition("=")
        if not found:
            raise RequestError(f"--task {text!r}: {pair!r} is not KEY=VALUE")
        try:
            settings[key] = json.loads(value)
        except ValueError:
            settings[key] = value
    return name, settings


def _crossed(strategies: list[str], policies: list[str]) -> list[Any]:
    """Each strategy with each policy."""
    if not policies:
        return list(strategies)
    return [
        {"strategy": strategy, "policy": policy}
        for strategy in strategies or ["stepwise"]
        for policy in policies
    ]


def _mapping(value: Any) -> dict[str, Any]:
    return dict(value) if isinstance(value, dict) else {"strategy": value}


def _checked(kind: Any, **values: Any) -> Any:
    """A pydantic model of these values. Raises RequestError in place of its ValidationError."""
    from pydantic import ValidationError

    from cascade.evaluation.runs import brief

    try:
        return kind(**values)
    except ValidationError as error:
        raise RequestError(brief(error)) from None


@contextmanager
def _stopped_by_sigterm() -> Iterator[None]:
    """Clusters end a job with SIGTERM: take it for ctrl-C meanwhile."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _say_how_to_resume(out: Path) -> None:
    if not _is_first_process():
        return
    from cascade.evaluation.store import RunDirectory

    done = len(RunDirectory(out).records())
    path, *given = sys.argv
    module = path.endswith("evaluate.py")
    name = ["python", "-m", "cascade.evaluate"] if module else [Path(path).name]
    words = [*name, *given[module:], *([] if "--resume" in given else ["--resume"])]
    Console(stderr=True, highlight=False).print(
        f"stopped; {done} finished items are kept in {out}. Go on with:\n  {shlex.join(words)}",
        soft_wrap=True,
    )


def _is_first_process() -> bool:
    import os

    return int(os.environ.get("RANK", "0")) == 0
