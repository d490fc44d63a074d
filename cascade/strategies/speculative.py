"""The small slice drafts tokens, the large one verifies them; the output is the large one's own."""

from __future__ import annotations

from collections.abc import Generator
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from cascade.pace import Pace
from cascade.strategies.base import Roles, Strategy
from cascade.task import Task
from cascade.verbs import Propose, Run, Verb, Verify


class Speculative(Strategy):
    """Draft a few tokens, verify them in one pass, keep those that the verifier stands by.

    Lossless for every sampling setting: p and q are both taken after every filter, with the history
    of each position. Greedy output is the verifier's own, token by token.

    coupling: how the verifier's draws and the drafter's go together; d is the total variation
              distance of p and q.
              `common`  the verifier draws with the random numbers that the drafter drew with, and
                        its first draw that differs replaces the draft (arXiv 2408.07978). Keeps at
                        least (1 - d) / (1 + d) of the drafts. A seed gives the tokens that `single`
                        gives, whatever is drafted.
              `maximal` speculative sampling (arXiv 2211.17192, algorithm 1). Keeps 1 - d of the
                        drafts, the most there is; but a seed's tokens depend on the draft lengths,
                        and those on measured times unless `draft_tokens` is set.
    draft_tokens: drafted at a time; unless given, adapted to measured times and acceptance, to none
                  where drafting does not pay (`cascade.pace`)
    most:         the longest adapted draft
    """

    draft: str | None = None
    verify: str | None = None
    coupling: Literal["common", "maximal"] = "common"
    draft_tokens: Annotated[int, Field(ge=0)] | None = None
    most: Annotated[int, Field(ge=1)] = 8

    def run(self, task: Task, roles: Roles) -> Run:
        small, large = self.pair(roles)
        yield from task.prefill(large)
        while not task.finished:
            task.open_step()
            if task.thinking_is_over_budget:
                yield from task.end_thinking(large)
            drafting = False
            while task.log.is_open:
                drafting |= yield from self._go_on(task, small, large)
                if self._is_over(task):
                    task.close_step("verified", small) if drafting else task.close_step("written")

    def _go_on(self, task: Task, small: str, large: str) -> Generator[Verb, Any, bool]:
        """One round of drafts, or as much of the step as the verifier writes alone; timed.

        Returns whether anything was drafted.
        """
        room = task.allowance(self.max_step_tokens - task.step_tokens)
        pace, began, before = self._pace(task, small, large), task.busy, task.kept
        k = self.draft_tokens
        k = pace.length(room - 1, task.beside) if k is None else min(k, room - 1)
        if k > 0:
            drafted, accepted = yield from self._round(task, k, small, large)
            pace.drafted(drafted, accepted, task.kept - before, task.busy - began)
        else:
            yield from task.write(room, large)
            pace.wrote(task.kept - before, task.busy - began)
        return k > 0

    def _is_over(self, task: Task) -> bool:
        """Whether the open step can have no more tokens."""
        full = task.step_tokens >= self.max_step_tokens
        return full or task.finished or task.at_step_end or task.thinking_is_over_budget

    def _round(
        self, task: Task, k: int, small: str, large: str
    ) -> Generator[Verb, Any, tuple[int, int]]:
        """Draft, verify, commit; how many ids were drafted, and how many of them accepted."""
        ids = yield from task.draft(k, small)
        accepted, following = self.accept(task, (yield Verify(large)))
        task.retract(ids[accepted:], small)
        kept, before = task.kept, task.account.accepted
        if task.ends_step(ids[:accepted]):
            yield from task.commit(accepted, small, drafted=True)
            if not task.finished:  # what follows begins the next step
                task.close_step("verified", small)
                task.open_step()
                yield Propose([following])
                yield from task.commit(1, large)
        else:
            yield from task.commit(accepted, small, drafted=True, bonus=(following, large))
        stood = task.account.accepted - before
        if accepted < len(ids):
            task.account.rewritten += task.kept - kept - stood
        return len(ids), stood

    def accept(self, task: Task, table: Tensor) -> tuple[int, int]:
        """How many drafted ids stand under the verifier's logits [k + 1, V], and the id after."""
        sequence, sampler = task.sequence, task.sampler
        ids, kernels = sequence.drafted, sequence.model.kernels
        p = sampler.distributions(table, sequence.tokens, ids)
        if self.coupling == "common":
            drawn = sampler.draw(p, sequence.length, kernels)
            differs = (i for i, (own, id) in enumerate(zip(drawn, ids, strict=False)) if own != id)
            accepted = next(differs, len(ids))
            return accepted, drawn[accepted]
        q = torch.stack(sequence.proposals)
        numbers = torch.tensor([len(ids), sampler.seed, sequence.length], device=p.device)
        kept, following = kernels.accept_resample(
            p[None], q[None], torch.tensor([ids], device=p.device), *numbers[:, None].contiguous()
        )
        return int(kept), int(following)

    def _pace(self, task: Task, small: str, large: str) -> Pace:
        """What has been measured with these slices, in batches of about this size."""
        rows = 1 << task.beside.bit_length() >> 1
        key = ("pace", small, large, rows, self.most, task.sampler.params.greedy)
        pace: Pace = task.memory.setdefault(key, Pace(self.most, rows))
        return pace
