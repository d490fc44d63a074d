"""Elastic budget control: one slice thinks under a token budget, another one answers."""

from __future__ import annotations

import re
from collections.abc import Sequence as Seq
from typing import Annotated, ClassVar, Literal

from pydantic import Field

from cascade.errors import RequestError
from cascade.strategies.base import Roles, Setting, Strategy
from cascade.task import Task
from cascade.verbs import Run

SENTENCE_END = re.compile(r"[.!?][\"')\]]*$")


class Budget(Strategy):
    """Think with one slice, the draft slice unless named; answer with another, the verifying one.

    budget: tokens of thought, or `SamplingParams.thinking_token_budget`; None for no limit
    slack:  a thought that reaches its budget is ended at the last line or sentence that ends at
            most so many tokens (and a quarter of the budget) before it, if there is one
    switch: `exact` runs the thought again under the answering slice before it goes on
            (`Metrics.refreshed`, `refresh_seconds`), `shared` lets it read the cache as it is,
            for checkpoints that were trained for it
    """

    slice_fields: ClassVar[tuple[str, ...]] = ("think", "answer")

    think: str | None = None
    answer: str | None = None
    budget: Annotated[int, Field(ge=0)] | None = None
    slack: Annotated[int, Field(ge=0)] = 16
    switch: Literal["exact", "shared"] = "exact"

    def check(self, setting: Setting) -> None:
        super().check(setting)
        limit = setting.params.max_tokens
        if self.budget is not None and limit is not None and self.budget > limit:
            raise RequestError(f"Budget(budget={self.budget}) is beyond max_tokens={limit}")

    def run(self, task: Task, roles: Roles) -> Run:
        thinker, answerer = self.think or roles.draft, self.answer or roles.verify
        yield from task.prefill(thinker)
        while task.phase == "thinking" and not task.finished:
            yield from self._think(task, thinker)
        if task.finished:
            return
        if self.switch == "exact" and thinker != answerer:
            yield from task.refresh(answerer)
        while not task.finished:
            task.open_step()
            yield from task.write(self.max_step_tokens, answerer)
            task.close_step("written")

    def _think(self, task: Task, slice: str) -> Run:
        """One step of the thought, or its end."""
        limits = (self.budget, task.sampler.params.thinking_token_budget)
        budget = min((limit for limit in limits if limit is not None), default=None)
        left = None if budget is None else max(budget - task.thought, 0)
        near = left is not None and left <= min(self.slack, (budget or 0) // 4)
        if left == 0 or (near and task.at_step_end):
            yield from task.end_thinking(slice)
            return
        task.open_step()
        room = task.allowance(self.max_step_tokens if left is None else left)
        ids = yield from task.continue_step(min(room, self.max_step_tokens), slice)
        ended = 0 if not near or task.ends_step(ids) else last_sentence_end(task, ids)
        yield from task.commit(ended or len(ids), slice)
        task.close_step("written")
        if ended and not task.finished:
            yield from task.end_thinking(slice)


def last_sentence_end(task: Task, ids: Seq[int]) -> int:
    """How many of the ids to keep so that the last one ends a sentence; 0 where none does."""
    for count in range(len(ids) - 1, 0, -1):
        text, after = task.codec.decode(ids[:count]), task.codec.decode(ids[count : count + 1])
        if text and after and SENTENCE_END.search(text) and after[0].isspace():
            return count
    return 0
