"""Bytes, experts and predictions, counted another way."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from cascade.batch import Batch
from cascade.bench.parity import few_layers
from cascade.bench.predict import Times, predict
from cascade.bench.report import Acceptance, Cost, Decode, Scoring
from cascade.bench.routing import chosen_experts, distinct_a_pass, distinct_a_step
from cascade.bench.traffic import commit_bytes, pass_bytes, weight_bytes
from cascade.kernels import reference
from cascade.model import ElasticModel
from cascade.shapes import random_model


@pytest.fixture(scope="module")
def model() -> ElasticModel:
    return random_model("tiny", dtype=torch.float32)


def test_bytes_of_weights_are_those_of_the_experts_read_and_all_else_once(
    model: ElasticModel,
) -> None:
    weights = model.weights("half")
    expert = (32 * 16 + 16 * 32) * 4  # of the slice: 32 channels, 16 wide
    tensors = {name: t.nbytes for name, t in weights.named_tensors()}
    dense = sum(
        size
        for name, size in tensors.items()
        if name != "embeddings" and not name.endswith(("mixer.up", "mixer.down"))
    )
    assert weight_bytes(weights, 3, [2, 5, 8]) == dense + 15 * expert + 3 * 32 * 4
    assert weight_bytes(weights, 0, [0, 0, 0]) == dense


def test_bytes_of_a_pass_add_states_and_keys_of_every_row(model: ElasticModel) -> None:
    cache = model.cache(max_batch=2, max_length=32, max_draft=4)
    weights, none = model.weights("whole"), [0.0] * 3
    state = cache.state[:, 0].nbytes + cache.window[:, 0].nbytes
    position = cache.keys[:, 0, 0].nbytes + cache.values[:, 0, 0].nbytes
    both = pass_bytes(weights, cache, distinct=none, rows=2, tokens=2, context=10)
    assert both == weight_bytes(weights, 2, none) + 2 * state + (2 * 10 + 2) * position
    assert commit_bytes(cache, 2) == 2 * 2 * state


def test_experts_are_those_that_the_router_chose_for_the_drafted_tokens(
    model: ElasticModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Recorded while the plain route drafts, token by token."""
    plain = ElasticModel(model.config, model.weights("whole"), model.slices, backend="reference")
    seen: list[Tensor] = []
    route = reference.route

    def recording(*arguments: object) -> tuple[Tensor, Tensor]:
        chosen, shares = route(*arguments)  # type: ignore[arg-type]
        seen.append(chosen)
        return chosen, shares

    cache = plain.cache(max_batch=2, max_length=64, max_draft=5)
    rows = Batch([plain.sequence(cache=cache) for _ in range(2)])
    rows.append([[1, 2, 3], [4, 5]], "whole")
    rows.draft([1, 1], "whole")  # known from the prompt's pass
    monkeypatch.setattr(reference, "route", recording)
    rows.draft([4, 4], "whole")
    monkeypatch.undo()
    before = [(row.tokens, row.drafted) for row in rows.sequences]
    chosen = chosen_experts(plain.weights("whole"), cache, rows.sequences)
    assert [(row.tokens, row.drafted) for row in rows.sequences] == before
    assert [tuple(c.shape) for c in chosen] == [(2, 6, 2)] * 3
    steps = [seen[i : i + 3] for i in range(0, len(seen), 3)]  # three MoE layers a step
    assert len(steps) == 4
    for number, layers in enumerate(steps, 1):
        for layer, one in zip(chosen, layers, strict=True):
            assert torch.equal(layer[:, number].sort().values, one.sort().values)
    rows.commit([5, 5])  # what was counted can still be committed
    assert all(row.audit("whole").ok for row in rows.sequences)


def test_distinct_experts_of_steps_and_of_passes() -> None:
    chosen = [torch.tensor([[[0, 1], [2, 3]], [[1, 0], [4, 5]]])]  # [R, T, k]
    assert distinct_a_step(chosen) == [3.0]  # {0, 1} and {2, 3, 4, 5}
    assert distinct_a_pass(chosen) == [6.0]


def test_few_layers_are_one_of_every_kind_and_the_same_storage() -> None:
    model = random_model("tiny", dtype=torch.float32, pattern="MEMM*EE*M")
    few = few_layers(model)
    assert few.arch.kinds == ("mamba", "moe", "attention", "mamba")
    assert list(few.slices) == list(model.slices)
    storage = {t.untyped_storage().data_ptr() for _, t in model.weights("whole").named_tensors()}
    for _, tensor in few.weights("half").named_tensors():
        assert tensor.untyped_storage().data_ptr() in storage


# ---- predictions ----


def times(small: float = 1.0, large: float = 4.0) -> Times:
    """Milliseconds or whatever: a pass over 8 ids costs 8, over 64 it costs 22."""
    decode = [
        Decode(name, batch, 0, 1, Cost(seconds, 1, 1.0), None)
        for name, batch, seconds in (("s", 1, small), ("s", 8, 2 * small), ("l", 1, large))
    ]
    scoring = [
        Scoring("l", tokens, 0, Cost(seconds, 1, 1.0), None)
        for tokens, seconds in ((8, 8.0), (64, 22.0))
    ]
    return Times.of(decode, scoring, "s", "l")


def gains(found: Times, token: float, step: float) -> dict[str, float]:
    prediction = predict(found, Acceptance(token, step, "assumed"), "s", "l")
    return {f"{f.strategy} {f.setting}": f.gain for f in prediction.forecasts}


def test_passes_between_measured_lengths_lie_on_a_line() -> None:
    found = times()
    assert [found.scored(n) for n in (0, 4, 8, 36, 64, 120)] == [4, 6, 8, 15, 22, 36]


def test_gains_are_what_the_formulas_give() -> None:
    table = gains(times(), token=1.0, step=1.0)
    assert table["single l"] == 1 and table["single s"] == 4
    assert table["speculative 8 drafted"] == pytest.approx(4 * 9 / (8 * 1 + 8))
    assert table["stepwise 32 tokens"] == pytest.approx(4 / (1 + 14 / 32))
    assert table["budget half by each"] == pytest.approx(8 / 5)
    assert table["explore 8 drafts"] == pytest.approx(4 / (2 + 8 * 22 / 64))
    assert gains(times(), 0.0, 0.0)["stepwise 32 tokens"] == pytest.approx(4 / (5 + 14 / 32))


@pytest.mark.parametrize("rate", [0.0, 0.3, 0.9])
def test_break_even_is_where_the_gain_is_one(rate: float) -> None:
    prediction = predict(times(), Acceptance(rate, rate, "assumed"), "s", "l")
    at = {f.strategy: f.break_even for f in prediction.forecasts}
    assert at["stepwise"] == pytest.approx((1 + 14 / 32) / 4)
    assert at["speculative"] is not None
    below, above = (
        max(
            f.gain
            for f in predict(
                times(), Acceptance(at["speculative"] + d, 0, "assumed"), "s", "l"
            ).forecasts
            if f.strategy == "speculative"
        )
        for d in (-0.01, 0.01)
    )
    assert below < 1 < above


def test_what_pays_depends_on_acceptance_and_on_the_machine() -> None:
    def best(found: Times, rate: float) -> str:
        return predict(found, Acceptance(rate, rate, "assumed"), "s", "l").best

    assert best(times(), 0.0) == "single l"
    assert best(times(), 0.95) == "stepwise"
    assert best(times(small=3.9), 1.0) != "stepwise"  # a draft that is no faster
    slow = predict(times(small=8.0), Acceptance(1.0, 1.0, "assumed"), "s", "l")
    assert slow.best == "single l"
    assert {f.strategy: f.break_even for f in slow.forecasts}["stepwise"] is None
