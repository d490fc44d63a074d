"""A small logistic model of whether a step is good, fitted from labelled runs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Annotated, Literal

from pydantic import Field, model_validator

from .base import Policy, rejection
from .decisions import Accept, AnyDecision, Decision
from .runs import LabelledRun, TooFewRuns
from .scores import Need, ScoreName, StepScores, first_below, log_value, needs_of, token_logs

FLOOR = -20.0  # nats; logarithms of scores below count as this


class Logistic(Policy):
    """Keep a step that is good with probability at least `probability`, by a logistic model.

    scores:  what the model sees: the natural logarithms of these scores, floored at -20
    weights: one a score, and `bias`; empty until `fitted`. Good means that the verifier would have
             written the same tokens itself.
    ridge:   penalty on the weights of the standardised scores; keeps separable data finite
    cut:     a step that is not kept is rewritten from its first token that the verifier finds less
             likely than this
    reject:  what becomes of a step that is not kept, instead of that rewrite
    """

    kind: Literal["logistic"] = "logistic"
    scores: Annotated[tuple[ScoreName, ...], Field(min_length=1)] = ("min", "mean", "divergence")
    weights: tuple[float, ...] = ()
    bias: float = 0.0
    probability: Annotated[float, Field(gt=0, lt=1)] = 0.5
    ridge: Annotated[float, Field(gt=0)] = 1.0
    cut: Annotated[float, Field(gt=0, lt=1)] = 0.5
    reject: Decision | None = None

    @model_validator(mode="after")
    def _one_weight_a_score(self) -> Logistic:
        if self.weights and len(self.weights) != len(self.scores):
            raise ValueError(f"{len(self.weights)} weights for {len(self.scores)} scores")
        return self

    @property
    def needs(self) -> frozenset[Need]:
        return needs_of(*self.scores)

    @property
    def learns(self) -> bool:
        return not self.weights

    def decide(self, scores: StepScores) -> AnyDecision:
        if self.good(scores) >= self.probability:
            return Accept()
        start = first_below(token_logs("min", scores), math.log(self.cut))
        return rejection(self.reject, scores, start)

    def good(self, scores: StepScores) -> float:
        """The model's probability that a step is good. Raises ValueError before it is fitted."""
        if not self.weights:
            raise ValueError(
                "a Logistic policy has to be fitted first: Reasoner.calibrate, or "
                "policy.fitted(labelled_runs)"
            )
        features = self.features(scores)
        return sigmoid(self.bias + _dot(self.weights, features))

    def features(self, scores: StepScores) -> tuple[float, ...]:
        return tuple(max(log_value(name, scores), FLOOR) for name in self.scores)

    def fitted(self, runs: Sequence[LabelledRun]) -> Logistic:
        """The same with weights by Newton's method (iteratively reweighted least squares).

        A policy that has weights already is returned as it is. Raises TooFewRuns where the
        labelled steps are all good or all bad, or fewer than ten a weight.
        """
        if self.weights:
            return self
        steps = [step for run in runs for step in run.steps]
        good = sum(step.good for step in steps)
        if len(steps) < 10 * (len(self.scores) + 1) or good in (0, len(steps)):
            raise TooFewRuns(
                f"{len(steps)} labelled steps, {good} of them good, do not fit "
                f"{len(self.scores) + 1} weights: at least {10 * (len(self.scores) + 1)} steps, "
                "some good and some not, are needed; gather more runs"
            )
        rows = [self.features(step.scores) for step in steps]
        weights, bias = fit_logistic(rows, [step.good for step in steps], self.ridge)
        return self.model_copy(update={"weights": tuple(weights), "bias": bias})


def fit_logistic(
    rows: Sequence[Sequence[float]], good: Sequence[bool], ridge: float
) -> tuple[list[float], float]:
    """Weights and bias that maximise the log-likelihood less ridge / 2 times their squared norm.

    rows: features, one row an example. The penalty is on the weights of the standardised features
    and not on the bias; the weights returned are those of the features as they are.
    """
    n, k = len(rows), len(rows[0])
    means = [math.fsum(row[j] for row in rows) / n for j in range(k)]
    spread = [
        math.sqrt(math.fsum((row[j] - means[j]) ** 2 for row in rows) / n) or 1.0 for j in range(k)
    ]
    table = [[(row[j] - means[j]) / spread[j] for j in range(k)] + [1.0] for row in rows]
    beta, penalties = [0.0] * (k + 1), [ridge] * k + [0.0]
    loss = _loss(table, good, beta, penalties)
    for _ in range(100):
        step = _newton_step(table, good, beta, penalties)
        scale = 1.0
        while True:  # halve until it improves; far from the optimum a full step may not
            trial = [b + scale * s for b, s in zip(beta, step, strict=True)]
            tried = _loss(table, good, trial, penalties)
            if tried <= loss or scale < 1e-6:
                break
            scale /= 2
        done = loss - tried <= 1e-12 * (1 + abs(loss))
        if tried <= loss:
            beta, loss = trial, tried
        if done:
            break
    weights = [b / s for b, s in zip(beta[:k], spread, strict=True)]
    return weights, beta[k] - _dot(weights, means)


def sigmoid(x: float) -> float:
    if x >= 0:
        return 1 / (1 + math.exp(-x))
    small = math.exp(x)
    return small / (1 + small)


def _loss(
    table: list[list[float]], good: Sequence[bool], beta: list[float], penalties: list[float]
) -> float:
    def surprise(z: float) -> float:  # -log sigmoid(z), without overflow
        return math.log1p(math.exp(-abs(z))) + max(-z, 0.0)

    margins = (_dot(beta, row) * (1 if y else -1) for row, y in zip(table, good, strict=True))
    penalty = sum(p * b * b for p, b in zip(penalties, beta, strict=True)) / 2
    return math.fsum(map(surprise, margins)) + penalty


def _newton_step(
    table: list[list[float]], good: Sequence[bool], beta: list[float], penalties: list[float]
) -> list[float]:
    k = len(beta)
    gradient = [-p * b for p, b in zip(penalties, beta, strict=True)]
    hessian = [[penalties[i] if i == j else 0.0 for j in range(k)] for i in range(k)]
    for row, y in zip(table, good, strict=True):
        p = sigmoid(_dot(beta, row))
        curvature = max(p * (1 - p), 1e-12)
        for i in range(k):
            gradient[i] += (y - p) * row[i]
            for j in range(i + 1):
                hessian[i][j] += curvature * row[i] * row[j]
    return _solve_cholesky(hessian, gradient)


def _solve_cholesky(lower: list[list[float]], right: list[float]) -> list[float]:
    """x of A x = right, of a positive definite A by its lower triangle, which is overwritten."""
    k = len(right)
    for i in range(k):
        for j in range(i + 1):
            rest = lower[i][j] - sum(lower[i][m] * lower[j][m] for m in range(j))
            lower[i][j] = math.sqrt(max(rest, 1e-12)) if i == j else rest / lower[j][j]
    forward: list[float] = []
    for i in range(k):
        done = sum(lower[i][m] * forward[m] for m in range(i))
        forward.append((right[i] - done) / lower[i][i])
    x = [0.0] * k
    for i in reversed(range(k)):
        done = sum(lower[m][i] * x[m] for m in range(i + 1, k))
        x[i] = (forward[i] - done) / lower[i][i]
    return x


def _dot(a: Sequence[float], b: Sequence[float]) -> float:
    return sum(x * y for x, y in zip(a, b, strict=True))
