"""A book of reasoning: many small drafts from one prefix, judged by the large slice."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence as Seq
from typing import Annotated, Literal

from pydantic import Field

from cascade.results import Candidate
from cascade.strategies.base import Roles, Strategy
from cascade.task import Task
from cascade.verbs import Gather, Run


class Explore(Strategy):
    """Draft several continuations under different seeds, choose one, and go on from it.

    choose: `best`      the draft that the verifier finds likeliest
            `majority`  the answer that most drafts reach; the verifier is not asked
            `vote`      the answer with the highest sum of scores
            `beam`      the best next step, at every step
    score:  what the verifier judges a draft by: its least likely token (`min`) or the geometric
            mean over its tokens (`mean`)
    enough: stop the other drafts once one scores as much; a vote stops when it is decided
    temperature: of the drafts, where the request is greedy
    plan_steps: steps at the beginning that the verifier writes itself

    Drafts share the cost of the prefix. They run as many at a time as the cache has slots. The
    chosen draft is run once more under the verifier, which leaves its cache; `Result.candidates`
    has all of them.
    """

    draft: str | None = None
    verify: str | None = None
    drafts: Annotated[int, Field(ge=1)] = 8
    choose: Literal["best", "majority", "vote", "beam"] = "best"
    score: Literal["min", "mean"] = "min"
    enough: Annotated[float, Field(gt=0, le=1)] | None = 0.5
    temperature: Annotated[float, Field(gt=0)] = 0.7
    plan_steps: Annotated[int, Field(ge=0)] = 0

    @property
    def slots(self) -> int:
        return self.drafts + 1

    @property
    def judged(self) -> bool:
        return self.choose != "majority"

    def run(self, task: Task, roles: Roles) -> Run:
        small, large = self.pair(roles)
        yield from task.prefill(large if self.judged or self.plan_steps else small)
        for _ in range(self.plan_steps):
            if task.phase == "thinking" and not task.finished:
                task.open_step()
                yield from task.write(self.max_step_tokens, large)
                task.close_step("written")
        while not task.finished:
            if task.thinking_is_over_budget:
                yield from task.end_thinking(large if self.judged else small)
            else:
                yield from self._choose_one(task, small, large)

    def _choose_one(self, task: Task, small: str, large: str) -> Run:
        """Draft to the end, or for one step, and go on as the chosen child did."""
        born: list[Task] = []
        start, drafted = task.sequence.length, self._step if self.choose == "beam" else self._whole

        def open_child() -> tuple[Task, Run]:
            child = task.child(len(born) + self.drafts * len(task.steps), self.temperature)
            born.append(child)
            return child, drafted(child, start, small, large)

        ended: list[Task] = yield Gather([open_child] * self.drafts, self._decided)
        task.count_drafts(born)
        chosen = self._chosen(ended)
        if self.choose != "beam":
            task.candidates = tuple(_candidate(child, child is chosen) for child in ended)
        yield from task.adopt(chosen, large if self.judged else small, scored=self.judged)

    def _whole(self, child: Task, start: int, small: str, large: str) -> Run:
        """Write to the end under the small slice; then let the large one judge it in one go."""
        while not child.finished:
            if child.thinking_is_over_budget:
                yield from child.end_thinking(small)
                continue
            child.open_step()
            yield from child.write(self.max_step_tokens, small)
            child.close_step("written")
        if self.judged:
            self._rate(child, (yield from child.rerun(start, large)))

    def _step(self, child: Task, start: int, small: str, large: str) -> Run:
        """Write one step under the small slice and judge it."""
        child.open_step()
        draft = yield from child.propose(self.max_step_tokens, small, large)
        scores = yield from child.rate(draft, large)
        yield from child.commit(len(draft.ids), small)
        child.close_step("accept", small)
        self._rate(child, scores.logprobs)

    def _rate(self, child: Task, logprobs: Seq[float]) -> None:
        low, mean = min(logprobs), sum(logprobs) / len(logprobs)
        child.score = math.exp(low if self.score == "min" else mean)

    def _decided(self, ended: Seq[Task]) -> bool:
        """Whether the drafts that still run cannot, or need not, change the choice."""
        if self.choose in ("best", "beam"):
            return self.enough is not None and (ended[-1].score or 0) >= self.enough
        votes = sorted(self._votes(ended).values(), reverse=True)
        lead = votes[0] - (votes[1] if len(votes) > 1 else 0)
        return lead > self.drafts - len(ended)

    def _votes(self, ended: Seq[Task]) -> dict[object, float]:
        votes: dict[object, float] = defaultdict(float)
        for child in ended:
            votes[_answer(child)] += (child.score or 0) if self.judged else 1
        return votes

    def _chosen(self, ended: Seq[Task]) -> Task:
        if self.choose in ("best", "beam"):
            return max(ended, key=lambda child: child.score or 0)
        votes = self._votes(ended)
        return max(ended, key=lambda child: (votes[_answer(child)], child.score or 0))


def _answer(child: Task) -> object:
    """What a vote counts: the answer's text, or the ids of a draft without a text."""
    answer = child.result().answer
    return tuple(child.generated) if answer is None else answer


def _candidate(child: Task, chosen: bool) -> Candidate:
    result = child.result()
    return Candidate(result.answer, result.text, result.token_ids, child.score, chosen)
