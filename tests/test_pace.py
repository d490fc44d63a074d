"""Draft lengths on a model of costs: never 2 % slower than without drafts, near the best with."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cascade.pace import Pace

LINE = 15  # tokens that the verifier writes alone between two looks at the pace


@dataclass
class Machine:
    """Seconds that things take; one verifying pass of one token takes 1.

    draft:  a small pass; extra: each further token of a verifying pass; round: once a round
    accept: probability that a drafted token is kept, by the token's number
    noise:  standard deviation of the logarithm of every measurement; what counts in the end are the
            times without it
    """

    draft: float
    extra: float
    accept: Callable[[int], float]
    round: float = 0.0
    noise: float = 0.0
    seed: int = 0

    def run(
        self, tokens: int, length: Callable[[Pace], int] | None = None
    ) -> tuple[float, Counter]:
        """Seconds to write some tokens, and how often each draft length was used."""
        rng, pace, used = random.Random(self.seed), Pace(), Counter[int]()
        choose = length or (lambda pace: pace.length(LINE))
        written, total = 0, 0.0

        def measured(seconds: float) -> float:
            return seconds * rng.lognormvariate(-(self.noise**2) / 2, self.noise)

        while written < tokens:
            k = choose(pace)
            used[k] += 1
            if k == 0:
                seconds, kept = float(LINE), LINE
                pace.wrote(LINE, measured(seconds))
            else:
                seconds = k * self.draft + 1 + k * self.extra + self.round
                accepted = 0
                while accepted < k and rng.random() < self.accept(written + accepted):
                    accepted += 1
                kept = accepted + 1
                pace.drafted(k, accepted, kept, measured(seconds))
            written, total = written + kept, total + seconds
        return total / written, used


LOSING = {
    "never right": Machine(draft=0.3, extra=0.05, accept=lambda n: 0.0),
    "as slow as the verifier": Machine(draft=1.0, extra=0.0, accept=lambda n: 0.9),
    "experts cost more": Machine(draft=0.57, extra=0.6, accept=lambda n: 0.8),  # 30b, batch 1
    "just not worth it": Machine(draft=0.5, extra=0.3, accept=lambda n: 0.7),
    "slow rounds": Machine(draft=0.2, extra=0.0, round=3.0, accept=lambda n: 0.6),
    "slower than the verifier": Machine(draft=3.0, extra=0.5, accept=lambda n: 0.5),
}
WINNING = {
    "cheap and right": Machine(draft=0.1, extra=0.02, accept=lambda n: 0.9),
    "cheap and often right": Machine(draft=0.1, extra=0.05, accept=lambda n: 0.7),
    "half as slow": Machine(draft=0.5, extra=0.05, accept=lambda n: 0.95),
}


@pytest.mark.parametrize("noise", [0.0, 0.2])
@pytest.mark.parametrize("name", LOSING)
def test_where_drafting_loses_it_costs_less_than_two_percent(name: str, noise: float) -> None:
    machine = LOSING[name]
    machine.noise = noise
    for seed in range(5):
        machine.seed = seed
        assert machine.run(6000)[0] <= 1.02


@pytest.mark.parametrize("noise", [0.0, 0.2])
@pytest.mark.parametrize("name", WINNING)
def test_where_drafting_wins_most_of_the_gain_is_taken(name: str, noise: float) -> None:
    machine = WINNING[name]
    machine.noise = noise
    fixed = {k: machine.run(6000, lambda pace, k=k: k)[0] for k in range(9)}
    gain = 1 - min(fixed.values())
    assert gain > 0.1
    assert 1 - machine.run(6000)[0] >= 0.8 * gain


def test_acceptance_that_breaks_down_is_noticed() -> None:
    """High for a thousand tokens, then none: what was won pays, and drafting stops."""
    machine = Machine(draft=0.2, extra=0.05, accept=lambda n: 0.95 if n < 1000 else 0.0)
    seconds, _ = machine.run(8000)
    assert seconds < 1.0
    after = Machine(draft=0.2, extra=0.05, accept=lambda n: 0.95 if n % 2000 < 200 else 0.0)
    assert after.run(20000)[0] <= 1.02


@given(
    draft=st.floats(0.01, 5),
    extra=st.floats(0, 2),
    overhead=st.floats(0, 2),
    accept=st.lists(st.floats(0, 1), min_size=1, max_size=5),
    period=st.integers(1, 3000),
)
def test_no_machine_makes_it_two_percent_slower(
    draft: float, extra: float, overhead: float, accept: list[float], period: int
) -> None:
    """Whatever things cost, and however acceptance changes in the course of 5,000 tokens."""
    machine = Machine(draft, extra, lambda n: accept[n // period % len(accept)], overhead)
    assert machine.run(5000)[0] <= 1.02


@pytest.mark.parametrize("rows", [3, 20])
@pytest.mark.parametrize("name", [*LOSING, *WINNING])
def test_rows_of_a_batch_go_together(name: str, rows: int) -> None:
    """Lines of 1 to 30 tokens: a batch lasts as long as its longest, and each row has its share."""
    machine, rng = (LOSING | WINNING)[name], random.Random(1)
    pace, alone, total, written = Pace(rows=1 << rows.bit_length() >> 1), 0.0, 0.0, 0
    steps = lines = 0
    while written < 2500 * rows:
        chosen = [pace.length(LINE, rows) for _ in range(rows)]
        assert len(set(chosen)) == 1
        if chosen[0] == 0:
            sizes = [rng.randint(1, 30) for _ in range(rows)]
            seconds, steps, lines = float(max(sizes)), steps + max(sizes), lines + sum(sizes)
            for size in sizes:
                pace.wrote(size, seconds / rows)
        else:
            k = chosen[0]
            seconds = k * machine.draft + 1 + k * machine.extra + machine.round
            sizes = []
            for _ in range(rows):
                accepted = 0
                while accepted < k and rng.random() < machine.accept(0):
                    accepted += 1
                sizes.append(accepted + 1)
                pace.drafted(k, accepted, accepted + 1, seconds / rows)
        total, written = total + seconds, written + sum(sizes)
    alone = steps / lines  # seconds a token where nothing is drafted
    assert total / written <= 1.02 * alone
    if name in WINNING:
        assert total / written < 0.9 * alone


def test_nothing_is_drafted_before_the_verifier_alone_was_timed() -> None:
    assert Pace().length(8) == 0


def test_no_more_is_drafted_than_fits() -> None:
    pace = Pace()
    for _ in range(10):
        pace.wrote(1000, 1000.0)
    for _ in range(100):
        pace.drafted(2, 2, 3, 1.2)
        pace.wrote(10, 10.0)
    assert pace.length(8) == pace.most == 8
    assert [pace.length(limit) for limit in (0, 1, 3)] == [0, 1, 3]
