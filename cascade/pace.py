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
"""

from __future__ import annotations

from dataclasses import dataclass, field

RECENT = 0.1  # weight of the newest measurement
WORTH = 1.02  # a rate must beat the verifier's alone by as much
REMEMBERED = 0.98  # of the acceptance counts, a round
CREDIT = 32.0  # the most that is put by, in tokens' time
REMEASURE = 64  # rounds after which the verifier alone is measured again


@dataclass
class Pace:
    """The draft length for one pair of slices and one size of batch.

    most:  the longest draft
    share: of the time, to be spent on finding out; halved by every trial that loses
    """

    most: int = 8
    share: float = 0.01
    credit: float = 0.0  # seconds
    alone: float | None = None  # seconds a token, by the verifier alone
    rounds: dict[int, float] = field(default_factory=dict)  # seconds a round, by draft length
    accepted: float = 4.0  # counts that fade; begin with a guess of 0.8
    tried: float = 5.0
    since_alone: int = 0
    _share: float = field(init=False)

    def __post_init__(self) -> None:
        self._share = self.share

    def length(self, limit: int) -> int:
        """How many tokens to draft now, at most `limit`; 0 to let the verifier write alone."""
        if self.alone is None or limit < 1 or self.since_alone >= REMEASURE:
            return 0
        best = max(range(min(limit, self.most) + 1), key=self.rate)
        if self.rate(best) < WORTH * self.rate(0):
            best = 1  # a trial, as soon as the credit pays for it
        while best and self.credit < self.worst(best):
            best -= 1
        return best

    def rate(self, k: int) -> float:
        """Expected tokens a second with k drafted tokens."""
        return self.kept(k) / self.seconds(k)

    def kept(self, k: int) -> float:
        """Expected tokens of a round."""
        a = min(self.accepted / self.tried, 0.999)
        return (1 - a ** (k + 1)) / (1 - a)

    def seconds(self, k: int) -> float:
        """Expected time of a round: measured, or by the nearest lengths that were measured."""
        alone = self.alone or 0.0
        if k in self.rounds or k == 0:
            return self.rounds.get(k, alone)
        known = {0: alone} | self.rounds
        if len(known) == 1:
            return alone  # the least it can take: a trial will tell
        near = sorted(known, key=lambda other: abs(other - k))[:2]
        low, high = min(near), max(near)
        slope = max((known[high] - known[low]) / (high - low), 0.0)
        return max(known[near[0]] + slope * (k - near[0]), alone)

    def worst(self, k: int) -> float:
        """What a round loses at worst: one token for its time."""
        alone = self.alone or 0.0
        unknown = 0.0 if self.rounds else k * alone
        return self.seconds(k) + unknown - alone

    def wrote(self, tokens: int, seconds: float) -> None:
        """Note what the verifier alone took for some tokens."""
        if tokens < 1:
            return
        self.alone = _blend(self.alone, seconds / tokens)
        self.since_alone = 0
        self._earn(self._share * seconds)

    def drafted(self, k: int, accepted: int, kept: int, seconds: float) -> None:
        """Note a round: k tokens drafted, so many accepted, and kept with the verifier's own."""
        self.rounds[k] = _blend(self.rounds.get(k), seconds)
        stopped = accepted < k  # the first that was rejected is the last that was looked at
        self.accepted = REMEMBERED * self.accepted + accepted
        self.tried = REMEMBERED * self.tried + accepted + stopped
        self.since_alone += 1
        gain = kept * (self.alone or 0.0) - seconds
        if gain < 0:
            self._share = max(self._share / 2, self.share / 16)
        else:
            self._share = self.share
        self._earn(gain + self._share * seconds)

    def _earn(self, seconds: float) -> None:
        self.credit = min(self.credit + seconds, CREDIT * (self.alone or 0.0))


def _blend(old: float | None, new: float) -> float:
    """A running mean that one wild measurement cannot carry away."""
    if old is None:
        return new
    return old + RECENT * (min(max(new, old / 2), 2 * old) - old)
