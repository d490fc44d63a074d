"""Runs many tasks at once: equal verbs of different tasks become one batch.

A task that ends gives its slot to the next one in the queue at once; a task that fails ends with
its own error and leaves the others running.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from cascade.batch import Batch
from cascade.errors import CascadeError
from cascade.events import Done, Event
from cascade.results import Result
from cascade.task import Append, Commit, Draft, Run, Task, Verb, Verify


@dataclass
class Job:
    """A request in the queue. `start` opens its sequence and its strategy's generator."""

    number: int
    start: Callable[[], tuple[Task, Run]]


@dataclass
class _Active:
    number: int
    task: Task
    run: Run
    verb: Verb = field(init=False)
    error: BaseException | None = None
    ended: bool = False

    @property
    def kind(self) -> tuple[type, str, frozenset[int]]:
        """Tasks of one kind can share a batch."""
        verb = self.verb
        return type(verb), getattr(verb, "slice", ""), getattr(verb, "until", frozenset())


@dataclass(frozen=True)
class Outcome:
    """What `run` yields: an event of job `number`; with `Done`, the error that ended it, if any."""

    number: int
    event: Event
    error: BaseException | None = None


def run(
    jobs: Iterable[Job], max_batch: int, on_end: Callable[[Task], None] | None = None
) -> Iterator[Outcome]:
    """Run jobs, at most `max_batch` at a time, and yield their events as they happen.

    on_end: called with a task that has ended, before its sequence is closed.
    Closing the iterator stops all work and frees all slots.
    """
    queue, active = deque(jobs), list[_Active]()
    try:
        while queue or active:
            while queue and len(active) < max_batch:
                job = queue.popleft()
                task, generator = job.start()
                entry = _Active(job.number, task, generator)
                active.append(entry)
                _resume(entry, None)
                yield from _drain(entry, active, on_end)
            if not active:
                continue
            group = _largest_group(active)
            for entry, outcome in zip(group, _execute(group), strict=True):
                _resume(entry, outcome)
                yield from _drain(entry, active, on_end)
    finally:
        for entry in active:
            entry.run.close()
            entry.task.sequence.close()


def _largest_group(active: list[_Active]) -> list[_Active]:
    """The most tasks that wait for one kind of verb; among equals the longest-waiting kind."""
    groups: dict[tuple[type, str, frozenset[int]], list[_Active]] = {}
    for entry in active:
        groups.setdefault(entry.kind, []).append(entry)
    return max(groups.values(), key=len)


def _execute(group: list[_Active]) -> list[Any]:
    """Outcomes of one batch. Where the batch fails, each task alone, and its error as outcome."""
    try:
        return _run_verbs(group)
    except (CascadeError, RuntimeError, MemoryError) as error:
        if len(group) == 1:
            return [error]
        return [_execute([entry])[0] for entry in group]


def _run_verbs(group: list[_Active]) -> list[Any]:
    batch = Batch([entry.task.sequence for entry in group])
    verbs: list[Any] = [entry.verb for entry in group]
    match verbs[0]:
        case Append():
            return batch.append([v.ids for v in verbs], verbs[0].slice)
        case Draft():
            samplers = [entry.task.sampler for entry in group]
            return batch.draft([v.k for v in verbs], verbs[0].slice, samplers, until=verbs[0].until)
        case Verify():
            return batch.verify(verbs[0].slice)
        case Commit():
            batch.commit([v.n for v in verbs])
    return [None] * len(group)


def _resume(entry: _Active, outcome: Any) -> None:
    """Give a task its outcome and take its next verb; note how it ended if it did."""
    try:
        if isinstance(outcome, BaseException):
            entry.verb = entry.run.throw(outcome)
        else:
            entry.verb = entry.run.send(outcome)
    except StopIteration:
        entry.ended = True
        if not entry.task.finished:
            entry.task.finish_reason = "length"
    except Exception as error:  # the task's own failure; the others go on
        entry.error, entry.ended = error, True
        entry.task.finish_reason = "error"


def _drain(
    entry: _Active, active: list[_Active], on_end: Callable[[Task], None] | None
) -> Iterator[Outcome]:
    """Hand on a task's new events; close it when it has ended."""
    events, entry.task.events = entry.task.events, []
    for event in events:
        yield Outcome(entry.number, event)
    if entry.ended:
        active.remove(entry)
        result: Result = entry.task.result(entry.error)
        if on_end is not None and entry.error is None:
            on_end(entry.task)
        entry.task.sequence.close()
        yield Outcome(entry.number, Done(result), entry.error)
