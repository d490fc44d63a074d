"""What a request has cost: tokens drafted and kept, passes, seconds."""

from __future__ import annotations

import time
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

from cascade.model import ElasticModel
from cascade.policies import Progress
from cascade.results import Metrics, Step, Usage
from cascade.sequence import Meter
from cascade.transcript import Transcript

TEXTS = 32  # steps whose texts a policy is shown


@dataclass
class Rate:
    """Seconds spent on a number of things."""

    seconds: float = 0.0
    count: int = 0

    @property
    def each(self) -> float:
        return self.seconds / self.count


@dataclass
class Account:
    """The running totals of one request; what they mean stands at `Usage` and `Metrics`."""

    drafted: int = 0
    rounds: int = 0
    accepted: int = 0
    rewritten: int = 0
    unverified: int = 0
    unverified_steps: int = 0  # in a row, up to now
    refreshed: int = 0
    refresh_seconds: float = 0.0
    began: float = field(default_factory=time.perf_counter)
    _written: dict[str, Rate] = field(default_factory=lambda: defaultdict(Rate))
    _verified: dict[str, Rate] = field(default_factory=lambda: defaultdict(Rate))

    @property
    def seconds(self) -> float:
        return time.perf_counter() - self.began

    def wrote(self, slice: str, tokens: int, seconds: float) -> None:
        """Note how long a slice took to write, or draft, so many tokens."""
        if tokens:
            self._written[slice].seconds += seconds
            self._written[slice].count += tokens

    def verified(self, slice: str, seconds: float) -> None:
        """Note how long one verifying pass of a slice took."""
        self._verified[slice].seconds += seconds
        self._verified[slice].count += 1

    @contextmanager
    def refreshing(self) -> Iterator[None]:
        began = time.perf_counter()
        yield
        self.refresh_seconds += time.perf_counter() - began

    def usage(self, prompt: int, transcript: Transcript) -> Usage:
        pairs = list(zip(transcript.authors, transcript.phases, strict=True))
        return Usage(
            prompt=prompt,
            reasoning=transcript.thought,
            answer=len(transcript) - transcript.thought,
            drafted=self.drafted,
            accepted=self.accepted,
            rewritten=self.rewritten,
            unverified=self.unverified,
            by_slice=dict(Counter(transcript.authors)),
            thinking_by_slice=dict(Counter(a for a, phase in pairs if phase == "thinking")),
        )

    def metrics(self, kept: int, meter: Meter, model: ElasticModel) -> Metrics:
        seconds, names = self.seconds, list(model.slices)
        passes: Counter[str] = Counter()
        moved: Counter[str] = Counter()
        for (writer, tokens), count in meter.passes.items():
            passes[names[writer]] += count
            moved[names[writer]] += count * model.pass_bytes(names[writer], tokens)
        return Metrics(
            seconds=seconds,
            tokens_per_second=kept / seconds if seconds else 0.0,
            acceptance_rate=self.accepted / self.drafted if self.drafted else None,
            mean_accepted=self.accepted / self.rounds if self.rounds else None,
            passes=dict(passes),
            bytes=dict(moved),
            ran=ran(meter, names),
            refreshed=self.refreshed,
            refresh_seconds=self.refresh_seconds,
        )

    def progress(
        self, transcript: Transcript, meter: Meter, names: list[str], steps: list[Step]
    ) -> Progress:
        """What a policy is told about the request so far."""
        texts = (step.text for step in steps[-TEXTS:])
        return Progress(
            tokens=dict(Counter(transcript.authors)),
            ran=ran(meter, names),
            thought=transcript.thought,
            seconds=self.seconds,
            unverified=self.unverified_steps,
            texts=tuple(text for text in texts if text is not None),
            token_seconds=_each(self._written),
            pass_seconds=_each(self._verified),
        )


def ran(meter: Meter, names: list[str]) -> dict[str, int]:
    """Tokens that each slice has run."""
    total: Counter[str] = Counter()
    for (writer, tokens), count in meter.passes.items():
        total[names[writer]] += tokens * count
    return dict(total)


def _each(rates: Mapping[str, Rate]) -> dict[str, float]:
    return {name: rate.each for name, rate in rates.items() if rate.count}
