"""The report's figures as PNG and SVG, for papers and pages. Needs matplotlib (extra `eval`)."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from cascade.errors import CascadeError, RunDirectoryError
from cascade.evaluation.colours import BASELINE, RUNS, slice_colours
from cascade.evaluation.evaluation import Evaluation
from cascade.evaluation.statistics import pareto
from cascade.evaluation.summary import Summary
from cascade.evaluation.tables import source_name

STYLE: Any = {
    "font.size": 9,
    "font.family": ["DejaVu Sans"],
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#8a8f98",
    "axes.grid": True,
    "grid.color": "#e4e6ea",
    "grid.linewidth": 0.7,
    "axes.axisbelow": True,
    "xtick.color": "#4b5159",
    "ytick.color": "#4b5159",
    "axes.labelcolor": "#2b2f36",
    "axes.titlesize": 10,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "legend.frameon": False,
    "legend.fontsize": 8,
    "svg.hashsalt": "cascade",  # the same figure is the same file
    "savefig.bbox": "tight",
    "figure.facecolor": "white",
}
MARKERS = "osD^vP"


def write_figures(evaluation: Evaluation, directory: Path) -> list[Path]:
    """Draw every figure that there is data for; returns the files written.

    Raises CascadeError without matplotlib, RunDirectoryError where they cannot be written.
    """
    try:
        import matplotlib
    except ImportError as error:
        raise CascadeError(
            f"matplotlib is not installed ({error}): pip install 'cascade-reasoning[eval]', or "
            "--no-figures"
        ) from error
    from matplotlib.figure import Figure

    drawn: list[Path] = []
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with matplotlib.rc_context(STYLE):
            for name, draw in FIGURES.items():
                figure = Figure(figsize=(6.2, 3.7))
                if not draw(evaluation, figure):
                    continue
                for suffix in ("png", "svg"):
                    path = directory / f"{name}.{suffix}"
                    stamp = {"Date": None} if suffix == "svg" else {"Software": None}
                    figure.savefig(path, dpi=160, metadata=stamp)
                    drawn.append(path)
    except OSError as error:
        raise RunDirectoryError(f"{directory} could not be written: {error.strerror}") from error
    return drawn


def _frontier(
    evaluation: Evaluation, figure: Any, cost: Callable[[Summary], float], label: str
) -> bool:
    summaries = list(evaluation.summaries.values())
    if not summaries:
        return False
    axes = figure.add_subplot()
    points = [(cost(s), 100 * s.accuracy.mean) for s in summaries]
    front = pareto(points)
    axes.plot(*zip(*(points[i] for i in front), strict=True), color="#c3c8d0", lw=1.4, zorder=1)
    fresh = 0
    for i, (summary, (x, y)) in enumerate(zip(summaries, points, strict=True)):
        colour = BASELINE if summary.baseline else RUNS[fresh % len(RUNS)]
        fresh += not summary.baseline
        low, high = 100 * summary.accuracy.low, 100 * summary.accuracy.high
        axes.errorbar(
            x, y, yerr=[[max(y - low, 0)], [max(high - y, 0)]], fmt=MARKERS[i % len(MARKERS)],
            color=colour, ms=6, lw=1.1, capsize=2.5, zorder=3, label=summary.run,
        )  # fmt: skip
    axes.set_xlabel(label)
    axes.set_ylabel("right, %")
    axes.set_xlim(left=0)
    model = evaluation.manifest.engine.model
    source = source_name(evaluation.manifest.source)
    axes.set_title(f"{model} on {source}, {evaluation.manifest.size} problems")
    axes.legend(loc="upper left", bbox_to_anchor=(1.01, 1.0))
    return True


def _latency(evaluation: Evaluation, figure: Any) -> bool:
    def seconds(summary: Summary) -> float:
        return summary.seconds / max(summary.items, 1)

    return _frontier(evaluation, figure, seconds, "seconds a problem (wall time of the run)")


def _cost(evaluation: Evaluation, figure: Any) -> bool:
    most = max((s.bytes for s in evaluation.summaries.values()), default=0.0)
    unit, name = next((u, n) for u, n in UNITS if most >= u or u == 1)

    def read(summary: Summary) -> float:
        return summary.bytes / unit

    return _frontier(evaluation, figure, read, f"weights read a problem, {name}")


UNITS = ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB"), (1, "B"))


def _acceptance(evaluation: Evaluation, figure: Any) -> bool:
    shown = [s for s in evaluation.summaries.values() if s.positions]
    if not shown:
        return False
    axes = figure.add_subplot()
    for i, summary in enumerate(shown):
        x = [(p.first + p.last) / 2 + 1 for p in summary.positions]
        y = [100 * p.kept / p.drafted for p in summary.positions]
        colour = RUNS[i % len(RUNS)]
        axes.plot(x, y, marker="o", ms=4, lw=1.5, color=colour, label=summary.run)
        axes.fill_between(
            x, [100 * p.low for p in summary.positions], [100 * p.high for p in summary.positions],
            color=colour, alpha=0.13, lw=0,
        )  # fmt: skip
    axes.set_xlabel("step")
    axes.set_ylabel("drafted steps kept whole, %")
    axes.set_ylim(0, 103)
    axes.set_title("Acceptance by position")
    axes.legend(loc="lower right")
    return True


def _calibration(evaluation: Evaluation, figure: Any) -> bool:
    shown = [(s.run, c) for s in evaluation.summaries.values() for c in s.calibration[:1]]
    if not shown:
        return False
    axes = figure.add_subplot()
    least = min(_stretch(b.confidence) for _, c in shown for b in c.bins)
    bottom = min(b.low for _, c in shown for b in c.bins)
    ideal = [least + (5 - least) * j / 100 for j in range(101)]
    axes.plot(ideal, [100 * (1 - 10**-t) for t in ideal], color="#c3c8d0", lw=1.2, ls="--")
    for i, (run, curve) in enumerate(shown):
        x = [_stretch(b.confidence) for b in curve.bins]
        y = [100 * b.right for b in curve.bins]
        spread = [
            [max(100 * (b.right - b.low), 0) for b in curve.bins],
            [max(100 * (b.high - b.right), 0) for b in curve.bins],
        ]
        axes.errorbar(
            x, y, yerr=spread, marker="o", ms=4, lw=1.4, capsize=2, color=RUNS[i % len(RUNS)],
            label=f"{run}, error {100 * curve.error:.1f} %",
        )  # fmt: skip
    marks = [c for c in (0, 0.5, 0.9, 0.99, 0.999, 0.9999) if _stretch(c) >= least - 0.05]
    axes.set_xticks([*map(_stretch, marks), 5.0], [*map(str, marks), "1"])
    axes.set_ylim(bottom=max(100 * bottom - 3, 0))
    axes.set_xlabel("lowest score of a step that was kept")
    axes.set_ylabel("right, %")
    axes.set_title("Calibration")
    axes.legend(loc="lower right")
    return True


def _stretch(score: float) -> float:
    """Scores crowd below 1: each decade of 1 - score is as wide."""
    return -math.log10(max(1 - score, 1e-5))


def _tokens(evaluation: Evaluation, figure: Any) -> bool:
    shown = [s for s in evaluation.summaries.values() if s.timeline.tokens]
    if not shown:
        return False
    colours = slice_colours(list(evaluation.manifest.engine.slices))
    figure.set_size_inches(6.2, 0.8 + 1.05 * len(shown))
    figure.set_layout_engine("constrained")
    drawn: dict[str, Any] = {}
    for i, summary in enumerate(shown):
        axes, line = figure.add_subplot(len(shown), 1, i + 1), summary.timeline
        names = sorted(line.tokens, key=lambda n: list(colours).index(n) if n in colours else 99)
        x = [j * line.span for j in range(len(line.tokens[names[0]]) + 1)]
        rates = [[count / line.span for count in (*line.tokens[n], 0)] for n in names]
        shades = [colours.get(n, BASELINE) for n in names]
        drawn |= zip(names, axes.stackplot(x, rates, colors=shades, step="post"), strict=True)
        axes.set_title(summary.run)
        axes.set_ylabel("tokens/s")
        axes.set_xlim(0, summary.seconds)
        axes.locator_params(axis="y", nbins=3)
    axes.set_xlabel("seconds since the run began")
    figure.legend(drawn.values(), drawn.keys(), loc="outside upper right", ncols=len(drawn))
    return True


FIGURES: dict[str, Callable[[Evaluation, Any], bool]] = {
    "frontier_latency": _latency,
    "frontier_cost": _cost,
    "acceptance": _acceptance,
    "calibration": _calibration,
    "tokens": _tokens,
}
