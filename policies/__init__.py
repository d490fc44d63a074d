"""Escalation policies: plain numbers in, a decision out.

A policy is a frozen pydantic model with one method, `decide(scores)`. It sees no tensor and no
model, so it can be written, tested, stored as JSON or YAML and shared on its own.

>>> from cascade.policies import StepScores, Threshold
>>> scores = StepScores(step=0, phase="thinking", drafter="small", verifier="large",
...                     logprobs=(-0.1, -2.3, -0.2))
>>> Threshold().decide(scores)
Rewrite(kind='rewrite', start=1)
"""

from .always import Always
from .base import Policy
from .budget import AtMost, WithinBudget, at_most, within_budget
from .calibrated import Calibrated, Target, TargetNotMet, Trial, calibrate, replay
from .combinators import AllOf, AnyOf, FirstSteps, all_of, any_of, first_n_steps
from .cost import CostAware
from .cues import Cues
from .decisions import (
    DECISIONS,
    Accept,
    AnyDecision,
    Decision,
    EndThinking,
    Escalate,
    Lead,
    Refresh,
    Rewrite,
)
from .gate import Gate
from .logistic import Logistic
from .registry import GROUP, AnyPolicy, UnknownPolicy, build, find, known
from .runs import LabelledRun, LabelledStep, TooFewRuns
from .scores import DraftScores, Need, Phase, Progress, ScoreName, StepScores, value_of
from .storage import dumps, load, loads, save
from .threshold import Threshold

__all__ = [
    "DECISIONS",
    "GROUP",
    "Accept",
    "AllOf",
    "Always",
    "AnyDecision",
    "AnyOf",
    "AnyPolicy",
    "AtMost",
    "Calibrated",
    "CostAware",
    "Cues",
    "Decision",
    "DraftScores",
    "EndThinking",
    "Escalate",
    "FirstSteps",
    "Gate",
    "LabelledRun",
    "LabelledStep",
    "Lead",
    "Logistic",
    "Need",
    "Phase",
    "Policy",
    "Progress",
    "Refresh",
    "Rewrite",
    "ScoreName",
    "StepScores",
    "Target",
    "TargetNotMet",
    "Threshold",
    "TooFewRuns",
    "Trial",
    "UnknownPolicy",
    "WithinBudget",
    "all_of",
    "any_of",
    "at_most",
    "build",
    "calibrate",
    "dumps",
    "find",
    "first_n_steps",
    "known",
    "load",
    "loads",
    "replay",
    "save",
    "value_of",
    "within_budget",
]
