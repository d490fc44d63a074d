"""What every strategy is: settings, and a generator that runs one task."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Annotated, ClassVar

from pydantic import BaseModel, ConfigDict, Field

from cascade.cache import Cache
from cascade.errors import RequestError
from cascade.model import ElasticModel
from cascade.policies import Policy
from cascade.sampling import SamplingParams
from cascade.task import Task
from cascade.text import Codec
from cascade.verbs import Run


@dataclass(frozen=True, slots=True)
class Roles:
    """The slices and the policy a request runs with, where the strategy names none itself."""

    draft: str
    verify: str
    policy: Policy


@dataclass(frozen=True, slots=True)
class Setting:
    """What a request would run with; for a strategy to refuse before any work."""

    model: ElasticModel
    codec: Codec
    cache: Cache
    roles: Roles
    params: SamplingParams


class Strategy(BaseModel, ABC):
    """Derive from this and implement `run`. Fields are the strategy's settings.

    delimiter:       text that ends a step; `"\\n\\n"` for paragraphs
    max_step_tokens: a longer step is cut there, or where the cache's `max_draft` ends

    The scheduler runs many tasks at once; `run` is written for one.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    # Fields that name a slice.
    slice_fields: ClassVar[tuple[str, ...]] = ("draft", "verify")

    delimiter: Annotated[str, Field(min_length=1)] = "\n"
    max_step_tokens: Annotated[int, Field(ge=1)] = 64

    @property
    def slots(self) -> int:
        """Slots of the cache that one request would use at once."""
        return 1

    def check(self, setting: Setting) -> None:
        """Raise RequestError (SliceError for slices) for what could not work, before any work."""
        for field in self.slice_fields:
            if getattr(self, field, None) is not None:
                setting.model.slice_index(getattr(self, field))
        if {"draft", "verify"} <= set(type(self).model_fields):
            check_sizes(setting.model, *self.pair(setting.roles))
        if self.slots > 1 and setting.cache.max_batch < 2:
            raise RequestError(
                f"{type(self).__name__} runs drafts in slots of their own; "
                f"max_batch={setting.cache.max_batch} leaves none for them"
            )

    def pair(self, roles: Roles) -> tuple[str, str]:
        """The drafting and the verifying slice: its own fields, or the request's roles."""
        return (
            getattr(self, "draft", None) or roles.draft,
            getattr(self, "verify", None) or roles.verify,
        )

    @abstractmethod
    def run(self, task: Task, roles: Roles) -> Run:
        """Yield verbs until `task.finished`."""


def check_sizes(model: ElasticModel, draft: str, verify: str) -> None:
    """Raises RequestError for a draft slice that is larger than the verifying one."""
    small, large = model.slice_spec(draft), model.slice_spec(verify)
    if small.parameters > large.parameters:
        raise RequestError(f"draft={draft!r} is larger than verify={verify!r}; swap them")
