"""A live bar for people, silence for scripts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence as Seq
from types import TracebackType

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from cascade.evaluation.records import Record
from cascade.render import PALETTE


class LiveProgress:
    """Items a second, accuracy so far, share of tokens by slice, and time left, run by run.

    Shows nothing where the console is no terminal.
    """

    def __init__(self, console: Console, slices: Seq[str]) -> None:
        self._colours = {name: PALETTE[i % len(PALETTE)] for i, name in enumerate(slices)}
        self._bars = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn("{task.fields[facts]}"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=console,
            disable=not console.is_terminal,
        )
        self._task: TaskID | None = None

    def __enter__(self) -> LiveProgress:
        self._bars.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        tb: TracebackType | None,
    ) -> None:
        self._bars.stop()

    def begin(self, run: str, total: int, finished: Seq[Record]) -> None:
        """A run starts, of which some items were finished in an earlier sitting."""
        self._task = self._bars.add_task(run, total=total, completed=len(finished), facts="")
        self._solved, self._failed, self._fresh = 0.0, 0, 0
        self._tokens: Counter[str] = Counter()
        for record in finished:
            self._count(record)

    def advance(self, record: Record) -> None:
        assert self._task is not None, "begin() comes first"
        self._count(record)
        self._fresh += 1
        [task] = [t for t in self._bars.tasks if t.id == self._task]
        rate = self._fresh / task.elapsed if task.elapsed else 0.0
        self._bars.update(self._task, advance=1, facts=self._facts(rate, int(task.completed) + 1))

    def _count(self, record: Record) -> None:
        self._solved += record.score
        self._failed += record.error is not None
        self._tokens.update(record.usage.get("by_slice", {}))

    def _facts(self, rate: float, done: int) -> str:
        total = sum(self._tokens.values()) or 1
        shares = " ".join(
            f"[{self._colours.get(name, 'white')}]{name} {count / total:.0%}[/]"
            for name, count in sorted(self._tokens.items())
        )
        failed = f" · [red]{self._failed} failed[/]" if self._failed else ""
        return f"{rate:.1f}/s · {self._solved / max(done, 1):.1%} right · {shares}{failed}"
