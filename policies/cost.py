"""Weigh the expected gain of a rewrite against its measured cost."""

from __future__ import annotations

import math
from typing import Annotated, Literal

from pydantic import Field

from .base import Policy
from .decisions import Accept, AnyDecision, Rewrite
from .scores import (
    DraftScores,
    Need,
    ScoreName,
    StepScores,
    log_value,
    needs_of,
    token_logs,
)


class CostAware(Policy):
    """Rewrite from the first token whose risk costs more than writing the rest of the step.

    price: what a wrong token costs, in seconds. A token of score p is taken to be wrong with
           probability 1 - p; a rewrite from token i costs the tokens from there on times the
           measured wall time of a token that the verifier writes (of one verifying pass, until it
           has written any). Nothing is rewritten before a time has been measured.
    gate:  keep a step unverified where the drafter's own least likely token risks less than a
           verifying pass costs
    The decisions depend on measured times, and so differ from run to run.
    """

    kind: Literal["cost_aware"] = "cost_aware"
    price: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 1.0
    score: ScoreName = "min"
    gate: bool = False

    @property
    def needs(self) -> frozenset[Need]:
        return needs_of(self.score, *(("draft_min",) if self.gate else ()))

    def skips(self, draft: DraftScores) -> bool:
        cost = draft.progress.pass_seconds.get(draft.verifier)
        if not self.gate or cost is None:
            return False
        return self._risk(log_value("draft_min", draft)) < cost

    def decide(self, scores: StepScores) -> AnyDecision:
        times, verifier = scores.progress, scores.verifier
        seconds = times.token_seconds.get(verifier, times.pass_seconds.get(verifier))
        if seconds is None:
            return Accept()
        length, logs = len(scores.logprobs), token_logs(self.score, scores)
        if logs is None:  # about the step as a whole
            logs = (log_value(self.score, scores),)
        for start, log in enumerate(logs):
            if self._risk(log) > (length - start) * seconds:
                return Rewrite(start=start)
        return Accept()

    def _risk(self, log: float) -> float:
        """Expected seconds lost by keeping a token of this score."""
        return self.price * (1 - math.exp(min(log, 0.0)))
