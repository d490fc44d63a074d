"""Scores: what each is made of, on one scale, and what it needs to be gathered."""

import math
from typing import get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cascade.policies import ScoreName, value_of
from cascade.policies.scores import first_below, needs_of, token_logs
from tests.policies.steps import draft, step

NAMES = get_args(ScoreName)
FULL = {
    "draft_logprobs": (-0.2, -1.0),
    "entropies": (0.5, 1.5),
    "margins": (0.25, 1.0),
    "divergences": (0.1, 0.3),
    "judge": 0.75,
}


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("min", math.exp(-2)),
        ("mean", math.exp(-1.25)),
        ("draft_min", math.exp(-1)),
        ("draft_mean", math.exp(-0.6)),
        ("entropy", math.exp(-1)),
        ("max_entropy", math.exp(-1.5)),
        ("margin", 0.5),
        ("min_margin", 0.25),
        ("divergence", math.exp(-0.2)),
        ("max_divergence", math.exp(-0.3)),
        ("judge", 0.75),
    ],
)
def test_every_score_is_one_number_between_zero_and_one(name: ScoreName, value: float) -> None:
    assert value_of(name, step(-0.5, -2.0, **FULL)) == pytest.approx(value)


def test_no_score_is_left_out_above() -> None:
    assert len(NAMES) == 11


@given(
    st.sampled_from([n for n in NAMES if n != "judge"]),
    st.lists(st.tuples(*[st.floats(0, 30)] * 4, st.floats(0, 1)), min_size=1, max_size=9),
)
def test_a_step_is_as_good_as_its_worst_token_or_better(name: ScoreName, rows: list) -> None:
    columns = list(zip(*rows, strict=True))
    logprobs, draft_logprobs = (tuple(-x for x in column) for column in columns[:2])
    scores = step(
        *logprobs,
        draft_logprobs=draft_logprobs,
        entropies=columns[2],
        divergences=columns[3],
        margins=columns[4],
    )
    logs = token_logs(name, scores)
    assert logs is not None
    assert 0 <= value_of(name, scores) <= 1
    assert value_of(name, scores) >= math.exp(min(logs)) * (1 - 1e-9)


@pytest.mark.parametrize(("name", "need"), [("entropy", "draft"), ("divergence", "divergence")])
def test_a_score_that_was_not_gathered_says_what_to_ask_for(name: ScoreName, need: str) -> None:
    assert needs_of(name) == {need}
    with pytest.raises(ValueError, match=f"must name '{need}'"):
        value_of(name, step(-0.5))


def test_the_verifier_has_no_figures_before_it_has_verified() -> None:
    assert needs_of("min", "mean") == frozenset()
    with pytest.raises(ValueError, match="a verified step"):
        value_of("min", draft(-0.1))


@pytest.mark.parametrize(
    ("logs", "least", "position"),
    [
        ((-0.1, -2.0, -3.0), -1.0, 1),
        ((-0.1, -2.0, -3.0), -9.0, 2),
        ((-1.0, -1.0), -1.0, 0),
        (None, -1.0, 0),
    ],
)
def test_the_cut_is_at_the_first_token_below(
    logs: tuple[float, ...] | None, least: float, position: int
) -> None:
    assert first_below(logs, least) == position
