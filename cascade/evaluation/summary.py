"""What a run came to: every number that tables, figures and the report show."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Mapping
from collections.abc import Sequence as Seq
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from cascade.evaluation.records import Record
from cascade.evaluation.statistics import Interval, auroc, mean_interval, wilson

BINS = 10  # of a calibration curve
POSITIONS = 20  # of the acceptance by step position
MOMENTS = 48  # of the tokens over time


@dataclass(frozen=True, slots=True)
class Acceptance:
    """Drafted steps from number `first` to `last`, and of those how many were kept whole."""

    first: int
    last: int
    drafted: int
    kept: int
    low: float
    high: float


@dataclass(frozen=True, slots=True)
class CalibrationBin:
    """Items of similar confidence: their mean confidence and the share that is right."""

    confidence: float
    right: float
    items: int
    low: float
    high: float


@dataclass(frozen=True, slots=True)
class Calibration:
    """Whether scores tell right answers from wrong ones.

    score: `min`, the lowest score of the steps that were kept as drafted, or `mean`, the geometric
           mean over their tokens
    error: expected calibration error; auroc: None where all answers are right, or all wrong
    """

    score: str
    bins: tuple[CalibrationBin, ...]
    error: float
    auroc: float | None


@dataclass(frozen=True, slots=True)
class Timeline:
    """Kept tokens by slice in equal spans of a run's wall time, of `span` seconds each."""

    span: float
    tokens: Mapping[str, tuple[int, ...]]


@dataclass(frozen=True, slots=True)
class Summary:
    """One run.

    items, failed: finished items, and of those how many ended in an error
    seconds: wall time of the run, over all its sittings; per_second: items over it
    latency: of a request, in seconds: mean and quantiles; it waited for the rows beside it
    bytes:   of weights, read for a problem: its cost, as if it had run alone
    passes:  forward passes for a problem, by slice; tokens: generated and kept, for a problem
    share:   of kept tokens by slice; thinking: of those of the thought
    steps:   how many were decided how
    acceptance: drafted tokens that were kept, of all drafted; None where nothing was drafted
    """

    run: str
    baseline: bool
    items: int
    failed: int
    accuracy: Interval
    by_kind: Mapping[str, tuple[int, float]]
    seconds: float
    per_second: float
    latency: Mapping[str, float]
    bytes: float
    passes: Mapping[str, float]
    tokens: float
    share: Mapping[str, float]
    thinking: Mapping[str, float]
    steps: Mapping[str, int]
    acceptance: float | None
    positions: tuple[Acceptance, ...]
    calibration: tuple[Calibration, ...]
    timeline: Timeline
    repeated: int

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def summarise(run: str, records: Seq[Record], *, baseline: bool = False) -> Summary:
    """The summary of one run's records."""
    n = len(records) or 1
    seconds, starts = _wall(records)
    latencies = [r.seconds for r in records if r.metrics] or [0.0]
    shares = _counted(records, "usage", "by_slice")
    thinking = _counted(records, "usage", "thinking_by_slice")
    drafted = sum(r.usage.get("drafted", 0) for r in records)
    kinds: defaultdict[str, list[float]] = defaultdict(list)
    for record in records:
        kinds[record.kind].append(record.score)
    return Summary(
        run=run,
        baseline=baseline,
        items=len(records),
        failed=sum(r.error is not None for r in records),
        accuracy=mean_interval([r.score for r in records]),
        by_kind={kind: (len(s), sum(s) / len(s)) for kind, s in sorted(kinds.items())},
        seconds=seconds,
        per_second=len(records) / seconds if seconds else 0.0,
        latency={
            "mean": float(np.mean(latencies)),
            "p50": float(np.quantile(latencies, 0.5)),
            "p95": float(np.quantile(latencies, 0.95)),
        },
        bytes=sum(_counted(records, "metrics", "bytes").values()) / n,
        passes={s: c / n for s, c in _counted(records, "metrics", "passes").items()},
        tokens=sum(r.tokens for r in records) / n,
        share=_normalised(shares),
        thinking=_normalised(thinking),
        steps=dict(Counter(step["decision"] for r in records for step in r.steps)),
        acceptance=sum(r.usage.get("accepted", 0) for r in records) / drafted if drafted else None,
        positions=_positions(records),
        calibration=tuple(c for name in ("min", "mean") if (c := _calibration(name, records))),
        timeline=_timeline(records, seconds, starts),
        repeated=sum(r.tries - 1 for r in records),
    )


def was_drafted(step: Mapping[str, Any]) -> bool:
    """Whether a slice proposed this step and another one could have refused it."""
    return bool(step["drafted_tokens"] or retracted(step))


def written(step: Mapping[str, Any]) -> dict[str, int]:
    """Kept tokens of a step by the slice that wrote them."""
    drafted = int(step["drafted_tokens"])
    found = Counter({step["drafter"]: drafted})
    found[step["slice"]] += int(step["tokens"]) - drafted
    return {name: count for name, count in found.items() if count}


def retracted(step: Mapping[str, Any]) -> bool:
    """Whether drafted tokens of this step were dropped."""
    return bool(step.get("retracted") or step.get("retracted_ids"))


def _wall(records: Seq[Record]) -> tuple[float, dict[int, float]]:
    """Seconds of all sittings, and when each of them began."""
    last: defaultdict[int, float] = defaultdict(float)
    for record in records:
        last[record.session] = max(last[record.session], record.clock)
    starts, total = {}, 0.0
    for session in sorted(last):
        starts[session] = total
        total += last[session]
    return total, starts


def _counted(records: Seq[Record], part: str, name: str) -> Counter[str]:
    total: Counter[str] = Counter()
    for record in records:
        total.update(getattr(record, part).get(name, {}))
    return total


def _normalised(counts: Mapping[str, int]) -> dict[str, float]:
    total = sum(counts.values())
    return {name: count / total for name, count in sorted(counts.items())} if total else {}


def _positions(records: Seq[Record]) -> tuple[Acceptance, ...]:
    seen: Counter[int] = Counter()
    kept: Counter[int] = Counter()
    for record in records:
        for step in record.steps:
            if was_drafted(step):
                seen[step["index"]] += 1
                kept[step["index"]] += not retracted(step)
    if not seen:
        return ()
    width = math.ceil((max(seen) + 1) / POSITIONS)
    found = []
    for first in range(0, max(seen) + 1, width):
        places = range(first, first + width)
        n, k = sum(seen[i] for i in places), sum(kept[i] for i in places)
        if n:
            found.append(Acceptance(first, first + width - 1, n, k, *wilson(k, n)))
    return tuple(found)


def confidence(score: str, record: Record) -> float | None:
    """How sure the verifier was of the steps that it let pass; None where it was not asked."""
    name = "score" if score == "min" else "mean_score"
    kept = [s for s in record.steps if s.get(name) is not None and not retracted(s)]
    if not kept:
        return None
    if score == "min":
        return min(float(s[name]) for s in kept)
    logs = [(math.log(max(float(s[name]), 1e-30)), int(s["tokens"])) for s in kept]
    return math.exp(sum(v * t for v, t in logs) / max(sum(t for _, t in logs), 1))


def _calibration(score: str, records: Seq[Record]) -> Calibration | None:
    pairs = [(c, r.score) for r in records if (c := confidence(score, r)) is not None]
    if not pairs:
        return None
    table = np.array(pairs)
    # As many items in each bin as ties allow, which are never torn apart.
    edges = np.unique(np.quantile(table[:, 0], np.linspace(0, 1, BINS + 1)[1:-1]))
    places = np.searchsorted(edges, table[:, 0], side="left")
    bins = []
    for place in np.unique(places):
        part = table[places == place]
        right = float(part[:, 1].sum())
        bins.append(
            CalibrationBin(
                float(part[:, 0].mean()), right / len(part), len(part), *wilson(right, len(part))
            )
        )
    error = sum(b.items * abs(b.confidence - b.right) for b in bins) / len(pairs)
    area = auroc([c for c, _ in pairs], [s >= 0.5 for _, s in pairs])
    return Calibration(score, tuple(bins), error, area)


def _timeline(records: Seq[Record], seconds: float, starts: Mapping[int, float]) -> Timeline:
    """A step's tokens count at the moment of its commit."""
    span = seconds / MOMENTS if seconds else 1.0
    tokens: defaultdict[str, list[int]] = defaultdict(lambda: [0] * MOMENTS)
    for record in records:
        moment = starts[record.session] + record.clock
        for step in reversed(record.steps):
            place = min(max(int(moment / span), 0), MOMENTS - 1)
            for name, count in written(step).items():
                tokens[name][place] += count
            moment -= step["milliseconds"] / 1e3
    return Timeline(span, {name: tuple(counts) for name, counts in sorted(tokens.items())})
