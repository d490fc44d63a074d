"""Sampling: filters against transformers' own, blocks against rows, values out of range."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError
from transformers.generation.logits_process import (
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from cascade import SamplingParams
from cascade.kernels import reference
from cascade.sampling import Sampler

V = 12

settings = st.fixed_dictionaries(
    {},
    optional={
        "temperature": st.floats(0.05, 5),
        "top_k": st.integers(-1, V + 3),
        "top_p": st.floats(0.05, 1),
        "min_p": st.floats(0, 0.9),
        "repetition_penalty": st.floats(0.3, 3),
        "presence_penalty": st.floats(-2, 2),
        "frequency_penalty": st.floats(-2, 2),
        "logit_bias": st.dictionaries(st.integers(0, V - 1), st.floats(-5, 5), max_size=3),
        "min_tokens": st.integers(0, 6),
    },
)
ids = st.lists(st.integers(0, V - 1), min_size=1, max_size=8)


def logits(rows: int, seed: int) -> torch.Tensor:
    return 3 * torch.randn(rows, V, generator=torch.Generator().manual_seed(seed))


@given(settings, ids, ids, st.integers(0, 4), st.integers(0, 2**31))
def test_a_block_of_rows_is_what_the_rows_are_one_by_one(
    given: dict, tokens: list[int], drafted: list[int], prompt: int, seed: int
) -> None:
    """History-dependent filters see each position's own history."""
    sampler = Sampler(SamplingParams(**given), 1, min(prompt, len(tokens)), ends=(0, 3))
    table = logits(len(drafted) + 1, seed)
    block = sampler.distributions(table, tokens, drafted)
    for i, row in enumerate(table):
        alone = sampler.distribution(row, [*tokens, *drafted[:i]])
        assert torch.equal(block[i], alone)
    assert torch.allclose(block.sum(-1), torch.ones(len(table)), atol=1e-5)


@given(
    ids,
    st.integers(0, 2**31),
    st.floats(0.1, 3),
    st.integers(1, V),
    st.floats(0.1, 0.99),
    st.floats(0.01, 0.5),
    st.floats(0.5, 2),
)
def test_filters_are_those_of_transformers(
    tokens: list[int],
    seed: int,
    temperature: float,
    top_k: int,
    top_p: float,
    min_p: float,
    penalty: float,
) -> None:
    params = SamplingParams(
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        repetition_penalty=penalty,
    )
    table, history = logits(1, seed), torch.tensor([tokens])
    expected = table
    for warper in (
        RepetitionPenaltyLogitsProcessor(penalty),
        TemperatureLogitsWarper(temperature),
        TopKLogitsWarper(top_k),
        TopPLogitsWarper(top_p),
        MinPLogitsWarper(min_p),
    ):
        expected = warper(history, expected)
    found = Sampler(params).distribution(table[0], tokens)
    wanted = expected.softmax(-1)[0]
    # A token whose mass reaches top_p to the last bit may be on either side.
    assert float((found - wanted).abs().sum()) < 1e-4 or (found > 0).sum() != (wanted > 0).sum()


def test_presence_and_frequency_count_the_output_and_repetition_the_prompt_too() -> None:
    """vLLM's definition: logits - frequency * count - presence * (count > 0)."""
    prompt, written = [1, 2], [2, 5, 5]
    table = logits(1, 7)
    params = SamplingParams(presence_penalty=0.5, frequency_penalty=0.25)
    found = Sampler(params, 0, len(prompt)).adjusted(table, [*prompt, *written])
    expected = table.clone()
    expected[0, 2] -= 0.25 + 0.5
    expected[0, 5] -= 2 * 0.25 + 0.5
    assert torch.allclose(found, expected)
    repeated = SamplingParams(repetition_penalty=2.0)
    found = Sampler(repeated, 0, len(prompt)).adjusted(table, [*prompt, *written])
    changed = (found != table)[0].nonzero().flatten().tolist()
    assert changed == [1, 2, 5]


def test_a_temperature_near_zero_is_greedy_and_not_nan() -> None:
    table = logits(4, 1)
    for temperature in (1e-30, 1e-45, 1e-3):
        probs = Sampler(SamplingParams(temperature=temperature)).distributions(table, [1])
        assert bool(probs.isfinite().all())
        assert torch.equal(probs.argmax(-1), table.argmax(-1))


def test_draws_depend_on_seed_and_position_alone() -> None:
    sampler = Sampler(SamplingParams(temperature=1.0), seed=5)
    probs = sampler.distributions(logits(6, 2), [1])
    together = sampler.draw(probs, 10, reference)
    alone = [sampler.draw(row[None], 10 + i, reference)[0] for i, row in enumerate(probs)]
    assert together == alone
    other = Sampler(SamplingParams(temperature=1.0), seed=6)
    flat = torch.full((200, V), 1 / V)
    assert sampler.draw(flat, 0, reference) != other.draw(flat, 0, reference)


def test_ends_are_held_back_for_as_long_as_asked() -> None:
    sampler = Sampler(SamplingParams(temperature=1.0, min_tokens=2), 0, 3, ends=(4,))
    probs = sampler.distributions(torch.zeros(4, V), [1, 1, 1], [2, 2, 2])
    assert [float(p) > 0 for p in probs[:, 4]] == [False, False, True, True]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"presence_penalty": 2.5}, "presence_penalty"),
        ({"frequency_penalty": -3}, "frequency_penalty"),
        ({"top_k": -2}, "top_k"),
        ({"logit_bias": {1: math.nan}}, "a bias is a number"),
        ({"logit_bias": {1: math.inf}}, "a bias is a number"),
        ({"min_tokens": 5, "max_tokens": 3}, "min_tokens=5 > max_tokens=3"),
        ({"best_of": 2}, "best_of"),
        ({"n": 0}, "n"),
        ({"stop": [""]}, "empty stop string"),
    ],
)
def test_values_out_of_range_are_refused(values: dict, message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        SamplingParams(**values)


def test_other_names_for_the_same() -> None:
    assert SamplingParams(top_k=-1).top_k in (-1, 0)
    assert SamplingParams(max_new_tokens=3) == SamplingParams(max_tokens=3)
    assert SamplingParams(do_sample=True).temperature == 1.0
    assert SamplingParams(stop_strings="x").stop == ("x",)
