"""The small slice drafts a step, the large slice scores it in one pass, a policy decides."""

from __future__ import annotations

from collections.abc import Generator
from typing import Any

from cascade.errors import RequestError
from cascade.judge import Judge
from cascade.model import ElasticModel
from cascade.policies import (
    Accept,
    AnyDecision,
    AnyPolicy,
    EndThinking,
    Escalate,
    Lead,
    Refresh,
    Rewrite,
)
from cascade.results import StepDecision
from cascade.strategies.base import Roles, Setting, Strategy
from cascade.strategies.consult import Counsel
from cascade.task import Proposal, Task
from cascade.verbs import Run, Verb


class Stepwise(Strategy):
    """Draft, score, and do what the policy decides, one step at a time.

    The verifying pass writes the verifier's own keys, values and states over the draft's, so in
    exact mode the cache is the verifier's after every verified step, at no extra cost. Steps that
    the policy keeps unverified are run again before the next one that is verified.

    policy:        in place of the request's
    middle_scores: the trained slices in between score a draft first, smallest first, over the cache
                   as it is; where the policy escalates by score the next larger one does
    judge:         the question that is put where the policy needs the judgement of a slice
    """

    draft: str | None = None
    verify: str | None = None
    policy: AnyPolicy | None = None
    middle_scores: bool = False
    judge: Judge = Judge()

    def run(self, task: Task, roles: Roles) -> Run:
        counsel = Counsel.of(self.policy or roles.policy, self.judge, task.codec)
        tiers = self.tiers(task.sequence.model, roles)
        verifier, lead = tiers[-1], 0
        yield from task.prefill(verifier)
        while not task.finished:
            task.open_step()
            if task.thinking_is_over_budget:
                yield from task.end_thinking(verifier)
            elif lead:
                yield from self._write(task, "lead", verifier)
                lead -= 1
            else:
                lead = yield from self._step(task, counsel, tiers)

    def _step(
        self, task: Task, counsel: Counsel, tiers: tuple[str, ...]
    ) -> Generator[Verb, Any, int]:
        """One step, drafted by the first of the tiers; how many the last is to write after it."""
        drafter, verifier = tiers[0], tiers[-1]
        draft = yield from task.propose(
            self.max_step_tokens, drafter, verifier, counsel.needs, counsel.question
        )
        if counsel.skips(draft.scores):
            yield from self._keep(task, "unverified", draft)
            return 0
        decision = yield from self._decide(task, counsel, draft, tiers)
        match decision:
            case Accept():
                yield from self._keep(task, "accept", draft)
            case Refresh():
                yield from self._keep(task, "refresh", draft)
                yield from task.refresh(verifier)
            case EndThinking(keep=keep):
                yield from self._keep(task, "accept", draft) if keep else task.drop(draft)
                yield from task.end_thinking(verifier)
            case Rewrite(start=start):
                task.retract(draft.ids[start:], drafter)
                yield from task.commit(start, drafter, drafted=True)
                yield from self._write(task, "rewrite", verifier, drafter)
            case Escalate(by="draft") if len(tiers) > 2:
                yield from task.drop(draft)
                return (yield from self._step(task, counsel, tiers[1:]))
            case Escalate() | Lead():
                yield from task.drop(draft)
                yield from self._write(task, decision.kind, verifier, drafter)
        return decision.steps - 1 if isinstance(decision, Lead) else 0

    def _decide(
        self, task: Task, counsel: Counsel, draft: Proposal, tiers: tuple[str, ...]
    ) -> Generator[Verb, Any, AnyDecision]:
        """Have a draft scored, by one slice or by larger and larger ones, and ask the policy."""
        for scorer in tiers[1:] if self.middle_scores else tiers[-1:]:
            scores = yield from task.rate(
                draft, scorer, counsel.needs, counsel.question, repair=scorer == tiers[-1]
            )
            decision = counsel.decide(scores)
            if not (isinstance(decision, Escalate) and decision.by == "score"):
                break
        return decision

    def _keep(self, task: Task, decision: StepDecision, draft: Proposal) -> Run:
        yield from task.commit(len(draft.ids), draft.slice, drafted=True)
        task.close_step(decision, draft.slice)

    def _write(
        self, task: Task, decision: StepDecision, slice: str, drafter: str | None = None
    ) -> Run:
        """Let a slice write what is left of the open step."""
        if not task.finished:
            yield from task.write(max(self.max_step_tokens - task.step_tokens, 1), slice)
        task.close_step(decision, drafter)

    def tiers(self, model: ElasticModel, roles: Roles) -> tuple[str, ...]:
        """The drafting slice, the trained ones between the two, smallest first, the verifying one.

        Middle slices draft where a policy escalates.
        """
        draft, verify = self.pair(roles)
        low, high = (model.slice_spec(name).parameters for name in (draft, verify))
        between = [s for s in model.slices.values() if s.trained and low < s.parameters < high]
        between.sort(key=lambda spec: spec.parameters)
        return draft, *(spec.name for spec in between), verify

    def check(self, setting: Setting) -> None:
        super().check(setting)
        counsel = Counsel.of(self.policy or setting.roles.policy, self.judge, setting.codec)
        longest = setting.cache.max_draft
        if counsel.question and len(counsel.question.ids) >= longest:
            raise RequestError(
                f"the judge's question has {len(counsel.question.ids)} tokens, which leaves none "
                f"for a step where max_draft={longest}; put a shorter one"
            )
