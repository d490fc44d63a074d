"""Asking a policy. Whatever it does wrong becomes a PolicyError of the request that asked."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from cascade.errors import PolicyError
from cascade.judge import Judge, Question
from cascade.policies import (
    DECISIONS,
    AnyDecision,
    DraftScores,
    EndThinking,
    Need,
    Policy,
    Rewrite,
    StepScores,
)
from cascade.policies.scores import NEEDS
from cascade.text import Codec


@dataclass(frozen=True)
class Counsel:
    """A policy, and what has to be gathered for it."""

    policy: Policy
    needs: frozenset[Need]
    question: Question | None

    @classmethod
    def of(cls, policy: Policy, judge: Judge, codec: Codec) -> Counsel:
        """Raises RequestError for a question that cannot be put, PolicyError for unknown needs."""
        needs: frozenset[Need] = _ask(policy, lambda: frozenset(policy.needs))
        if not needs <= NEEDS:
            raise PolicyError(
                f"policy {policy!r} needs {sorted(map(str, needs - NEEDS))}; "
                f"what can be gathered is {sorted(NEEDS)}"
            )
        return cls(policy, needs, judge.ask(codec) if "judge" in needs else None)

    def skips(self, draft: DraftScores) -> bool:
        """Whether a drafted step is kept without verification."""
        answer = _ask(self.policy, lambda: self.policy.skips(draft))
        if not isinstance(answer, bool):
            raise PolicyError(
                f"policy {self.policy!r} answered skips() with {answer!r}, neither True nor False"
            )
        return answer

    def decide(self, scores: StepScores) -> AnyDecision:
        """What becomes of a scored step."""
        policy, length = self.policy, len(scores.logprobs)
        decision = _ask(policy, lambda: policy.decide(scores))
        if not isinstance(decision, DECISIONS):
            known = ", ".join(f"{kind.__name__}()" for kind in DECISIONS)
            raise PolicyError(f"policy {policy!r} returned {decision!r}; decisions are {known}")
        if isinstance(decision, Rewrite) and decision.start >= length:
            raise PolicyError(
                f"policy {policy!r} wants to keep {decision.start} tokens and rewrite the rest of "
                f"a step of {length}"
            )
        if isinstance(decision, EndThinking) and scores.phase != "thinking":
            raise PolicyError(f"policy {policy!r} wants to end the thought in a step of the answer")
        return decision


def _ask(policy: Policy, question: Callable[[], Any]) -> Any:
    try:
        return question()
    except Exception as error:
        raise PolicyError(f"policy {policy!r} raised {type(error).__name__}: {error}") from error
