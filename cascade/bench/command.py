"""The command `cascade bench`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Optional

import typer
from rich.console import Console


def bench(
    model: Annotated[
        str, typer.Option("--model", "-m", help="nano, a directory, or a Hub id")
    ] = "nano",
    shape: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(help="random weights of a named shape instead: 30b, tiny"),
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, ...")] = "auto",
    dtype: Annotated[str, typer.Option(help="float32, bfloat16, ...")] = "auto",
    slices: Annotated[
        Optional[list[str]],  # noqa: UP045
        typer.Option("--slice", help="measure this slice; may be repeated; all unless given"),
    ] = None,
    batch: Annotated[
        Optional[list[int]],  # noqa: UP045
        typer.Option(help="rows decoded at once; may be repeated; 1 is always measured"),
    ] = None,
    context: Annotated[Optional[int], typer.Option(help="tokens of a row at first")] = None,  # noqa: UP045
    prefill: Annotated[Optional[int], typer.Option(help="tokens of the prompt")] = None,  # noqa: UP045
    repeats: Annotated[int, typer.Option(help="timed runs a figure; their median counts")] = 9,
    peers: Annotated[bool, typer.Option(help="run transformers, and vLLM where installed")] = True,
    json_file: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option("--json", help="write everything as one JSON object; - prints it instead"),
    ] = None,
) -> None:
    """Measure this machine: step times against the floor, prefill, memory, peers, what pays.

    Nothing is reported unless what was timed agrees with the plain reference.
    """
    from cascade.bench.run import Settings, run
    from cascade.bench.tables import report_tables

    settings = Settings.of(
        model=model,
        shape=shape,
        device=device,
        dtype=dtype,
        slices=tuple(slices) if slices else None,
        batches=tuple(batch) if batch else None,
        context=context,
        prefill=prefill,
        repeats=repeats,
        peers=peers,
    )
    console = Console(highlight=False, soft_wrap=True)
    with console.status("") as status:  # nothing where this is no terminal
        report = run(settings, lambda what: status.update(what))
    if json_file is not None and str(json_file) == "-":
        typer.echo(report.to_json())
        return
    for part in report_tables(report):
        console.print(part)
    if json_file is not None:
        json_file.write_text(report.to_json() + "\n")
