"""CostAware: a rewrite happens exactly where the risk is dearer than the writing."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cascade.policies import Accept, CostAware, Progress, Rewrite
from tests.policies.steps import draft, known, step


def measured(seconds: float) -> Progress:
    return Progress(token_seconds={"large": seconds})


def test_a_risk_is_weighed_against_the_tokens_left_to_write() -> None:
    scores = step(known(0.9), known(0.4), known(0.9), known(0.9), progress=measured(0.1))
    # 60 % of a second at stake, against three tokens of a tenth of a second each.
    assert CostAware(price=1.0).decide(scores) == Rewrite(start=1)
    assert CostAware(price=0.4).decide(scores) == Accept()


@given(
    st.lists(st.floats(0.001, 1), min_size=1, max_size=12),
    st.floats(1e-3, 10),
    st.floats(1e-3, 10),
)
def test_no_worthwhile_rewrite_is_missed_and_none_else_is_made(
    chances: list[float], price: float, seconds: float
) -> None:
    logs = [known(p) for p in chances]
    decision = CostAware(price=price).decide(step(*logs, progress=measured(seconds)))
    worth = [price * (1 - p) - (len(chances) - i) * seconds for i, p in enumerate(chances)]
    if isinstance(decision, Rewrite):
        assert worth[decision.start] > -1e-9
        assert all(gain <= 1e-9 for gain in worth[: decision.start])
    else:
        assert all(gain <= 1e-9 for gain in worth)


def test_a_verifying_pass_stands_for_a_token_until_one_was_written() -> None:
    scores = step(known(0.5), progress=Progress(pass_seconds={"large": 0.1}))
    assert CostAware(price=1.0).decide(scores) == Rewrite(start=0)
    assert CostAware(price=1.0).decide(step(known(0.5))) == Accept()


def test_the_judge_speaks_for_the_whole_step() -> None:
    policy = CostAware(price=1.0, score="judge")
    assert policy.needs == {"judge"}
    scores = step(-0.1, -0.1, judge=0.2, progress=measured(0.3))
    assert policy.decide(scores) == Rewrite(start=0)
    assert policy.decide(step(-0.1, -0.1, judge=0.5, progress=measured(0.3))) == Accept()


@pytest.mark.parametrize(("seconds", "skipped"), [(0.2, True), (0.05, False)])
def test_with_a_gate_a_pass_that_costs_more_than_it_saves_is_skipped(
    seconds: float, skipped: bool
) -> None:
    sure = draft(known(0.9), progress=Progress(pass_seconds={"large": seconds}))
    assert CostAware(price=1.0, gate=True).skips(sure) is skipped
    assert not CostAware(price=1.0).skips(sure)
    assert not CostAware(price=1.0, gate=True).skips(draft(known(0.9)))
