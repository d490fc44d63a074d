"""Drafting ahead of the host draws what drafting step by step draws."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch

from cascade.batch import Batch
from cascade.decode import FROM_DEVICE, Row, Table
from cascade.errors import NumericalError
from cascade.graphs import GraphRunner
from cascade.kernels.reference import pick_tokens
from cascade.model import ElasticModel
from cascade.sampling import Sampler, SamplingParams
from cascade.shapes import random_model
from tests.nested import elastic, parent

PROMPTS = [[5, 9, 2, 33, 60], [1, 17, 17], [40, 8, 7, 21, 2, 3], [11, 12]]
PARAMS = [
    SamplingParams(temperature=0.7, top_p=0.9, seed=3),
    SamplingParams(),
    SamplingParams(temperature=0.7, top_p=0.9, seed=4),
    SamplingParams(temperature=1.3, top_k=9, min_p=0.05, seed=5),
]


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def model(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> ElasticModel:
    """A model that drafts ahead: on a GPU, or on its route with the kernels in plain PyTorch."""
    if request.param == "cuda":
        return random_model("tiny", device="cuda", dtype=torch.bfloat16)
    model = elastic(parent("M*EM"))
    runner = GraphRunner(model.runner.views, model.arch, model.kernels)  # type: ignore[arg-type]
    monkeypatch.setattr(model, "runner", runner)
    return model


def drafted(model: ElasticModel, params: list[SamplingParams], stops: set[int]) -> object:
    """Two rounds of drafts in a ragged batch, with what they were drawn from."""
    cache = model.cache(max_batch=len(PROMPTS), max_length=64, max_draft=8)
    rows = Batch([model.sequence(cache=cache) for _ in PROMPTS])
    rows.append(PROMPTS, model.largest)
    found, proposals = [], []
    for counts in ([6, 8, 1, 5], [2, 3, 8, 8]):
        found.append(rows.draft(counts, model.smallest, params, until=stops))
        proposals += [p for s in rows.sequences for p in s._proposals]
        kept = [len(ids) - (r % 2) for r, ids in enumerate(found[-1])]
        rows.commit([max(count, 0) for count in kept])
    lengths = [s.length for s in rows.sequences]
    for sequence in rows.sequences:
        sequence.close()
    return found, lengths, proposals


@pytest.mark.parametrize("stops", [set(), {7, 20, 21, 40, 41}])
def test_the_same_ids_from_the_same_distributions(
    model: ElasticModel, stops: set[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    ahead = drafted(model, PARAMS, stops)
    monkeypatch.setattr(GraphRunner, "chain", lambda *arguments: None)
    found, lengths, proposals = drafted(model, PARAMS, stops)  # type: ignore[misc]
    assert len({tuple(row) for row in found[0]}) > 1
    assert ahead[:2] == (found, lengths)  # type: ignore[index]
    for mine, its in zip(ahead[2], proposals, strict=True):  # type: ignore[index]
        assert (mine is None) == (its is None)
        if mine is not None:
            torch.testing.assert_close(mine, its, atol=1e-5, rtol=1e-4)


def test_the_host_waits_for_no_step(model: ElasticModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sampling goes through the chain unless it needs the tokens before."""
    monkeypatch.setattr(GraphRunner, "decode", None)  # what the step by step loop calls
    drafted(model, PARAMS, set())
    with pytest.raises(TypeError):
        drafted(model, [*PARAMS[:3], SamplingParams(repetition_penalty=1.2)], set())


@pytest.fixture
def kept(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """For every pass of one token a row whether its table was on the device as the host knew.

    Whether or not: what is there must be what the pass was asked for.
    """
    found = []
    fill = Table.fill

    def checked(table: Table, rows: Sequence[Row]) -> None:
        if table.length == 1:
            found.append(table._held == table._numbers(rows))
        fill(table, rows)
        assert table.numbers.tolist() == table._numbers(rows)

    monkeypatch.setattr(Table, "fill", checked)
    return found


def test_a_chain_of_one_row_fills_one_table(model: ElasticModel, kept: list[bool]) -> None:
    """A graph's later passes find their table where `pick_tokens` has moved it on."""
    cache = model.cache(max_batch=3, max_length=64, max_draft=8)
    with model.sequence(cache=cache) as sequence:
        sequence.append(PROMPTS[0], model.largest)
        for slice in (model.smallest, model.largest, model.smallest):
            kept.clear()
            sequence.draft(7, slice)
            assert kept == [False] + [True] * (len(kept) - 1) and len(kept) >= 6
            sequence.commit(5)


def test_a_table_is_filled_again_after_a_pass_that_failed() -> None:
    table = Table(3, 1, torch.device("cpu"))
    asked: list[Row] = [(2, 8, 0, [5]), (0, 30, 4, [6])]
    for failed in (False, True, True, False):
        table.fill(asked)
        assert table.starts.tolist() == [*(start for _, start, _, _ in asked), 0]
        numbers = table.numbers.view(-1, 3)
        picked, latest = (torch.zeros(3, dtype=torch.int64) for _ in range(2))
        pick_tokens(torch.zeros(3, 7), picked, latest, table.slots, numbers)
        if not failed:
            table.moved_on(asked)
            assert table.numbers.tolist() == table._held
            asked = [(slot, at + 1, entry + 1, [FROM_DEVICE]) for slot, at, entry, _ in asked]


@pytest.mark.parametrize("stops", [set(), {7, 20, 21, 40, 41}])
def test_tables_are_right_whatever_happens_between_two_passes(
    model: ElasticModel, stops: set[int], kept: list[bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Other slices, commits, rows that drop out, passes that fail, steps outside of a chain."""
    ahead = unsteady(model, stops, monkeypatch)
    assert True in kept and False in kept
    monkeypatch.setattr(GraphRunner, "chain", lambda *arguments: None)
    assert unsteady(model, stops, monkeypatch) == ahead


def unsteady(model: ElasticModel, stops: set[int], patch: pytest.MonkeyPatch) -> list[object]:
    cache = model.cache(max_batch=len(PROMPTS), max_length=96, max_draft=8)
    rows = Batch([model.sequence(cache=cache) for _ in PROMPTS])
    rows.append(PROMPTS, model.largest)
    found: list[object] = []
    turns = [([6, 8, 1, 5], 0), ([3, 3, 3, 3], 1), ([2, 3, 8, 8], 0), ([4, 4, 4, 4], 0)]
    for turn, (counts, slice) in enumerate(turns):
        name = [model.smallest, model.largest][slice]
        with patch.context() as failing:
            failing.setattr(Table, "moved_on", interrupted)  # the pass itself was run
            with pytest.raises(InterruptedError):
                rows.draft(counts, name, until=stops)
        head = model.weights(name).head
        good = head[3].clone()
        head[3] = torch.nan
        with pytest.raises(NumericalError):
            rows.draft(counts, name, until=stops)
        head[3] = good
        drafted = rows.draft(counts, name, until=stops)
        found.append(drafted)
        rows.commit([len(ids) - (r + turn) % 2 for r, ids in enumerate(drafted)])
        if turn == 1:
            rows.draft([1] * len(PROMPTS), name, [SamplingParams(repetition_penalty=1.2)] * 4)
            rows.commit([1] * len(PROMPTS), [9] * len(PROMPTS))
    for sequence in rows.sequences:
        sequence.close()
    return found


def interrupted(*arguments: object) -> None:
    raise InterruptedError


def test_a_draft_in_inference_mode_leaves_graphs_that_are_usable_outside(
    model: ElasticModel,
) -> None:
    cache = model.cache(max_batch=1, max_length=64, max_draft=8)
    with model.sequence(cache=cache) as sequence:
        for mode in (True, False, True):
            with torch.inference_mode(mode), torch.no_grad():
                sequence.append(PROMPTS[0], model.largest)
                for params in (SamplingParams(), PARAMS[0]):
                    sequence.draft(4, model.smallest, params)
                    sequence.commit(3)


def test_logits_that_are_no_numbers_are_refused_at_any_temperature(model: ElasticModel) -> None:
    cache = model.cache(max_batch=1, max_length=32, max_draft=8)
    with model.sequence(cache=cache) as sequence:
        sequence.append(PROMPTS[0], model.largest)
        model.weights(model.largest).head[3] = torch.nan
        for params in (SamplingParams(), SamplingParams(temperature=1.0, seed=1)):
            with pytest.raises(NumericalError, match="not finite"):
                sequence.draft(4, model.smallest, Sampler.of(params))
            assert sequence.tokens == PROMPTS[0] and not sequence.drafted
