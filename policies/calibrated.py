"""A policy whose setting was chosen with a distribution-free guarantee: learn then test.

Angelopoulos et al., Learn then Test: Calibrating Predictive Algorithms to Achieve Risk Control,
2021: test settings in an order fixed beforehand, from the safest on, each at level delta, and stop
at the first that fails. Whatever the distribution of the problems, and whatever the settings do,
the chance that any setting which passed has a mean loss above the target is at most delta.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from .base import Policy
from .binomial import p_value, runs_needed
from .combinators import Wrapping, keeps, replaced
from .decisions import AnyDecision, Lead, Rewrite
from .registry import AnyPolicy
from .runs import LabelledRun, TooFewRuns
from .scores import DraftScores, StepScores

# From strict to lenient, for a setting on the scale of a probability.
VALUES = (0.99, 0.97, 0.95, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1, 0.05, 0.02, 0.01, 0.001)


class Target(BaseModel):
    """What a calibrated policy is to hold with probability 1 - delta. One of:

    lose:     at most so much of the large slice's accuracy
    escalate: at most so large a share of steps that the draft slice does not write alone
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    lose: Annotated[float, Field(gt=0, lt=1)] | None = None
    escalate: Annotated[float, Field(gt=0, lt=1)] | None = None
    delta: Annotated[float, Field(gt=0, lt=1)] = 0.1

    @model_validator(mode="after")
    def _one_of_them(self) -> Target:
        if (self.lose is None) == (self.escalate is None):
            raise ValueError("give one of lose and escalate")
        return self

    @property
    def level(self) -> float:
        return self.lose if self.lose is not None else self.escalate or 0.0

    @property
    def fewest_runs(self) -> int:
        """Runs below which not even a loss of zero in all of them would do."""
        return math.ceil(math.log(self.delta) / math.log1p(-self.level) - 1e-9)


class Trial(BaseModel):
    """One problem under one setting, each number 0 to 1.

    loss:      what the policy's answer scored less than the large slice's, 0 where it was no worse
    escalated: share of its steps that the draft slice did not write alone
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    loss: Annotated[float, Field(ge=0, le=1)]
    escalated: Annotated[float, Field(ge=0, le=1)]


class Test(BaseModel):
    """One setting that was tested: its mean loss over the runs, and the p-value."""

    __test__ = False  # no test of pytest's
    model_config = ConfigDict(frozen=True, extra="forbid")

    value: float
    mean: float
    p_value: float


class TargetNotMet(ValueError):
    """Not even the safest setting passes its test."""


class Calibrated(Wrapping):
    """A policy with the setting that passed, and the tests that show it.

    policy: decides
    dial:   the field of it that was set; target: what holds; runs: independent problems
    source: `labels`, where losses were replayed on labelled runs: they bound the true ones for a
            policy that only keeps, cuts or leads, in exact mode, with the slices, the seed rule
            and the sampling setting of those runs, where steps end at their delimiter.
            `runs`, where every setting was run: they are the true ones.
    tests:  in their order
    The guarantee is for problems drawn as those runs were, and for no others.
    """

    kind: Literal["calibrated"] = "calibrated"
    policy: AnyPolicy
    dial: str
    target: Target
    runs: Annotated[int, Field(ge=1)]
    source: Literal["labels", "runs"]
    tests: Annotated[tuple[Test, ...], Field(min_length=1)]

    @property
    def parts(self) -> tuple[Policy, ...]:
        return (self.policy,)

    def skips(self, draft: DraftScores) -> bool:
        return self.policy.skips(draft)

    def decide(self, scores: StepScores) -> AnyDecision:
        return self.policy.decide(scores)


def calibrate(
    policy: Policy,
    target: Target,
    measure: Callable[[Policy], Sequence[Trial]],
    *,
    dial: str = "probability",
    values: Sequence[float] = VALUES,
    source: Literal["labels", "runs"] = "labels",
) -> Calibrated:
    """Choose a policy's setting by fixed-sequence testing.

    measure: the trials of a policy on the same independent problems every time; called for one
             setting after the other until one fails
    dial:    the field that is set; values: its candidates from strict to lenient, chosen without
             a look at the problems. A `lose` target takes the most lenient that passes, coming
             from the strict end; an `escalate` target the strictest, coming from the other.

    Raises TooFewRuns where no outcome could have passed, TargetNotMet where the safest fails, and
    ValueError for a dial that the policy does not have.
    """
    if dial not in type(policy).model_fields:
        known = ", ".join(type(policy).model_fields)
        raise ValueError(f"{type(policy).__name__} has no field {dial!r} to set. It has: {known}")
    if not values:
        raise ValueError("no values to choose from")
    chosen: Policy | None = None
    tests: list[Test] = []
    count = 0
    for value in values if target.lose is not None else reversed(values):
        candidate = replaced(policy, **{dial: value})
        trials = measure(candidate)
        count = len(trials)
        if count < target.fewest_runs:
            raise TooFewRuns(
                f"{count} runs are too few for a level of {target.level:g} with probability "
                f"{1 - target.delta:g}: at least {target.fewest_runs} are needed, more where any "
                "of them has a loss"
            )
        losses = [t.loss if target.lose is not None else t.escalated for t in trials]
        tests.append(
            Test(
                value=value,
                mean=math.fsum(losses) / count,
                p_value=p_value(losses, target.level),
            )
        )
        if tests[-1].p_value > target.delta:
            break
        chosen = candidate
    if chosen is None:
        raise TargetNotMet(_why_not(target, tests[0], count, dial))
    return Calibrated(
        policy=chosen, dial=dial, target=target, runs=count, source=source, tests=tuple(tests)
    )


def replay(policy: Policy, run: LabelledRun) -> Trial:
    """What a policy would have done with the drafts of a labelled run.

    The loss is the reference score as soon as a token is kept that the verifier would not have
    written; until then the run is the verifier's own. Raises ValueError for a policy that leaves
    that path in another way: that skips verification, escalates to a middle slice or ends thinking.
    """
    leading = escalated = 0
    strayed = False
    for step in run.steps:
        if leading:
            leading, escalated = leading - 1, escalated + 1
            continue
        kept = len(step.scores.logprobs)
        if policy.skips(step.scores):
            raise ValueError(f"{policy!r} skips verification, {_NOT_REPLAYED}")
        decision = policy.decide(step.scores)
        if isinstance(decision, Lead):
            kept, leading = 0, decision.steps - 1
        elif isinstance(decision, Rewrite):
            kept = decision.start
        elif not keeps(decision):
            raise ValueError(f"{policy!r} decides {decision!r}, {_NOT_REPLAYED}")
        escalated += not keeps(decision)
        strayed = strayed or kept > step.agreed
    return Trial(
        loss=run.reference if strayed else 0.0, escalated=escalated / max(len(run.steps), 1)
    )


_NOT_REPLAYED = "which labelled runs cannot show; measure it in runs of its own"


def _why_not(target: Target, test: Test, count: int, dial: str) -> str:
    what = "loses" if target.lose is not None else "escalates"
    needed = runs_needed(test.mean, target.level, target.delta)
    advice = f"about {needed} runs at this rate would show it" if needed else "loosen the target"
    return (
        f"at {dial}={test.value:g}, the safest setting, the policy {what} {test.mean:.2%} over "
        f"{count} runs, p={test.p_value:.3g} against a target of {target.level:.2%} with "
        f"probability {1 - target.delta:g}: {advice}"
    )
