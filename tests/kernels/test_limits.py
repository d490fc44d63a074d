"""What the kernels of short passes can run, on which GPU, and what happens with the rest."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from cascade.architecture import Architecture
from cascade.batch import Batch
from cascade.graphs import GraphRunner
from cascade.kernels import experts_pairs
from cascade.kernels.limits import short_pass_limits, short_pass_obstacle
from cascade.kernels.plan import Limits
from cascade.shapes import random_model
from tests.nested import elastic, parent

BF16 = torch.bfloat16


@pytest.fixture(scope="module")
def arch() -> Architecture:
    """Of the 30b shape, with one layer of each kind."""
    tiny = random_model("tiny", pattern="M*E").arch
    return replace(
        tiny, heads=64, head_dim=64, groups=8, state_size=128, query_heads=32, attention_dim=128,
        experts=128, top_k=6,
    )  # fmt: skip


def test_the_full_shape_has_no_obstacle(arch: Architecture) -> None:
    assert short_pass_obstacle(arch, BF16, 17) is None


@pytest.mark.parametrize(
    ("change", "dtype", "entries", "said"),
    [
        ({}, torch.float32, 17, "weights are torch.float32"),
        ({}, BF16, 900, "a journal of 900 entries"),
        ({"conv_taps": 3}, BF16, 17, "3 taps"),
        ({"state_size": 48}, BF16, 17, "a state size of 48"),
        ({"head_dim": 128}, BF16, 17, "head dim of 128"),
        ({"attention_dim": 80}, BF16, 17, "a head dim of 80"),
        ({"experts": 512}, BF16, 17, "512 experts"),
        ({"top_k": 33}, BF16, 17, "33 experts a token"),
    ],
)
def test_what_does_not_fit_is_named(
    arch: Architecture, change: dict[str, Any], dtype: torch.dtype, entries: int, said: str
) -> None:
    obstacle = short_pass_obstacle(replace(arch, **change), dtype, entries)
    assert obstacle is not None
    assert said in obstacle


@pytest.mark.parametrize(
    ("kilobytes", "depth", "pairs"),
    [(227, 1920, 32), (227, 2688, 24), (163, 1920, 24), (163, 2688, 16), (99, 1920, 8)],
)
def test_pairs_follow_the_shared_memory_of_the_gpu(
    arch: Architecture, kilobytes: int, depth: int, pairs: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(experts_pairs, "largest_shared", lambda device: kilobytes * 1024)
    limits = short_pass_limits(arch, depth, True, torch.device("cuda", 0))
    assert limits.pairs == pairs
    assert limits.tokens > 1000


def test_little_shared_memory_is_enough_for_few_tokens(
    arch: Architecture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(experts_pairs, "largest_shared", lambda device: 99 * 1024)
    device = torch.device("cuda", 0)
    assert short_pass_limits(arch, 2688, True, device) == (0, 32)
    assert short_pass_limits(replace(arch, top_k=16), 2688, True, device) == (0, 16)
    assert short_pass_limits(arch, 2688, False, device) == (0, 0)
    dense = replace(arch, kinds=("mamba", "attention", "mlp"))
    assert short_pass_limits(dense, 2688, True, device).tokens > 1000


@pytest.mark.gpu
def test_limits_of_this_gpu(arch: Architecture) -> None:
    limits = short_pass_limits(arch, 1920, True, torch.device("cuda", 0))
    assert limits.pairs in (8, 16, 24, 32)


@pytest.mark.parametrize("most", [0, 3])
def test_what_is_more_than_a_pass_takes_runs_all_the_same(
    most: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows beyond the limit go the plain way, and draft what they draft on the other."""
    model = elastic(parent("M*EM"))
    monkeypatch.setattr(model.kernels, "short_pass_limits", lambda *given: Limits(0, most))
    runner = GraphRunner(model.runner.views, model.arch, model.kernels)  # type: ignore[arg-type]

    def drafted() -> list[list[int]]:
        cache = model.cache(max_batch=4, max_length=32, max_draft=8)
        rows = Batch([model.sequence(cache=cache) for _ in range(4)])
        rows.append([[5, 9, 2], [1, 17], [40, 8, 7], [11]], model.largest)
        found = rows.draft([4, 3, 4, 1], model.smallest)
        for sequence in rows.sequences:
            sequence.close()
        return found

    wanted = drafted()
    monkeypatch.setattr(model, "runner", runner)
    assert drafted() == wanted
    decoder = runner.decoder(model.cache(max_batch=4, max_length=32, max_draft=8))
    assert decoder is not None
    assert not decoder.holds(4, 1)
    assert decoder.holds(2, 1) == (most > 0)
