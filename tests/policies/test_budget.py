"""Budgets: until when a policy is asked, and what is decided afterwards."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from cascade.policies import (
    Accept,
    Always,
    EndThinking,
    Escalate,
    Gate,
    Lead,
    Policy,
    Progress,
    Rewrite,
    at_most,
    within_budget,
)
from tests.policies.steps import draft, step

NEVER = Always(decision=Rewrite())


@given(
    st.floats(0, 1),
    st.lists(st.tuples(st.integers(1, 20), st.integers(0, 20)), min_size=1, max_size=60),
)
def test_the_share_of_large_tokens_holds_over_a_whole_run(share: float, steps: list) -> None:
    kept = {"small": 0, "large": 0}
    for length, start in steps:
        start = min(start, length - 1)
        policy = at_most(share, Always(decision=Rewrite(start=start)))
        decision = policy.decide(step(*[-1.0] * length, progress=Progress(tokens=kept)))
        large = length - start if decision == Rewrite(start=start) else 0
        kept = {"small": kept["small"] + length - large, "large": kept["large"] + large}
        assert kept["large"] <= share * sum(kept.values()) + 1e-9


def test_a_lead_counts_all_of_its_steps() -> None:
    policy = at_most(0.5, Always(decision=Lead(steps=3)))
    assert policy.decide(step(-1.0, progress=Progress(tokens={"small": 3}))) == Lead(steps=3)
    assert policy.decide(step(-1.0, progress=Progress(tokens={"small": 2}))) == Accept()


def test_decisions_that_write_nothing_pass() -> None:
    assert at_most(0, Always(decision=Escalate())).decide(step(-1.0)) == Escalate()


@pytest.mark.parametrize(
    ("limit", "progress"),
    [
        ({"tokens": 5}, Progress(tokens={"large": 5, "small": 1})),
        ({"thought": 7}, Progress(thought=7)),
        ({"seconds": 0.5}, Progress(seconds=0.5)),
        ({"cost": 10}, Progress(ran={"small": 4, "large": 6})),
        (
            {"cost": 10, "prices": {"large": 4, "small": 0.5}},
            Progress(ran={"small": 4, "large": 2}),
        ),
    ],
)
def test_a_budget_that_is_spent_ends_the_policys_say(limit: dict, progress: Progress) -> None:
    policy = within_budget(NEVER, **limit)
    assert policy.decide(step(-1.0)) == Rewrite()
    assert policy.decide(step(-1.0, progress=progress)) == Accept()
    ending = within_budget(NEVER, **limit, then=EndThinking())
    assert ending.decide(step(-1.0, progress=progress)) == EndThinking()
    assert ending.decide(step(-1.0, progress=progress, phase="answer")) == Rewrite()


def test_tokens_are_those_of_the_verifier() -> None:
    policy = within_budget(NEVER, tokens=5)
    assert policy.decide(step(-1.0, progress=Progress(tokens={"small": 50}))) == Rewrite()


def test_a_spent_budget_saves_the_verification_of_what_it_keeps() -> None:
    spent = draft(-5.0, progress=Progress(thought=9))
    assert within_budget(NEVER, thought=9).skips(spent)
    assert not within_budget(NEVER, thought=9, then=EndThinking()).skips(spent)
    assert not within_budget(NEVER, thought=10).skips(spent)


def test_a_gate_inside_keeps_its_say() -> None:
    for policy in (at_most(0.5, Gate()), within_budget(Gate(), seconds=9)):
        assert isinstance(policy, Policy)
        assert policy.skips(draft(-0.001)) and not policy.skips(draft(-5.0))
        assert policy.needs == {"draft"}


def test_a_budget_without_a_limit_is_refused() -> None:
    with pytest.raises(ValidationError, match="one of tokens"):
        within_budget(NEVER)
    with pytest.raises(ValidationError, match="beside cost"):
        within_budget(NEVER, tokens=5, prices={"large": 2.0})
