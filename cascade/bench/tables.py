"""How a report looks in a terminal."""

from __future__ import annotations

from collections.abc import Iterator
from collections.abc import Sequence as Seq

from rich.console import RenderableType
from rich.table import Table

from cascade.bench.report import Cost, Experts, Prediction, Report
from cascade.slices import format_bytes

SPREAD = 0.9  # of the distinct experts that even routing gives: below this it is not spread


def report_tables(report: Report) -> Iterator[RenderableType]:
    """Tables and sentences, in the order in which they are read."""
    machine = report.machine
    yield (
        f"{report.model}, {machine.dtype}, on {machine.device}, torch {machine.torch}, "
        f"{machine.threads} threads: copies {machine.bandwidth / 1e9:,.0f} GB/s"
    )
    worst = max(report.agreement, key=lambda one: one.error / one.allowed)
    yield (
        f"{len(report.agreement)} comparisons with the plain reference agree; the worst is off by "
        f"{worst.error:.1g} where {worst.allowed:.1g} is allowed"
    )
    yield _decode(report)
    yield _passes(report)
    yield from _sentences(report)
    if report.peers:
        yield _peers(report)
    if report.predictions:
        yield _predictions(report.predictions)
        yield _verdict(report.predictions)


def _decode(report: Report) -> Table:
    first = report.decode[0]
    columns = ["slice", "batch", "step ms", "tok/s", "GB/s", "floor ms", "share", "experts"]
    table = _table(
        f"decode: drafted and committed, {first.run} tokens at a time, about {first.context} "
        "tokens of context",
        [*columns, "in use"] if first.peak else columns,
    )
    for row in report.decode:
        table.add_row(
            row.slice,
            str(row.batch),
            _ms(row.cost.seconds),
            f"{row.tokens_per_second:,.0f}",
            *_bus(row.cost),
            _experts(row.experts),
            *([format_bytes(row.peak)] if row.peak else []),
        )
    return table


def _passes(report: Report) -> Table:
    table = _table(
        "one pass over so many tokens, batch 1",
        ("slice", "tokens", "ms", "tok/s", "GB/s", "floor ms", "share", "experts"),
    )
    for row in report.scoring:
        what = f"{'verify' if row.tokens < 16 else 'score'} {row.tokens}"
        rate = f"{row.tokens / row.cost.seconds:,.0f}"
        table.add_row(
            row.slice,
            what,
            _ms(row.cost.seconds),
            rate,
            *_bus(row.cost),
            _experts(row.experts),
        )
    for prompt in report.prefill:
        rate = f"{prompt.tokens_per_second:,.0f}"
        table.add_row(
            prompt.slice, f"prefill {prompt.tokens}", _ms(prompt.seconds), rate, *[""] * 4
        )
    return table


def _sentences(report: Report) -> Iterator[str]:
    counted = [d.experts for d in report.decode if d.experts]
    if counted:
        least = min(e.distinct / e.spread for e in counted)
        yield (
            "experts: distinct ones read by a step or a pass, counted on the tokens that were "
            "timed, mean over layers; in brackets what evenly spread routing reads, "
            "E (1 - (1 - k / E) ^ tokens). "
            f"Least share of that: {least:.0%}"
            + ("" if least >= SPREAD else ", so the routing of these tokens is not spread")
        )
    rates = ", ".join(f"{p.slice} {p.flops / p.seconds / 1e12:,.2f}" for p in report.prefill)
    yield f"prefill, TFLOP/s at two operations an active parameter and token: {rates}"
    for switch in report.switches:
        yield f"switch {switch.before} -> {switch.after}: {switch.seconds * 1e3:+.2f} ms"
    memory = report.memory
    yield (
        f"memory: weights {format_bytes(memory.weights)} for all slices, copies for the smaller "
        f"ones {format_bytes(memory.copies)}, cache {format_bytes(memory.cache)} for a sequence "
        f"of {memory.context} tokens"
    )
    for reason in report.skipped:
        yield f"left out: {reason}"


def _peers(report: Report) -> Table:
    table = _table(
        "other engines: a decoded token at batch 1", ("engine", "slice", "ms", "x ours", "note")
    )
    table.columns[-1].justify = "left"
    for peer in report.peers:
        time = "" if peer.seconds is None else _ms(peer.seconds)
        ratio = "" if peer.ratio is None else f"{peer.ratio:.1f}"
        table.add_row(peer.name, peer.slice, time, ratio, peer.note)
    return table


def _predictions(predictions: Seq[Prediction]) -> Table:
    first = predictions[0]
    how = first.acceptance.source
    rates = [f"at {p.acceptance.token:.0%}" if how == "assumed" else "gain" for p in predictions]
    kept = (
        f"assumed acceptance by token and by step, {first.draft} drafting"
        if how == "assumed"
        else f"the acceptance measured: {first.verify} keeps {first.acceptance.token:.0%} of the "
        f"tokens that {first.draft} drafts one after the other, and stepwise "
        f"{first.acceptance.step:.0%} of its steps"
    )
    table = _table(
        f"prediction: speed over {first.verify} alone, from the times above and {kept}",
        ("strategy", "setting", *rates, "pays from"),
    )
    for number, forecast in enumerate(first.forecasts):
        gains = [f"{p.forecasts[number].gain:.2f}x" for p in predictions]
        needs = forecast.strategy in ("speculative", "stepwise")
        pays = "" if not needs else _share(forecast.break_even)
        table.add_row(forecast.strategy, forecast.setting, *gains, pays)
    return table


def _verdict(predictions: Seq[Prediction]) -> str:
    parts = [f"{p.best} at {p.acceptance.token:.0%}" for p in predictions]
    return (
        f"of the strategies in which {predictions[0].verify} sees every token, what pays most here "
        f"({predictions[0].acceptance.source} acceptance): {', '.join(parts)}. "
        "Gains are of speed alone, and say nothing of the quality of what is written"
    )


def _table(title: str, columns: Seq[str]) -> Table:
    table = Table(title=title, title_justify="left")
    for number, column in enumerate(columns):
        table.add_column(column, justify="left" if number < 1 else "right", no_wrap=True)
    return table


def _bus(cost: Cost) -> tuple[str, str, str]:
    return f"{cost.moved / cost.seconds / 1e9:,.1f}", _ms(cost.floor), f"{cost.share:.0%}"


def _experts(experts: Experts | None) -> str:
    return "" if experts is None else f"{experts.distinct:.1f} ({experts.spread:.1f})"


def _share(value: float | None) -> str:
    return "never" if value is None else f"{value:.0%}"


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:,.3f}"
