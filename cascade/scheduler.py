"""Runs many tasks at once: equal verbs of different tasks become one batch.

A task that ends gives its slot to the next one in the queue at once; a task that fails ends with
its own error and leaves the others running. A task that gathers others waits until they have ended.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from cascade.batch import Batch
from cascade.errors import CacheFull, CascadeError
from cascade.events import Done, Event
from cascade.results import Result
from cascade.task import Task
from cascade.verbs import (
    Append,
    Commit,
    Draft,
    Gather,
    Propose,
    Refresh,
    Rollback,
    Run,
    Verb,
    Verify,
)

Kind: TypeAlias = tuple[Any, ...]


@dataclass
class Job:
    """A request in the queue. `start` opens its sequence and its strategy's generator.

    slots: how many it would use at once, those of the tasks that it gathers included
    """

    number: int
    start: Callable[[], tuple[Task, Run]]
    slots: int = 1


@dataclass(eq=False)
class _Active:
    number: int
    task: Task
    run: Run
    slots: int = 1
    family: _Family | None = None  # of which it is a child
    verb: Verb = field(init=False)
    error: BaseException | None = None
    ended: bool = False

    @property
    def kind(self) -> Kind:
        """Tasks of one kind can share a batch."""
        verb = self.verb
        return type(verb), *(
            getattr(verb, name, None) for name in ("slice", "until", "repair", "last")
        )


@dataclass(eq=False)
class _Family:
    """The tasks that one task has gathered."""

    parent: _Active
    enough: Callable[[list[Task]], bool]
    waiting: deque[tuple[int, Callable[[], tuple[Task, Run]]]]
    running: list[_Active] = field(default_factory=list)
    ended: list[tuple[int, Task]] = field(default_factory=list)


@dataclass(frozen=True)
class Outcome:
    """What `run` yields: an event of job `number`; with `Done`, the error that ended it, if any."""

    number: int
    event: Event
    task: Task
    error: BaseException | None = None


def run(
    jobs: Iterable[Job],
    max_batch: int,
    on_end: Callable[[Task], None] | None = None,
    stopped: Callable[[], bool] = lambda: False,
) -> Iterator[Outcome]:
    """Run jobs, at most `max_batch` slots at a time, and yield their events as they happen.

    on_end:  called with a task that has ended, before its sequence is closed
    stopped: asked before every verb; once it says true all work stops
    Closing the iterator stops all work and frees all slots.
    """
    return _Scheduler(deque(jobs), max_batch, on_end, stopped).run()


@dataclass
class _Scheduler:
    queue: deque[Job]
    max_batch: int
    on_end: Callable[[Task], None] | None
    stopped: Callable[[], bool]
    active: list[_Active] = field(default_factory=list)
    families: list[_Family] = field(default_factory=list)

    def run(self) -> Iterator[Outcome]:
        try:
            while (self.queue or self.active) and not self.stopped():
                while self.queue and self._has_room_for(self.queue[0]):
                    job = self.queue.popleft()
                    entry = _Active(job.number, *job.start(), job.slots)
                    self.active.append(entry)
                    yield from self._resume(entry, None)
                yield from self._start_children()
                group = _largest_group(self.active)
                if not group and self.families:
                    full = CacheFull("no slot is left for gathered tasks; use a larger max_batch")
                    yield from self._end_family(self.families[-1], full)
                for entry, outcome in zip(group, _execute(group), strict=True):
                    if not entry.ended:  # one whose family has ended meanwhile is not resumed
                        yield from self._resume(entry, outcome)
        finally:
            for entry in self.active:
                entry.run.close()
                entry.task.sequence.close()

    def _has_room_for(self, job: Job) -> bool:
        """Whether a job fits beside those that run; a large one runs alone, as well as it can."""
        used = sum(entry.slots for entry in self.active if entry.family is None)
        return not used or used + job.slots <= self.max_batch

    def _start_children(self) -> Iterator[Outcome]:
        for family in list(self.families):
            while family.waiting and family.parent.task.sequence.cache.free_slots:
                number, start = family.waiting.popleft()
                try:
                    child = _Active(number, *start(), family=family)
                except Exception as error:
                    yield from self._end_family(family, error)
                    break
                family.running.append(child)
                self.active.append(child)
                yield from self._resume(child, None)
            if family in self.families and not (family.running or family.waiting):
                yield from self._end_family(family, None)  # nothing was gathered

    def _resume(self, entry: _Active, outcome: Any) -> Iterator[Outcome]:
        """Give a task its outcome and take its next verb, or note how it ended."""
        began = time.perf_counter()
        try:
            if isinstance(outcome, BaseException):
                entry.verb = entry.run.throw(outcome)
            else:
                entry.verb = entry.run.send(outcome)
            if isinstance(entry.verb, Gather):
                waiting = deque(enumerate(entry.verb.children))
                self.families.append(_Family(entry, entry.verb.enough, waiting))
        except StopIteration:
            entry.ended = True
            if entry.family is None and not entry.task.finished:
                entry.task.finish_reason = "length"
        except Exception as error:  # the task's own failure; the others go on
            entry.error, entry.ended = error, True
            entry.task.finish_reason = "error"
        entry.task.busy += time.perf_counter() - began
        yield from self._drain(entry)

    def _drain(self, entry: _Active) -> Iterator[Outcome]:
        """Hand on a task's new events; close it when it has ended."""
        events, entry.task.events = entry.task.events, []
        if entry.family is None:
            for event in events:
                yield Outcome(entry.number, event, entry.task)
        if not entry.ended:
            return
        self.active.remove(entry)
        if entry.family is not None:
            entry.task.sequence.close()
            yield from self._end_child(entry, entry.family)
            return
        result: Result = entry.task.result(entry.error)
        if self.on_end is not None and entry.error is None:
            self.on_end(entry.task)
        entry.task.sequence.close()
        yield Outcome(entry.number, Done(result), entry.task, entry.error)

    def _end_child(self, child: _Active, family: _Family) -> Iterator[Outcome]:
        family.running.remove(child)
        if child.error is not None:
            yield from self._end_family(family, child.error)
            return
        family.ended.append((child.number, child.task))
        try:
            over = family.enough([task for _, task in family.ended])
        except Exception as error:
            yield from self._end_family(family, error)
            return
        if over or not (family.running or family.waiting):
            yield from self._end_family(family, None)

    def _end_family(self, family: _Family, error: BaseException | None) -> Iterator[Outcome]:
        """Stop what still runs, and resume the parent."""
        self.families.remove(family)
        for child in family.running:
            child.ended = True
            child.run.close()
            child.task.sequence.close()
            self.active.remove(child)
        ended = [task for _, task in sorted(family.ended, key=lambda pair: pair[0])]
        yield from self._resume(family.parent, error or ended)


def _largest_group(active: list[_Active]) -> list[_Active]:
    """The most tasks that wait for one kind of verb; among equals the longest-waiting kind."""
    groups: dict[Kind, list[_Active]] = {}
    for entry in active:
        if not isinstance(entry.verb, Gather):
            groups.setdefault(entry.kind, []).append(entry)
    return max(groups.values(), key=len, default=[])


def _execute(group: list[_Active]) -> list[Any]:
    """Outcomes of one batch. Where the batch fails, each task alone, and its error as outcome."""
    if not group:
        return []
    began = time.perf_counter()
    try:
        outcomes = _run_verbs(group)
        for entry in group:
            entry.task.beside = len(group)
            entry.task.busy += (time.perf_counter() - began) / len(group)
        return outcomes
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
        case Propose():
            batch.propose([v.ids for v in verbs])
        case Verify():
            return batch.verify(verbs[0].slice, repair=verbs[0].repair)
        case Commit():
            batch.commit([v.n for v in verbs], [v.bonus for v in verbs])
        case Rollback():
            batch.rollback([v.length for v in verbs])
        case Refresh():
            return batch.refresh(verbs[0].slice, verbs[0].last)
    return [None] * len(group)
