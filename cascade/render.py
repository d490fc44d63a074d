"""How steps, tables and reports look in a terminal. Plain text where it is not one."""

from __future__ import annotations

from collections.abc import Mapping
from collections.abc import Sequence as Seq

from rich.console import Console
from rich.table import Table
from rich.text import Text

from cascade.audit import AuditReport
from cascade.events import Event
from cascade.handoff import HandoffReport
from cascade.model import DEFAULT_DRAFT, DEFAULT_LENGTH, ElasticModel
from cascade.results import Result
from cascade.slices import format_bytes, format_count

PALETTE = ("cyan", "yellow", "magenta", "green", "blue")


class StepPrinter:
    """Prints events: steps coloured by the slice that wrote them, retracted drafts struck out."""

    def __init__(self, console: Console, slices: Seq[str]) -> None:
        self.console = console
        self.colours = {name: PALETTE[i % len(PALETTE)] for i, name in enumerate(slices)}
        self.width = max(len(name) for name in slices)
        self._phase = ""

    def show(self, event: Event) -> None:
        match event.kind:
            case "step_retracted":
                text = _one_line(event.text, event.token_ids)
                self._line(event.slice, Text(text, style="strike dim"), _score(event.score, "drop"))
            case "step_committed":
                step = event.step
                if step.phase == "answer" and self._phase == "thinking":
                    self.console.print()
                self._phase = step.phase
                text = _one_line(step.text, step.token_ids)
                self._line(
                    step.slice,
                    Text(text, style=self.colours[step.slice]),
                    _score(step.score, step.decision) if step.score is not None else step.decision,
                )

    def _line(self, slice: str, text: Text, note: str) -> None:
        label = Text(f"{slice:>{self.width}}  ", style=self.colours[slice])
        self.console.print(label + text + Text(f"   {note}", style="dim"), soft_wrap=True)


def summary(result: Result) -> str:
    """One line: answer, tokens by slice, speed."""
    usage, metrics = result.usage, result.metrics
    shares = ", ".join(f"{name} {count}" for name, count in sorted(usage.by_slice.items()))
    parts = [
        f"answer {result.answer!r}" if result.answer is not None else "no tokenizer",
        f"{usage.completion} tokens ({shares})",
        f"{usage.rewritten} rewritten",
        f"{metrics.seconds:.2f} s",
        f"{metrics.tokens_per_second:.0f} tokens/s",
    ]
    if result.finish_reason != "stop":
        parts.append(f"ended by {result.finish_reason}")
    return " · ".join(parts)


def comparison(rows: Seq[Mapping[str, object]], title: str) -> Table:
    """A table with one row a run; columns are the keys of the first row."""
    table = Table(title=title, title_justify="left")
    for number, column in enumerate(rows[0]):
        table.add_column(column, justify="left" if number == 0 else "right")
    for row in rows:
        table.add_row(*(str(value) for value in row.values()))
    return table


def model_tables(model: ElasticModel) -> list[Table]:
    """What `cascade inspect` shows."""
    arch = model.arch
    layers = Table(title=f"{model.name}: {len(arch.kinds)} layers", title_justify="left")
    for column in ("kind", "layers", "sizes"):
        layers.add_column(column)
    sizes = {
        "mamba": f"{arch.heads} heads x {arch.head_dim}, state {arch.state_size}, "
        f"{arch.groups} groups, conv {arch.conv_taps}",
        "attention": f"{arch.query_heads} query / {arch.kv_heads} kv heads x {arch.attention_dim}",
        "moe": f"{arch.experts} experts, top {arch.top_k}, one shared",
        "mlp": "dense",
    }
    for kind, text in sizes.items():
        if kind in arch.kinds:
            layers.add_row(kind, str(arch.kinds.count(kind)), text)
    slices = Table(title="slices", title_justify="left")
    for column in ("slice", "width", "expert width", "parameters", "active", "bytes", "trained"):
        slices.add_column(column, justify="left" if column == "slice" else "right")
    for spec in model.slices.values():
        slices.add_row(
            spec.name,
            str(spec.hidden_size),
            str(spec.moe_intermediate_size),
            format_count(spec.parameters),
            format_count(spec.active),
            format_bytes(spec.parameters * model.dtype.itemsize),
            "yes" if spec.trained else "no",
        )
    cache = Table(title="cache, the same for every slice", title_justify="left")
    cache.add_column("part")
    cache.add_column("bytes", justify="right")
    cache.add_row("keys and values, per token", format_bytes(arch.bytes_per_token(model.dtype)))
    cache.add_row("SSM states, per sequence", format_bytes(arch.state_bytes()))
    cache.add_row("conv windows, per sequence", format_bytes(arch.window_bytes(model.dtype)))
    cache.add_row("journal, per drafted token", format_bytes(arch.journal_bytes(1, model.dtype)))
    slots = sequence_bytes(model)
    cache.add_row(f"one sequence of {slots['tokens']:,} tokens", format_bytes(slots["shared"]))
    cache.add_row('the same with draft_cache="own"', format_bytes(slots["own"]))
    cache.add_row("weights, resident once for all slices", format_bytes(model.nbytes))
    return [layers, slices, cache]


def sequence_bytes(model: ElasticModel) -> dict[str, int]:
    """Bytes of one sequence of the default length, by draft cache."""
    tokens = min(DEFAULT_LENGTH, model.arch.max_positions)
    slot = model.arch.slot_bytes(tokens, DEFAULT_DRAFT, model.dtype)
    return {"tokens": tokens, "shared": slot, "own": 2 * slot}


def audit_table(report: AuditReport) -> Table:
    """What `cascade audit` shows: the largest deviation by layer and part."""
    table = Table(
        title=f"cache against a prefill by {report.slice!r}: {report.tokens} tokens",
        title_justify="left",
    )
    for column in ("layer", "part", "max |difference|", "relative"):
        table.add_column(column, justify="right")
    for d in report.by_layer:
        style = "" if d.relative <= report.tolerance else "red"
        table.add_row(str(d.layer), d.part, f"{d.absolute:.3g}", f"{d.relative:.3g}", style=style)
    return table


def handoff_table(report: HandoffReport) -> Table:
    """What `cascade audit --handoff` shows."""
    table = Table(title="going on over another slice's cache", title_justify="left")
    for column in ("writer", "reader", "nats / token", "over its own", "same token", "tokens"):
        table.add_column(column, justify="right")
    for pair in report.pairs:
        table.add_row(
            pair.writer,
            pair.reader,
            f"{pair.loss:.4f}",
            f"{pair.own_loss:.4f}",
            f"{pair.agreement:.1%}",
            str(pair.tokens),
        )
    return table


def _score(score: float | None, decision: str) -> str:
    return decision if score is None else f"{decision} p={score:.2f}"


def _one_line(text: str | None, ids: Seq[int]) -> str:
    return " ".join(map(str, ids)) if text is None else text.strip("\n").replace("\n", "⏎")
