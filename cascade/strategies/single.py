"""One slice alone: the baseline."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from cascade.strategies.base import Roles, Strategy
from cascade.task import Task
from cascade.verbs import Run


class Single(Strategy):
    """Generate with one slice, the verifying one unless named."""

    slice: str | None = None
    max_step_tokens: Annotated[int, Field(ge=1)] = 64

    def run(self, task: Task, roles: Roles) -> Run:
        slice = self.slice or roles.verify
        yield from task.prefill(slice)
        while not task.finished:
            if task.thinking_is_over_budget:
                yield from task.end_thinking(slice)
                continue
            task.open_step()
            yield from task.write(self.max_step_tokens, slice)
            task.close_step("written", slice, slice)
