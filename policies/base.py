"""The class that every policy derives from."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

from pydantic import BaseModel, ConfigDict

from .decisions import AnyDecision, EndThinking, Rewrite
from .runs import LabelledRun
from .scores import NEEDS, DraftScores, Need, StepScores


class Policy(BaseModel, ABC):
    """Derive from this and implement `decide`. Fields are the policy's settings.

    A policy that is to be stored has a field `kind`, a literal with the name that it is found by:
    one of this package's, or that of an entry point in the group `cascade.policies`.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    @abstractmethod
    def decide(self, scores: StepScores) -> AnyDecision:
        """What to do with a drafted step. Must not depend on anything but `scores` and fields."""

    def skips(self, draft: DraftScores) -> bool:
        """Whether to keep a drafted step without verification. Asked before `decide`.

        What is kept so stays as the drafter wrote it until the next step that is verified, whose
        pass first repairs it. `draft` has no figures unless `needs` names `draft`.
        """
        return False

    @property
    def needs(self) -> frozenset[Need]:
        """The figures to gather: `draft`, `divergence`, `judge`.

        The first two cost arithmetic on logits that are there; the judge's question makes the
        verifying pass longer. Unless overridden, all but the judge.
        """
        return NEEDS - {"judge"}

    @property
    def learns(self) -> bool:
        """Whether this policy has still to be fitted from labelled runs."""
        return False

    def fitted(self, runs: Sequence[LabelledRun]) -> Policy:
        """This policy with what it learns from labelled runs; itself where it learns nothing.

        Raises TooFewRuns where they do not suffice.
        """
        return self


def rejection(instead: AnyDecision | None, scores: StepScores, start: int) -> AnyDecision:
    """What becomes of a rejected step: `instead`, or a rewrite from `start` on.

    A thought can only be ended while it lasts; the answer's steps are rewritten.
    """
    ended = isinstance(instead, EndThinking) and scores.phase == "answer"
    return Rewrite(start=start) if instead is None or ended else instead
