"""Evaluations in a terminal."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.table import Table

from cascade.evaluation.evaluation import Evaluation
from cascade.evaluation.statistics import Comparison, Interval
from cascade.evaluation.summary import Summary
from cascade.slices import format_bytes


def comparison_table(evaluation: Evaluation) -> Table:
    """One row a run: accuracy with its interval, the paired test, latency, cost, who wrote what."""
    manifest = evaluation.manifest
    title = f"{manifest.engine.model} on {source_name(manifest.source)}: {manifest.size} problems"
    reference = evaluation.reference
    table = Table(title=title, title_justify="left", caption_justify="left")
    table.add_column("run", overflow="fold")
    for column in ("right %", "95 %"):
        table.add_column(column, justify="right", no_wrap=True)
    if reference is not None:
        table.add_column(f"against {reference}", justify="right")
        table.add_column("p", justify="right", no_wrap=True)
    for column in ("latency s", "p95", "items/s", "reads", "tokens by slice"):
        table.add_column(column, justify="right")
    failed = any(s.failed for s in evaluation.summaries.values())
    if failed:
        table.add_column("failed", justify="right", style="red")
    for name, summary in evaluation.summaries.items():
        cells = [name, percent(summary.accuracy.mean), interval(summary.accuracy)]
        if reference is not None:
            cells += _against(evaluation.against_reference.get(name))
        cells += [
            f"{summary.latency['mean']:.2f}",
            f"{summary.latency['p95']:.2f}",
            f"{summary.per_second:.1f}",
            format_bytes(int(summary.bytes)),
            shares(summary),
        ]
        table.add_row(*cells, *([str(summary.failed)] if failed else []))
    table.caption = (
        "95 % by bootstrap over problems; p of paired tests, Holm-adjusted; latency of a request "
        "among others; reads: bytes of weights for a problem that runs alone"
    )
    return table


def source_name(source: Mapping[str, Any]) -> str:
    """Where problems came from, in a few words."""
    match source.get("kind"):
        case "gym":
            task = source["task"]
            if task == "nano":
                return f"held-out arithmetic (seed {source['seed']})"
            names = [task] if isinstance(task, str) else list(task)
            return f"{', '.join(names)} (seed {source['seed']})"
        case "file":
            return Path(source["path"]).name
        case "hub":
            return str(source["dataset"])
    return "problems of one's own"


def percent(value: float) -> str:
    return f"{100 * value:.1f}"


def signed(value: float) -> str:
    text = f"{100 * value:+.1f}"
    return "0.0" if float(text) == 0 else text


def interval(value: Interval) -> str:
    return f"{percent(value.low)} to {percent(value.high)}"


def shares(summary: Summary) -> str:
    return ", ".join(f"{name} {share:.0%}" for name, share in summary.share.items()) or "-"


def p_value(p: float) -> str:
    return "< 0.001" if p < 0.001 else f"{p:.3f}"


def _against(comparison: Comparison | None) -> list[str]:
    if comparison is None:
        return ["-", "-"]
    d = comparison.difference
    text = f"{signed(d.mean)} ({signed(d.low)} to {signed(d.high)})"
    return [text, p_value(comparison.adjusted)]
