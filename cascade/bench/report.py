"""What a benchmark found, as plain frozen values; `Report.to_json` is what `--json` writes.

Times are seconds, medians of several; sizes are bytes. `floor` is the time that the bytes which
must move would take at the copy bandwidth measured in the same run, `share` the floor over the
time.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import Literal


@dataclass(frozen=True, slots=True)
class Machine:
    """Where it ran. bandwidth: bytes read and written a second by a large copy."""

    device: str
    torch: str
    threads: int
    dtype: str
    bandwidth: float


@dataclass(frozen=True, slots=True)
class Experts:
    """Distinct experts that a pass chose, mean over MoE layers; `spread` if routing were even."""

    distinct: float
    spread: float
    of: int


@dataclass(frozen=True, slots=True)
class Cost:
    """A time beside the bytes behind it."""

    seconds: float
    moved: int
    bandwidth: float

    @property
    def floor(self) -> float:
        return self.moved / self.bandwidth

    @property
    def share(self) -> float:
        return self.floor / self.seconds


@dataclass(frozen=True, slots=True)
class Decode:
    """One token for each of `batch` rows: drafted, and its part of a commit every `run` tokens.

    peak: most bytes of a GPU in use at once meanwhile, weights included; 0 elsewhere
    """

    slice: str
    batch: int
    context: int
    run: int
    cost: Cost
    experts: Experts | None
    peak: int = 0

    @property
    def tokens_per_second(self) -> float:
        return self.batch / self.cost.seconds


@dataclass(frozen=True, slots=True)
class Scoring:
    """One pass of a slice over `tokens` ids that it did not write, batch 1: verify, or score."""

    slice: str
    tokens: int
    context: int
    cost: Cost
    experts: Experts | None


@dataclass(frozen=True, slots=True)
class Prefill:
    """A prompt of `tokens`, run and committed, batch 1.

    flops: two for each token and active parameter; the scan and attention are left out
    """

    slice: str
    tokens: int
    seconds: float
    flops: int

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.seconds


@dataclass(frozen=True, slots=True)
class Switch:
    """What the first draft after another slice's costs more than one after the same slice's."""

    before: str
    after: str
    seconds: float


@dataclass(frozen=True, slots=True)
class Memory:
    """weights: resident once; copies: bytes of further slices that are not views of them;
    cache: of one sequence of `context` tokens.
    """

    weights: int
    copies: int
    cache: int
    context: int


@dataclass(frozen=True, slots=True)
class Agreement:
    """The route that was timed against the plain reference, for one slice and batch.

    of:      `logits`: |fast - exact| / |exact| over the vocabulary, the largest, or in 16 bits the
             median; `worst row`: the same of the row with the largest median; `greedy`: how far a
             chosen id lies below the best, over what an average one does
    rows:    logits, rows or choices compared
    allowed: the bound; in 16 bits that of logits comes from the error of the plain route there
    """

    slice: str
    batch: int
    of: Literal["logits", "worst row", "greedy"]
    rows: int
    error: float
    allowed: float

    @property
    def ok(self) -> bool:
        return self.error <= self.allowed


@dataclass(frozen=True, slots=True)
class Peer:
    """Another engine on the same shape, batch 1, with its own cache. seconds: a decoded token.

    note: why there is no time, or what the time is of; ratio: over this library's time
    """

    name: str
    slice: str
    seconds: float | None
    note: str
    ratio: float | None = None


@dataclass(frozen=True, slots=True)
class Acceptance:
    """How often the largest slice keeps what the smallest drafts, and how that is known.

    token: a drafted id is kept, given that those before it were (token-level speculation)
    step:  share of drafted tokens that `stepwise` keeps
    source: `measured` on this checkpoint, or `assumed`
    """

    token: float
    step: float
    source: Literal["measured", "assumed"]


@dataclass(frozen=True, slots=True)
class Forecast:
    """A strategy's speed as step times and acceptance give it.

    gain:       tokens a second over the largest slice alone
    break_even: the least acceptance at which it is 1; None where none is enough, or none matters
    """

    strategy: str
    setting: str
    gain: float
    break_even: float | None


@dataclass(frozen=True, slots=True)
class Prediction:
    """acceptance: what the gains rest on; best: the strategy that pays most on this machine."""

    draft: str
    verify: str
    acceptance: Acceptance
    forecasts: tuple[Forecast, ...]
    best: str


@dataclass(frozen=True, slots=True)
class Report:
    """Everything that `cascade bench` prints. skipped: what was left out, and why."""

    model: str
    machine: Machine
    agreement: tuple[Agreement, ...]
    decode: tuple[Decode, ...]
    scoring: tuple[Scoring, ...]
    prefill: tuple[Prefill, ...]
    switches: tuple[Switch, ...]
    memory: Memory
    peers: tuple[Peer, ...]
    predictions: tuple[Prediction, ...]
    skipped: tuple[str, ...] = ()
    seconds: float = 0.0

    def to_json(self, indent: int | None = 2) -> str:
        """One object, with what follows from the figures (rates, floors, shares) spelt out."""
        facts = asdict(self)
        for name in ("decode", "scoring", "prefill"):
            for row, value in zip(facts[name], getattr(self, name), strict=True):
                if hasattr(value, "tokens_per_second"):
                    row["tokens_per_second"] = value.tokens_per_second
                if hasattr(value, "cost"):
                    cost = value.cost
                    row["cost"] |= {
                        "floor": cost.floor,
                        "share": cost.share,
                        "bytes_per_second": cost.moved / cost.seconds,
                    }
        for row, value in zip(facts["agreement"], self.agreement, strict=True):
            row["ok"] = value.ok
        return json.dumps(facts, indent=indent)
