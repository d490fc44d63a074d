"""What every strategy is: settings, and a generator that runs one task."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

from pydantic import BaseModel, ConfigDict

from cascade.policies import Policy
from cascade.task import Task
from cascade.verbs import Run


@dataclass(frozen=True, slots=True)
class Roles:
    """The slices and the policy a request runs with, where the strategy names none itself."""

    draft: str
    verify: str
    policy: Policy


class Strategy(BaseModel, ABC):
    """Derive from this and implement `run`. Fields are the strategy's settings.

    The scheduler runs many tasks at once; `run` is written for one.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    @property
    def slots(self) -> int:
        """Slots of the cache that one request would use at once."""
        return 1

    @abstractmethod
    def run(self, task: Task, roles: Roles) -> Run:
        """Yield verbs until `task.finished`."""
