"""The small slice drafts a step, the large slice scores it in one pass, a policy decides."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, SerializeAsAny

from cascade.policies import Policy, Rewrite
from cascade.strategies.base import Roles, Strategy
from cascade.task import Task, decide
from cascade.verbs import Run, Verify


class Stepwise(Strategy):
    """Draft, score, then accept or rewrite, one line at a time.

    The verifying pass writes the verifier's own keys, values and states over the draft's, so in
    exact mode the cache is the verifier's after every step, at no extra cost.
    """

    draft: str | None = None
    verify: str | None = None
    policy: SerializeAsAny[Policy] | None = None
    max_step_tokens: Annotated[int, Field(ge=1)] = 64

    def run(self, task: Task, roles: Roles) -> Run:
        small, large = self.draft or roles.draft, self.verify or roles.verify
        policy = self.policy or roles.policy
        yield from task.prefill(large)
        while not task.finished:
            if task.thinking_is_over_budget:
                yield from task.end_thinking(large)
                continue
            task.open_step()
            drafted = yield from task.propose(self.max_step_tokens, small)
            table = yield Verify(large)
            decision = decide(policy, task.scores(small, large, table))
            if not isinstance(decision, Rewrite):
                yield from task.commit(len(drafted), small, drafted=True)
                task.close_step("accept", small, small)
                continue
            task.retract(drafted[decision.start :], small)
            yield from task.commit(decision.start, small, drafted=True)
            if not task.finished:
                yield from task.write(self.max_step_tokens, large)
            task.close_step("rewrite", large, small)
