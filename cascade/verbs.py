"""What a strategy asks of the scheduler: one verb at a time, and the outcome it is sent back.

The scheduler runs equal verbs of many tasks as one batch. Each is a verb of `Sequence`, except
`Gather`, which runs several tasks beside each other.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

if TYPE_CHECKING:
    from cascade.task import Task


@dataclass(frozen=True, slots=True)
class Append:
    """Outcome: logits [V] after the last id."""

    ids: Seq[int]
    slice: str


@dataclass(frozen=True, slots=True)
class Draft:
    """Outcome: the list of drafted ids, at most `k`, up to and with one of `until`."""

    k: int
    slice: str
    until: frozenset[int]


@dataclass(frozen=True, slots=True)
class Propose:
    """Outcome: None."""

    ids: Seq[int]


@dataclass(frozen=True, slots=True)
class Verify:
    """Outcome: logits [k + 1, V] over the drafted ids."""

    slice: str
    repair: bool = True


@dataclass(frozen=True, slots=True)
class Commit:
    """Outcome: None."""

    n: int
    bonus: int | None = None


@dataclass(frozen=True, slots=True)
class Rollback:
    """Outcome: None."""

    length: int


@dataclass(frozen=True, slots=True)
class Refresh:
    """Outcome: how many tokens were run again.

    last: of the last tokens at most so many; see `Sequence.refresh` for what that leaves
    """

    slice: str
    last: int | None = None


@dataclass(frozen=True, slots=True)
class Gather:
    """Run tasks beside each other, as many at a time as there are slots.

    children: each opens a task and its run when a slot is free for it
    enough:   is given the children that have ended, in the order in which they did; once it says
              true the others are stopped
    Outcome: the children that ended by themselves, in the order of `children`. Their sequences are
    closed; what they wrote is in `Task.ids` and `Task.steps`. The first error of a child is raised
    instead.
    """

    children: Seq[Callable[[], tuple[Task, Run]]]
    enough: Callable[[Seq[Task]], bool] = lambda ended: False


Verb: TypeAlias = Append | Draft | Propose | Verify | Commit | Rollback | Refresh | Gather
Run: TypeAlias = Generator[Verb, Any, None]
