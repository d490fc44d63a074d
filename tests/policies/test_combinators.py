"""Combinators: who decides, who is asked about skipping, and what is needed and learned."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from cascade.policies import (
    Accept,
    AllOf,
    Always,
    Gate,
    Lead,
    Logistic,
    Refresh,
    Rewrite,
    Threshold,
    all_of,
    any_of,
    first_n_steps,
)
from tests.policies.steps import decisions, draft, step

KEEP, NEVER = Always(), Always(decision=Rewrite())


def keeps(decision: object) -> bool:
    return isinstance(decision, (Accept, Refresh))


@given(st.lists(decisions, min_size=1, max_size=5))
def test_all_of_keeps_what_all_keep_and_any_of_what_any_keeps(parts: list) -> None:
    policies = [Always(decision=part) for part in parts]
    rejected = [part for part in parts if not keeps(part)]
    together, either = all_of(*policies).decide(step()), any_of(*policies).decide(step())
    assert together == rejected[0] if rejected else keeps(together)
    assert keeps(either) if len(rejected) < len(parts) else either == parts[0]


def test_a_refresh_is_not_lost_among_those_that_keep() -> None:
    assert all_of(KEEP, Always(decision=Refresh()), KEEP).decide(step()) == Refresh()


def test_verification_is_skipped_where_all_or_any_skip_it() -> None:
    sure = draft(-0.001)
    assert all_of(Gate(), Gate(probability=0.5)).skips(sure)
    assert not all_of(Gate(), Threshold()).skips(sure)
    assert any_of(Gate(), Threshold()).skips(sure)


def test_the_first_steps_have_a_policy_of_their_own() -> None:
    policy = first_n_steps(2, Always(decision=Lead()), Gate(policy=NEVER))
    assert [policy.decide(step(step=n)) for n in range(3)] == [Lead(), Lead(), Rewrite()]
    assert [policy.skips(draft(-0.001, step=n)) for n in range(3)] == [False, False, True]
    assert first_n_steps(1, NEVER).decide(step(step=1)) == Accept()


def test_needs_are_those_of_all_parts() -> None:
    policy = all_of(Threshold(score="judge"), Gate(policy=Threshold(score="divergence")))
    assert policy.needs == {"judge", "divergence", "draft"}
    assert Threshold().needs == frozenset()


def test_a_policy_made_of_one_that_learns_learns() -> None:
    fitted = Logistic(weights=(1.0, 1.0, 1.0))
    assert first_n_steps(3, all_of(KEEP, Logistic())).learns
    assert not all_of(KEEP, fitted).learns
    assert all_of(KEEP, fitted).fitted([]) == all_of(KEEP, fitted)


def test_nothing_cannot_be_combined() -> None:
    with pytest.raises(ValidationError):
        AllOf(policies=())
