"""How many tokens to draft at a time, from measured times and acceptance; none where none pay.

With k drafted tokens of which each is accepted with probability a (given that those before it
were), a round keeps (1 - a^(k+1)) / (1 - a) tokens on average (Leviathan et al., arXiv 2211.17192)
and takes the time of k small passes and one verifying pass. The length with the highest expected
rate is taken, if it beats the verifying slice alone.

Finding out costs time too, and an estimate may be wrong. Therefore a ledger: time spent adds a
small share to a credit, a round that took longer than its tokens would have taken alone is paid for
out of it, and one that was faster adds to it. No round begins that the credit could not pay even if
all of its drafts were rejected. So whatever acceptance and times do, drafting loses at most that
share of the whole, and the credit that was put by.

Seconds here are a row's share of the machine: of a batch of n rows each has an nth of its time.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

RECENT = 0.03  # weight of the newest measurement of every row
WORTH = 1.02  # a rate must beat the verifier's alone by as much
CREDIT = 32.0  # the most that is put by, in tokens' time of every row
ENOUGH = 4  # measurements of the verifier alone, of every row, before anything is drafted
REMEASURE = 64  # rounds after which the verifier alone is measured again


@dataclass
class Each:
    """Seconds a token: a ratio of sums that fade, so that long lines count for more.

    misfit: sum of the squares by which measurements miss the ratio
    """

    seconds: float = 0.0
    tokens: float = 0.0
    misfit: float = 0.0
    count: int = 0

    def add(self, seconds: float, tokens: int, keep: float) -> None:
        if self.count:  # one wild measurement cannot carry it away
            seconds = min(seconds, 2 * self.value * tokens + self.seconds / self.count)
        self.count += 1
        self.seconds = keep * self.seconds + seconds
        self.tokens = keep * self.tokens + tokens
        self.misfit = keep * keep * self.misfit + (seconds - self.value * tokens) ** 2

    @property
    def value(self) -> float:
        return self.seconds / self.tokens if self.tokens else 0.0

    @property
    def low(self) -> float:
        """The value less two standard errors, at least half of it."""
        error = math.sqrt(self.misfit) / self.tokens if self.tokens else 0.0
        return max(self.value - 2 * error, self.value / 2)


@dataclass
class Line:
    """Seconds of a round by draft length: a straight line through what was measured.

    Least squares with fading weights; the verifier alone counts as one round without a draft.
    Fields are sums over the rounds: of 1, k, k squared, seconds, and k times seconds.
    """

    rounds: float = 0.0
    k: float = 0.0
    kk: float = 0.0
    seconds: float = 0.0
    k_seconds: float = 0.0

    def add(self, k: int, seconds: float, keep: float) -> None:
        self.rounds = keep * self.rounds + 1
        self.k = keep * self.k + k
        self.kk = keep * self.kk + k * k
        self.seconds = keep * self.seconds + seconds
        self.k_seconds = keep * self.k_seconds + k * seconds

    def at(self, k: int, alone: float) -> float:
        """Expected seconds with k drafted tokens; alone: a token by the verifier alone."""
        rounds, seconds = self.rounds + 1, self.seconds + alone
        spread = rounds * self.kk - self.k**2
        slope = (rounds * self.k_seconds - self.k * seconds) / spread if spread > 0 else 0.0
        slope = max(slope, 0.0)
        return max((seconds - slope * self.k) / rounds + slope * k, alone)


@dataclass
class Pace:
    """The draft length for one pair of slices and one size of batch.

    most:   the longest draft; rows: about as many share a batch
    share:  of the time, to be spent on finding out; halved by every trial that loses
    credit: seconds put by; alone: the verifier alone; rounds: with drafts
    accepted, tried: drafted tokens, counts that fade; they begin with a guess of 0.8
    """

    most: int = 8
    rows: int = 1
    share: float = 0.01
    credit: float = 0.0
    alone: Each = field(default_factory=Each)
    rounds: Line = field(default_factory=Line)
    accepted: float = 4.0
    tried: float = 5.0
    _since_alone: int = 0
    _choice: int = 0
    _asked: int = 0
    _share: float = field(init=False)

    def __post_init__(self) -> None:
        self._share = self.share

    def length(self, limit: int, rows: int = 1) -> int:
        """How many tokens to draft now, at most `limit`; 0 to let the verifier write alone.

        The rows of a batch ask one after the other and all get the same choice: a row that drafts
        while the others do not would have a batch of its own.
        """
        if self._asked == 0:
            self._choice = self._choose()
        self._asked = (self._asked + 1) % max(rows, 1)
        return max(min(self._choice, limit), 0)

    def rate(self, k: int) -> float:
        """Expected tokens a second with k drafted tokens."""
        a = min(self.accepted / self.tried, 0.999)
        return (1 - a ** (k + 1)) / (1 - a) / self.seconds(k)

    def seconds(self, k: int) -> float:
        """Expected time of a round. The verifier's counts as rather too little than too much."""
        return self.rounds.at(k, self.alone.low) if k else self.alone.low

    def worst(self, k: int) -> float:
        """What a round of all rows loses at worst: one token for its time, and slow drafts."""
        unknown = 0.0 if self.rounds.rounds else k * self.alone.low
        return self.rows * (self.seconds(k) + unknown - self.alone.low)

    def wrote(self, tokens: int, seconds: float) -> None:
        """Note what the verifier alone took for some tokens."""
        if tokens:
            self.alone.add(seconds, tokens, self._keep)
            self._since_alone = 0
            self._earn(self._share * seconds)

    def drafted(self, k: int, accepted: int, kept: int, seconds: float) -> None:
        """Note a round: k tokens drafted, so many accepted, and kept with the verifier's own."""
        self.rounds.add(k, seconds, self._keep)
        stopped = accepted < k  # the first that was rejected is the last that was looked at
        self.accepted = self._keep * self.accepted + accepted
        self.tried = self._keep * self.tried + accepted + stopped
        self._since_alone += 1
        gain = kept * self.alone.low - seconds
        self._share = max(self._share / 2, self.share / 16) if gain < 0 else self.share
        self._earn(gain + self._share * seconds)

    @property
    def _keep(self) -> float:
        """What fading sums keep at a measurement of one row."""
        return 1 - RECENT / self.rows

    def _choose(self) -> int:
        if self.alone.count < ENOUGH * self.rows or self._since_alone >= REMEASURE * self.rows:
            return 0
        best = max(range(self.most + 1), key=self.rate)
        if self.rate(best) < WORTH * self.rate(0):
            best = 1  # a trial, as soon as the credit pays for it
        while best and self.credit < self.worst(best):
            best -= 1
        return best

    def _earn(self, seconds: float) -> None:
        self.credit = min(self.credit + seconds, CREDIT * self.rows * self.alone.low)
