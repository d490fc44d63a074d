"""One slice alone: the baseline."""

from __future__ import annotations

from typing import ClassVar

from cascade.strategies.base import Roles, Strategy
from cascade.task import Task
from cascade.verbs import Run


class Single(Strategy):
    """Generate with one slice, the verifying one unless named."""

    slice_fields: ClassVar[tuple[str, ...]] = ("slice",)

    slice: str | None = None

    def run(self, task: Task, roles: Roles) -> Run:
        slice = self.slice or roles.verify
        yield from task.prefill(slice)
        while not task.finished:
            if task.thinking_is_over_budget:
                yield from task.end_thinking(slice)
                continue
            task.open_step()
            yield from task.write(self.max_step_tokens, slice)
            task.close_step("written")
