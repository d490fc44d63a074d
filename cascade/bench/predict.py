"""Which strategy pays on this machine: from measured times and from how much is accepted.

Letters: s and l are the seconds of a token written by the smallest and by the largest slice, v(n)
those of one pass of the largest over n ids that it did not write, a and p the acceptance by token
and by step (`report.Acceptance`). Quality is not part of this: `single` of the small slice and
`budget` write with the small slice what the large one then never sees.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

from cascade.bench.report import Acceptance, Decode, Forecast, Prediction, Scoring

ASSUMED = (0.6, 0.8, 0.95)
DRAFTS = (1, 2, 4, 8)  # draft lengths of token-level speculation
STEP = 32  # tokens of a step of reasoning
BRANCHES = 8  # parallel drafts of `explore`


@dataclass(frozen=True)
class Times:
    """Seconds on this machine. small, large: of one token at batch 1; verify: by number of ids."""

    small: float
    large: float
    verify: Mapping[int, float]
    parallel: Mapping[int, float]  # of one token of the small slice for each of so many rows

    @classmethod
    def of(
        cls, decode: Sequence[Decode], scoring: Sequence[Scoring], draft: str, verify: str
    ) -> Times:
        def step(slice: str) -> dict[int, float]:
            return {d.batch: d.cost.seconds for d in decode if d.slice == slice}

        return cls(
            small=step(draft)[1],
            large=step(verify)[1],
            verify={s.tokens: s.cost.seconds for s in scoring if s.slice == verify},
            parallel=step(draft),
        )

    def scored(self, tokens: int) -> float:
        """v(n), between the measured lengths on a straight line; v(0) is a token written."""
        points = sorted({0: self.large, **self.verify}.items())
        pairs = list(pairwise(points))
        (low, first), (high, second) = next((p for p in pairs if tokens <= p[1][0]), pairs[-1])
        return first + (second - first) * (tokens - low) / (high - low)


def predict(times: Times, acceptance: Acceptance, draft: str, verify: str) -> Prediction:
    """What each strategy gains over the largest slice alone."""

    def speculative(k: int) -> Callable[[float], float]:
        # Expected tokens of a cycle (arXiv 2211.17192): 1 + a + ... + a ** k.
        return lambda a: (
            times.large * sum(a**i for i in range(k + 1)) / (k * times.small + times.scored(k))
        )

    def stepwise(p: float) -> float:
        per_token = times.small + times.scored(STEP) / STEP + (1 - p) * times.large
        return times.large / per_token

    best_k = max(DRAFTS, key=lambda k: speculative(k)(acceptance.token))
    forecasts = [
        Forecast("single", verify, 1.0, None),
        Forecast("single", draft, times.large / times.small, None),
        Forecast(
            "speculative",
            f"{best_k} drafted",
            speculative(best_k)(acceptance.token),
            min(filter(None, (_break_even(speculative(k)) for k in DRAFTS)), default=None),
        ),
        Forecast("stepwise", f"{STEP} tokens", stepwise(acceptance.step), _break_even(stepwise)),
        Forecast("budget", "half by each", 2 * times.large / (times.small + times.large), None),
    ]
    if BRANCHES in times.parallel:
        # One answer is kept; the drafts are written side by side and each is judged in one pass.
        cost = times.parallel[BRANCHES] + BRANCHES * times.scored(2 * STEP) / (2 * STEP)
        forecasts.append(Forecast("explore", f"{BRANCHES} drafts", times.large / cost, None))
    lossless = [f for f in forecasts if f.strategy in ("speculative", "stepwise")]
    best = max(lossless, key=lambda f: f.gain)
    name = best.strategy if best.gain > 1.02 else f"single {verify}"
    return Prediction(draft, verify, acceptance, tuple(forecasts), name)


def assumed() -> list[Acceptance]:
    """Where there is no checkpoint to measure: a rate a token, and the same share of steps."""
    return [Acceptance(rate, rate, "assumed") for rate in ASSUMED]


def _break_even(gain: Callable[[float], float]) -> float | None:
    """The least acceptance at which an increasing gain reaches 1; None where none does."""
    if gain(1.0) < 1:
        return None
    low, high = 0.0, 1.0
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (low, middle) if gain(middle) >= 1 else (middle, high)
    return high
