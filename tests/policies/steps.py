"""Scores of made-up steps, and hypothesis strategies for policies of every kind."""

from __future__ import annotations

import math
from typing import Any

from hypothesis import strategies as st

from cascade.policies import (
    Accept,
    AllOf,
    Always,
    AnyOf,
    AtMost,
    CostAware,
    Cues,
    DraftScores,
    EndThinking,
    Escalate,
    FirstSteps,
    Gate,
    Lead,
    Logistic,
    Policy,
    Refresh,
    Rewrite,
    StepScores,
    Threshold,
    WithinBudget,
)


def step(*logprobs: float, **more: Any) -> StepScores:
    """A drafted step of the thought by its log-probabilities under the verifier."""
    given = {"step": 0, "phase": "thinking", "drafter": "small", "verifier": "large"}
    return StepScores(**given | {"logprobs": logprobs or (-0.1,)} | more)


def draft(*logprobs: float, **more: Any) -> DraftScores:
    """The same before verification, by the drafter's own log-probabilities."""
    given = {"step": 0, "phase": "thinking", "drafter": "small", "verifier": "large"}
    return DraftScores(**given | {"draft_logprobs": logprobs or (-0.1,)} | more)


def known(p: float) -> float:
    return math.log(p)


probabilities = st.floats(0.001, 0.999)
decisions = st.one_of(
    st.just(Accept()),
    st.just(Refresh()),
    st.builds(Rewrite, start=st.integers(0, 5)),
    st.builds(Escalate, by=st.sampled_from(["draft", "score"])),
    st.builds(Lead, steps=st.integers(1, 9)),
    st.builds(EndThinking, keep=st.booleans()),
)
scores_by_name = st.sampled_from(
    ["min", "mean", "divergence", "max_divergence", "judge", "draft_min", "entropy", "margin"]
)
simple = st.one_of(
    st.builds(Threshold, score=scores_by_name, probability=probabilities, reject=decisions),
    st.builds(Always, decision=decisions),
    st.builds(Cues, takeover=decisions, circles=decisions, repeats=st.integers(1, 5)),
    st.builds(CostAware, price=st.floats(1e-9, 1e9), gate=st.booleans()),
    st.builds(
        Logistic,
        scores=st.just(("min", "margin")),
        weights=st.tuples(*[st.floats(-1e6, 1e6)] * 2),
        bias=st.floats(-1e6, 1e6),
    ),
)


def composed(inner: st.SearchStrategy[Policy]) -> st.SearchStrategy[Policy]:
    several = st.lists(inner, min_size=1, max_size=3).map(tuple)
    return st.one_of(
        st.builds(AllOf, policies=several),
        st.builds(AnyOf, policies=several),
        st.builds(FirstSteps, n=st.integers(1, 9), policy=inner, then=inner),
        st.builds(AtMost, share=st.floats(0, 1), policy=inner),
        st.builds(Gate, policy=inner, probability=probabilities),
        st.builds(
            WithinBudget,
            policy=inner,
            cost=st.floats(0, 1e9),
            prices=st.dictionaries(st.sampled_from(["small", "large"]), st.floats(0, 1e3)),
            then=decisions,
        ),
    )


policies = st.recursive(simple, composed, max_leaves=4)
