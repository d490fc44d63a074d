"""The command line: `cascade run | demo | eval | report | calibrate | inspect | ...`."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Optional

import typer
from rich.console import Console

from cascade.bench.command import bench
from cascade.errors import CascadeError
from cascade.evaluation import commands

if TYPE_CHECKING:
    from cascade.reasoner import Reasoner

app = typer.Typer(
    name="cascade",
    help="Think small, verify large: several slices of one nested checkpoint over one cache.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

Model = Annotated[str, typer.Option("--model", "-m", help="nano, a directory, or a Hub id")]
DraftCache = Annotated[str, typer.Option(help="own where slices cannot share (audit --handoff)")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, ...")]
Json = Annotated[bool, typer.Option("--json", help="print one JSON object instead")]


@app.command()
def run(
    prompt: Annotated[str, typer.Argument(help="the question; - reads it from standard input")],
    model: Model = "nano",
    strategy: Annotated[
        str, typer.Option(help="stepwise, speculative, budget, explore or single")
    ] = "stepwise",
    draft: Annotated[Optional[str], typer.Option(help="slice that drafts")] = None,  # noqa: UP045
    verify: Annotated[Optional[str], typer.Option(help="slice that verifies")] = None,  # noqa: UP045
    policy: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(help="when to keep a step: a policy's name, or its .json or .yaml file"),
    ] = None,
    threshold: Annotated[
        Optional[float],  # noqa: UP045
        typer.Option(help="in place of --policy: least token probability of a kept step"),
    ] = None,
    temperature: Annotated[float, typer.Option(help="0 is greedy")] = 0.0,
    top_p: Annotated[float, typer.Option()] = 1.0,
    seed: Annotated[Optional[int], typer.Option()] = None,  # noqa: UP045
    max_tokens: Annotated[Optional[int], typer.Option()] = None,  # noqa: UP045
    thinking_budget: Annotated[Optional[int], typer.Option(help="most thinking tokens")] = None,  # noqa: UP045
    draft_cache: DraftCache = "shared",
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """Answer one prompt, showing each step as it is committed."""
    from cascade.render import StepPrinter, summary
    from cascade.strategies import resolve

    chosen, way = _policy(policy, threshold), resolve(strategy)
    roles = {"draft": draft, "verify": verify, "strategy": way}
    reasoner = _load(model, **roles, device=device, max_batch=way.slots, draft_cache=draft_cache)
    console = _console()
    printer = StepPrinter(console, list(reasoner.model.slices))
    text = sys.stdin.read() if prompt == "-" else prompt
    events = reasoner.stream(
        text,
        policy=chosen,
        temperature=temperature,
        top_p=top_p,
        seed=seed,
        max_tokens=max_tokens,
        thinking_token_budget=thinking_budget,
    )
    for event in events:
        if not as_json:
            printer.show(event)
        if event.kind == "done":
            if as_json:
                typer.echo(event.result.to_json())
            else:
                console.print()
                console.print(summary(event.result), style="bold", highlight=False, soft_wrap=True)


@app.command()
def demo(
    size: Annotated[int, typer.Option(help="problems of the comparison")] = 48,
    show: Annotated[int, typer.Option(help="problems shown step by step")] = 4,
    seed: Annotated[int, typer.Option()] = 2605,
    model: Model = "nano",
    device: Device = "auto",
) -> None:
    """Solve held-out problems with large alone, small alone, and both together."""
    from cascade.problems import nano_problems
    from cascade.render import StepPrinter, comparison, summary
    from cascade.strategies import Single, Stepwise

    console = _console()
    reasoner = _load(model, device=device, max_batch=16)
    small, large = reasoner.roles.draft, reasoner.roles.verify
    problems = nano_problems(size, seed)
    printer = StepPrinter(console, list(reasoner.model.slices))
    for problem in problems[:show]:
        console.print(f"[bold]{_escape(problem.question.strip())}[/bold]", soft_wrap=True)
        for event in reasoner.stream(problem.question):
            printer.show(event)
            if event.kind == "done":
                mark = "right" if problem.score(event.result.answer) == 1 else "wrong"
                console.print(
                    f"{summary(event.result)} · {mark}\n", highlight=False, soft_wrap=True
                )
    rows = []
    runs = {
        f"{large} alone": Single(slice=large),
        f"{small} alone": Single(slice=small),
        "stepwise": Stepwise(),
    }
    for name, strategy in runs.items():
        with console.status(f"{name}: {size} problems"):
            began = time.perf_counter()
            results = reasoner.generate([p.question for p in problems], strategy=strategy)
            seconds = time.perf_counter() - began
        rows.append(_demo_row(name, problems, results, seconds, small))
    console.print(comparison(rows, f"{size} held-out problems, greedy, seed {seed}"))


def _demo_row(
    name: str, problems: Any, results: Any, seconds: float, small: str
) -> dict[str, object]:
    solved = sum(p.score(r.answer) == 1 for p, r in zip(problems, results, strict=True))
    thinking = sum(r.usage.reasoning for r in results)
    by_small = sum(r.usage.thinking_by_slice.get(small, 0) for r in results)
    steps = [step for r in results for step in r.steps]
    rewritten = sum(step.decision == "rewrite" for step in steps)
    return {
        "run": name,
        "solved": f"{solved} / {len(problems)}",
        "seconds": f"{seconds:.1f}",
        f"thinking by {small}": f"{by_small / max(thinking, 1):.0%}",
        "steps rewritten": f"{rewritten / max(len(steps), 1):.1%}",
    }


@app.command()
def inspect(
    path: Annotated[str, typer.Argument(help="nano, a directory, or a Hub id")],
    as_json: Json = False,
) -> None:
    """Show layers, slices, parameters, and the bytes of weights and cache."""
    from cascade.model import ElasticModel
    from cascade.render import model_tables

    model = ElasticModel.from_pretrained(path, device="cpu", dtype="checkpoint")
    if as_json:
        typer.echo(json.dumps(_facts(model)))
        return
    console = _console()
    for table in model_tables(model):
        console.print(table)


def _facts(model: Any) -> dict[str, Any]:
    from cascade.render import sequence_bytes

    arch = model.arch
    return {
        "name": model.name,
        "layers": {kind: arch.kinds.count(kind) for kind in dict.fromkeys(arch.kinds)},
        "slices": {name: spec.model_dump() for name, spec in model.slices.items()},
        "weight_bytes": model.nbytes,
        "cache_bytes_per_token": arch.bytes_per_token(model.dtype),
        "state_bytes_per_sequence": arch.state_bytes(),
        "window_bytes_per_sequence": arch.window_bytes(model.dtype),
        "sequence_bytes": sequence_bytes(model),
    }


@app.command()
def export(
    slice: Annotated[str, typer.Argument(help="slice name, or widths such as 320x128")],
    directory: Annotated[Path, typer.Argument(help="where to write it")],
    model: Model = "nano",
    overwrite: Annotated[bool, typer.Option(help="replace a directory that exists")] = False,
) -> None:
    """Write one slice as an ordinary transformers checkpoint."""
    from cascade.model import ElasticModel

    loaded = ElasticModel.from_pretrained(model, device="cpu", dtype="checkpoint")
    written = loaded.export(slice, directory, overwrite=overwrite)
    typer.echo(f"{slice} of {loaded.name}: {written}")


@app.command()
def audit(
    prompts: Annotated[list[str], typer.Argument(help="the question whose run is audited")],
    model: Model = "nano",
    handoff: Annotated[
        bool,
        typer.Option("--handoff", help="measure whether slices can read each other's cache"),
    ] = False,
    tolerance: Annotated[
        Optional[float],  # noqa: UP045
        typer.Option(help="largest relative deviation allowed; unless given, what rounding does"),
    ] = None,
    max_tokens: Annotated[int, typer.Option()] = 128,
    draft_cache: DraftCache = "shared",
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """Run one prompt stepwise and check the cache against a from-scratch prefill.

    Exits with 1 where the deviation passes the tolerance. With --handoff, and several prompts,
    measures instead what it costs a slice to go on over another one's cache.
    """
    from dataclasses import asdict

    from cascade.errors import RequestError
    from cascade.render import audit_table

    reasoner = _load(model, device=device, max_batch=1, draft_cache=draft_cache)
    if handoff:
        _audit_handoffs(reasoner, prompts, as_json)
        return
    if len(prompts) != 1:
        raise RequestError(f"one prompt is audited at a time, got {len(prompts)}")
    report = reasoner.audit(prompts[0], max_tokens=max_tokens, tolerance=tolerance)
    if as_json:
        typer.echo(json.dumps({**asdict(report), "max_relative_error": report.max_relative_error}))
    else:
        console = _console()
        console.print(audit_table(report))
        verdict = "consistent" if report.ok else f"off from position {report.first_bad_position}"
        console.print(f"largest relative deviation {report.max_relative_error:.3g}: {verdict}")
    if not report.ok:
        raise typer.Exit(1)


def _audit_handoffs(reasoner: Reasoner, prompts: list[str], as_json: bool) -> None:
    from dataclasses import asdict

    from cascade.handoff import handoff_report
    from cascade.render import handoff_table

    codec = reasoner.codec
    ids = [codec.encode_prompt(prompt)[1] for prompt in prompts]
    report = handoff_report(reasoner.model, ids, until=codec.end_ids, cache=reasoner.cache)
    if as_json:
        facts = {"can_share": report.can_share, "recommendation": report.recommendation}
        typer.echo(json.dumps({**asdict(report), **facts}))
        return
    console = _console()
    console.print(handoff_table(report))
    console.print(report.recommendation, soft_wrap=True)


def _policy(policy: str | None, threshold: float | None) -> Any:
    """The policy that the options of `run` name."""
    from cascade.admission import read_policy
    from cascade.errors import RequestError

    if threshold is None:
        return None if policy is None else read_policy(policy)
    if policy is not None:
        raise RequestError("--threshold is short for --policy threshold; give one of them")
    if not 0 < threshold < 1:
        raise RequestError(f"threshold={threshold} is not between 0 and 1")
    return {"kind": "threshold", "probability": threshold}


def _load(model: str, **options: Any) -> Reasoner:
    """A Reasoner for this process alone, which may then set the threads of torch.

    Small matrices gain nothing from several threads, and lose much where cores are busy: threads
    wait for each other after every product.
    """
    import torch

    from cascade.reasoner import Reasoner
    from cascade.threads import suits_one_thread

    reasoner = Reasoner.from_pretrained(model, **options)
    if suits_one_thread(reasoner.model.device, reasoner.model.nbytes):
        torch.set_num_threads(1)
    return reasoner


def _console() -> Console:
    return Console(highlight=False)


def _escape(text: str) -> str:
    from rich.markup import escape

    return escape(text)


app.command("eval")(commands.evaluate)
app.command()(commands.report)
app.command()(commands.calibrate)
app.command()(bench)


def main() -> None:
    """Entry point: errors of the library are one line on standard error and exit code 2."""
    try:
        app()
    except CascadeError as error:
        Console(stderr=True, highlight=False).print(f"error: {error}", markup=False, soft_wrap=True)
        sys.exit(2)


if __name__ == "__main__":
    main()
