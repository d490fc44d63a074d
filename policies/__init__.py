"""Escalation policies: plain numbers in, a decision out.

A policy is a frozen pydantic model with one method, `decide(scores)`. It sees no tensor and no
model, so it can be written, tested, stored as JSON and shared on its own.

>>> from cascade.policies import StepScores, Threshold
>>> scores = StepScores(step=0, phase="thinking", drafter="small", verifier="large",
...                     logprobs=(-0.1, -2.3, -0.2))
>>> Threshold().decide(scores)
Rewrite(kind='rewrite', start=1)
"""

from .base import Accept, Decision, Phase, Policy, Rewrite, StepScores
from .threshold import Threshold

__all__ = ["Accept", "Decision", "Phase", "Policy", "Rewrite", "StepScores", "Threshold"]
