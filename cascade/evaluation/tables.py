"""Evaluations in a terminal."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich import box
from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from cascade.evaluation.evaluation import Evaluation
from cascade.evaluation.statistics import Comparison, Interval
from cascade.policies import Calibrated


def comparison_table(evaluation: Evaluation) -> Table:
    """One row a run: accuracy with its interval, the paired test, time, cost, who wrote what."""
    manifest = evaluation.manifest
    title = f"{manifest.engine.model} on {source_name(manifest.source)}: {manifest.size} problems"
    reference = evaluation.reference
    table = Table(
        title=title, title_justify="left", caption_justify="left",
        box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False,
    )  # fmt: skip
    table.add_column("run", overflow="fold", min_width=12)
    table.add_column("right %\n95 %", justify="right", no_wrap=True)
    if reference is not None:
        table.add_column(f"- {reference}\n95 %", justify="right", no_wrap=True)
    table.add_column("items/s\nlatency", justify="right", no_wrap=True)
    table.add_column("reads", justify="right", no_wrap=True)
    table.add_column("tokens\nby slice", no_wrap=True)
    failed = any(s.failed for s in evaluation.summaries.values())
    if failed:
        table.add_column("failed", justify="right", style="red")
    for name, summary in evaluation.summaries.items():
        cells: list[RenderableType] = [
            Text(name),
            _two(percent(summary.accuracy.mean), interval(summary.accuracy)),
        ]
        if reference is not None:
            cells.append(_against(evaluation.against_reference.get(name)))
        cells += [
            _two(f"{summary.per_second:.1f}", f"{summary.latency['p50']:.2f} s"),
            brief_bytes(summary.bytes),
            "\n".join(f"{slice} {share:.0%}" for slice, share in summary.share.items()) or "-",
        ]
        table.add_row(*cells, *([str(summary.failed)] if failed else []))
    table.caption = (
        "95 % by bootstrap over problems; p of a paired test (McNemar, or sign flips), "
        "Holm-adjusted; latency: median of requests that ran "
        "among others; reads: weights for a problem alone"
    )
    return table


def _two(first: str, second: str) -> Text:
    return Text(first) + Text(f"\n{second}", style="dim")


def calibration_table(found: Calibrated) -> Table:
    """Every setting that was tested, and which of them holds."""
    target = found.target
    what = "loses" if target.lose is not None else "escalates"
    table = Table(
        title=f"{found.policy.model_dump().get('kind', 'policy')}: {found.dial} over {found.runs} "
        f"{'labelled runs' if found.source == 'labels' else 'problems'}",
        title_justify="left", caption_justify="left",
        box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False,
    )  # fmt: skip
    for column in (found.dial, f"{what} %", "p"):
        table.add_column(column, justify="right")
    table.add_column("")
    chosen = getattr(found.policy, found.dial)
    for test in found.tests:
        passed = test.p_value <= target.delta
        verdict = "chosen" if test.value == chosen else "holds" if passed else "fails"
        cells = (f"{test.value:g}", percent(test.mean), p_value(test.p_value), verdict)
        table.add_row(*cells, style="" if passed else "dim")
    table.caption = (
        f"{what} at most {target.level:.2%} with probability {1 - target.delta:g}, for problems "
        "drawn as these were"
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


def brief_bytes(count: float) -> str:
    """Three digits are enough: `538 MB`."""
    for unit, name in ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if count >= unit:
            return f"{count / unit:#.3g} {name}".replace(". ", " ")
    return f"{count:.0f} B"


def p_value(p: float) -> str:
    return "<.001" if p < 0.001 else f"{p:.3f}".removeprefix("0")


def _against(comparison: Comparison | None) -> Text:
    if comparison is None:
        return Text("-")
    d = comparison.difference
    first = f"{signed(d.mean)}, p {p_value(comparison.adjusted)}"
    return _two(first, f"{signed(d.low)} to {signed(d.high)}")
