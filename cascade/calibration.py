"""Labels from both slices at the same states, and policies whose settings hold a target."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator
from collections.abc import Sequence as Seq
from typing import TYPE_CHECKING, Any, Literal, Protocol

from pydantic import ValidationError

from cascade.errors import CalibrationError, CascadeError, RequestError
from cascade.events import Done
from cascade.policies import (
    AtMost,
    Calibrated,
    CostAware,
    LabelledRun,
    LabelledStep,
    Need,
    Policy,
    Target,
    TargetNotMet,
    TooFewRuns,
    Trial,
    WithinBudget,
    replay,
)
from cascade.policies import calibrate as choose
from cascade.policies.calibrated import VALUES
from cascade.policies.combinators import Wrapping
from cascade.policies.scores import NEEDS
from cascade.strategies import Single, Stepwise
from cascade.strategies.base import Roles
from cascade.task import Task
from cascade.verbs import Run

if TYPE_CHECKING:
    from cascade.reasoner import Reasoner

logger = logging.getLogger("cascade")

VERIFIED_ONLY: frozenset[Need] = NEEDS - {"judge"}
# They look at what the request has cost so far, which differs where the verifier writes it all.
BY_PROGRESS = (AtMost, WithinBudget, CostAware)


class Scored(Protocol):
    """A problem: `cascade.problems.Problem`, or anything else with these two."""

    @property
    def question(self) -> Any:
        """A prompt, as `Reasoner.generate` takes it."""

    def score(self, answer: str | None) -> float:
        """How good an answer is, 0 to 1."""


class Labelling(Stepwise):
    """The verifier writes everything; from each state on the way the drafter's step is scored too.

    What the drafts came to is left in `Task.labels`.
    """

    needs: frozenset[Need] = VERIFIED_ONLY

    def run(self, task: Task, roles: Roles) -> Run:
        small, large = self.pair(roles)
        question = self.judge.ask(task.codec) if "judge" in self.needs else None
        yield from task.prefill(large)
        while not task.finished:
            task.open_step()
            if task.thinking_is_over_budget:
                yield from task.end_thinking(large)
                continue
            draft = yield from task.propose(
                self.max_step_tokens, small, large, self.needs, question
            )
            scores = yield from task.rate(draft, large, self.needs, question)
            yield from task.drop(draft)
            before = task.kept
            yield from task.write(self.max_step_tokens, large)
            agreed = _common(draft.ids, task.transcript.ids[before:])
            task.labels.append(LabelledStep(scores=scores, agreed=agreed))
            task.close_step("written")


def labelled_runs(
    reasoner: Reasoner,
    problems: Iterable[Scored],
    *,
    needs: frozenset[Need] = VERIFIED_ONLY,
    strategy: Stepwise | None = None,
    params: Any = None,
    **overrides: Any,
) -> Iterator[tuple[Scored, LabelledRun]]:
    """Run the verifier alone and label the drafter's step at each of its states.

    needs:    figures to gather; `judge` makes every pass longer
    strategy: slices, delimiter, cap and question are its; the Reasoner's, if it is a `Stepwise`
    params, overrides: as for `Reasoner.generate`
    Yields each problem with its run as runs end, so that they can be kept one by one.
    """
    problems, strategy = list(problems), _stepwise(reasoner, strategy)
    labelling = Labelling(**dict(strategy) | {"policy": None, "needs": needs})
    prompts = [problem.question for problem in problems]
    outcomes = reasoner.outcomes(prompts, params, strategy=labelling, **overrides)
    for outcome in outcomes:
        if isinstance(outcome.event, Done):
            if outcome.error is not None:
                raise outcome.error
            problem, steps = problems[outcome.number], tuple(outcome.task.labels)
            reference = _score(problem, outcome.event.result.answer)
            yield problem, LabelledRun(steps=steps, reference=reference)


def calibrate(
    reasoner: Reasoner,
    problems: Iterable[Scored],
    policy: Policy,
    *,
    target: Target,
    dial: str = "probability",
    values: Seq[float] = VALUES,
    source: Literal["labels", "runs"] = "labels",
    runs: Seq[LabelledRun] | None = None,
    strategy: Stepwise | None = None,
    params: Any = None,
    **overrides: Any,
) -> Calibrated:
    """The setting of a policy that holds `target` on problems like these; see `Calibrated`.

    problems: independent of each other, and drawn as those the policy will meet
    dial:     the field that is set; values: its candidates from strict to lenient
    source:   `labels` gathers labelled runs once and replays every setting on them; for policies
              that keep, cut or lead by what they see of the step, in exact mode. `runs` runs every
              setting on all problems, for any policy.
    runs:     labelled runs from before, for `labels`, in place of gathering them from `problems`
    strategy, params, overrides: as for `labelled_runs`
    A policy that learns is fitted on every other problem first and tested on the rest.

    Raises CalibrationError where the problems are too few or no setting passes, RequestError for
    a policy that `labels` cannot show.
    """
    problems, strategy = list(problems), _stepwise(reasoner, strategy)
    if source == "labels":
        _check_labels(reasoner, policy)
    total = len(problems if runs is None or source == "runs" else runs)
    held = total // 2 if policy.learns else 0
    if total - held < target.fewest_runs:
        raise CalibrationError(
            f"{total - held} problems to test on are too few for {target!r}: at least "
            f"{target.fewest_runs} are needed, and more where any of them is lost"
        )
    settings = {"strategy": strategy, "params": params, **overrides}
    gather = source == "labels" or policy.learns
    if gather and runs is None:
        runs = []
        for _, run in labelled_runs(
            reasoner, problems, needs=VERIFIED_ONLY | policy.needs, **settings
        ):
            runs.append(run)
            logger.info("labelled run %d of %d", len(runs), total)
    try:
        if policy.learns:
            policy = policy.fitted((runs or [])[:held])
        if source == "runs":
            return choose(
                policy,
                target,
                _Measure(reasoner, problems[held:], settings),
                dial=dial,
                values=values,
                source="runs",
            )
        tested = (runs or [])[held:]
        return choose(
            policy, target, lambda p: [replay(p, run) for run in tested], dial=dial, values=values
        )
    except (TooFewRuns, TargetNotMet) as error:
        raise CalibrationError(str(error)) from error
    except ValidationError as error:
        raise RequestError(f"{dial}={values} does not fit {policy!r}: {error}") from error
    except ValueError as error:
        advice = "" if source == "runs" else "; calibrate(..., source='runs') can"
        raise RequestError(f"{error}{advice}") from error


class _Measure:
    """Trials of a policy by running it; the verifier alone is run once."""

    def __init__(self, reasoner: Reasoner, problems: list[Scored], settings: dict[str, Any]):
        self.reasoner, self.problems = reasoner, problems
        self.strategy: Stepwise = settings.pop("strategy")
        self.settings = settings
        self.small, large = self.strategy.pair(reasoner.roles)
        self.references = [
            _score(problem, result.answer) for problem, result in self._results(Single(slice=large))
        ]

    def __call__(self, policy: Policy) -> list[Trial]:
        strategy = self.strategy.model_copy(update={"policy": policy})
        trials = []
        for (problem, result), reference in zip(
            self._results(strategy), self.references, strict=True
        ):
            steps = [step for step in result.steps if step.decision != "forced"]
            alone = sum(
                step.drafter == self.small and step.drafted_tokens == step.tokens for step in steps
            )
            loss = max(reference - _score(problem, result.answer), 0.0)
            trials.append(Trial(loss=loss, escalated=1 - alone / max(len(steps), 1)))
        return trials

    def _results(self, strategy: Any) -> Iterator[tuple[Scored, Any]]:
        prompts = [problem.question for problem in self.problems]
        results = self.reasoner.generate(prompts, strategy=strategy, **self.settings)
        for problem, result in zip(self.problems, results, strict=True):
            if result.error is not None:
                raise CascadeError(f"a run of {strategy!r} failed: {result.error}")
            yield problem, result


def _check_labels(reasoner: Reasoner, policy: Policy) -> None:
    if reasoner.consistency != "exact":
        raise RequestError(
            f"labels show what a policy does in exact mode, not in {reasoner.consistency!r}: "
            "calibrate(..., source='runs')"
        )
    for part in _parts(policy):
        if isinstance(part, BY_PROGRESS):
            raise RequestError(
                f"{type(part).__name__} decides by what the request has cost so far, which labels "
                "cannot show: calibrate(..., source='runs')"
            )


def _parts(policy: Policy) -> Iterator[Policy]:
    yield policy
    if isinstance(policy, Wrapping):
        for part in policy.parts:
            yield from _parts(part)


def _stepwise(reasoner: Reasoner, strategy: Stepwise | None) -> Stepwise:
    if strategy is not None:
        return strategy
    return reasoner.strategy if isinstance(reasoner.strategy, Stepwise) else Stepwise()


def _score(problem: Scored, answer: str | None) -> float:
    value = float(problem.score(answer))
    if not 0 <= value <= 1:
        raise RequestError(f"{problem!r} scored {answer!r} with {value}; a score is 0 to 1")
    return value


def _common(first: Seq[int], second: Seq[int]) -> int:
    """Length of the common beginning."""
    pairs = enumerate(zip(first, second, strict=False))
    shorter = min(len(first), len(second))
    return next((i for i, (a, b) in pairs if a != b), shorter)
