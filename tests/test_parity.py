"""The forward pass of every slice against transformers' own model of the same weights, fp32."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import NemotronHForCausalLM

from cascade import passes
from cascade.batch import Batch
from cascade.model import ElasticModel
from cascade.weights import ModelWeights
from tests.nested import elastic, parent, prefix, reference_logits

LENGTHS = (1, 7, 127, 128, 129, 300)
WIDTHS = {"small": (16, 8), "medium": (24, 8), "large": (32, 16), "24x16": (24, 16)}
PATTERNS: dict[str, tuple[str, dict[str, Any]]] = {
    "dense layers": ("M-*M-E", {}),
    "every bias": ("ME*M-", {"use_bias": True, "mlp_bias": True}),
    "no conv bias": ("MEM*", {"use_conv_bias": False}),
    "latent experts": ("ME*E", {"moe_latent_size": 16}),
    "routing in groups": (
        "ME*E",
        {"n_routed_experts": 8, "n_group": 4, "topk_group": 2, "routed_scaling_factor": 2.5},
    ),
    "weights not normalised": ("ME*E", {"norm_topk_prob": False}),
    "one group, one kv head": ("M*ME", {"n_groups": 1, "num_key_value_heads": 1}),
    "short window": ("M*ME", {"conv_kernel": 2}),
    "attention first": ("*EM", {}),
}


@pytest.fixture(scope="module")
def source() -> NemotronHForCausalLM:
    return parent("MEM*EME*-")


@pytest.fixture(scope="module")
def model(source: NemotronHForCausalLM) -> ElasticModel:
    return elastic(source)


@pytest.fixture(scope="module")
def text() -> list[int]:
    return torch.randint(0, 64, (320,), generator=torch.Generator().manual_seed(1)).tolist()


@pytest.fixture(scope="module")
def expected(source: NemotronHForCausalLM, text: list[int]) -> dict[str, Tensor]:
    """Logits [320, V] of every slice over the whole text; causal, so any prefix's as well."""
    return {
        name: reference_logits(prefix(source, *widths), text) for name, widths in WIDTHS.items()
    }


def same(mine: Tensor, its: Tensor) -> None:
    torch.testing.assert_close(mine, its, atol=1e-4, rtol=0)


@pytest.mark.parametrize("slice", WIDTHS)
def test_logits_equal_transformers_at_every_length(
    model: ElasticModel, source: NemotronHForCausalLM, text: list[int], slice: str
) -> None:
    """Parent and slices, each against a model of its own built from copied prefixes."""
    alone = prefix(source, *WIDTHS[slice])
    cache = model.cache(max_batch=1, max_length=512, max_draft=8)
    for length in LENGTHS:
        with model.sequence(cache=cache) as seq:
            logits = seq.append(text[:length], slice)
        same(logits, reference_logits(alone, text[:length])[-1])


def test_slices_really_differ(expected: dict[str, Tensor]) -> None:
    for slice in ("small", "medium", "24x16"):
        assert (expected[slice] - expected["large"]).abs().max() > 0.1


@pytest.mark.parametrize("slice", ["small", "large"])
def test_prefill_then_decode_token_by_token(
    model: ElasticModel, text: list[int], expected: dict[str, Tensor], slice: str
) -> None:
    with model.sequence() as seq:
        for length in range(126, 150):
            logits = seq.append(text[:126] if length == 126 else [text[length - 1]], slice)
            same(logits, expected[slice][length - 1])
        assert seq.audit(slice).ok


def test_the_parent_is_a_slice_and_equals_the_model_it_came_from(
    model: ElasticModel, source: NemotronHForCausalLM, text: list[int]
) -> None:
    with model.sequence() as seq:
        same(seq.append(text[:50], model.largest), reference_logits(source, text[:50])[-1])


@pytest.mark.parametrize(("chunk", "max_draft"), [(1, 2), (3, 2), (50, 64), (512, 64), (7, 400)])
def test_uneven_chunks_and_left_over_chunks_change_nothing(
    model: ElasticModel,
    text: list[int],
    expected: dict[str, Tensor],
    monkeypatch: pytest.MonkeyPatch,
    chunk: int,
    max_draft: int,
) -> None:
    monkeypatch.setattr(passes, "PREFILL_CHUNK", chunk)
    cache = model.cache(max_batch=1, max_length=256, max_draft=max_draft)
    with model.sequence(cache=cache) as seq:
        for end in (1, 3, 4, 61, 64, 65, 68, 130):
            same(seq.append(text[seq.length : end], "medium"), expected["medium"][end - 1])
        assert seq.audit("medium").ok


def test_a_pass_over_drafted_ids_equals_transformers_row_by_row(
    model: ElasticModel, source: NemotronHForCausalLM, text: list[int]
) -> None:
    whole = prefix(source, 32, 16)
    with model.sequence() as seq:
        seq.append(text[:100], "large")
        drafted = seq.draft(16, "small")
        table = seq.verify("large")
    same(table, reference_logits(whole, text[:100] + drafted)[99:])


@pytest.mark.parametrize("max_draft", [4, 400])
def test_ragged_rows_equal_each_row_alone(
    model: ElasticModel, text: list[int], expected: dict[str, Tensor], max_draft: int
) -> None:
    lengths = [1, 300, 2, 17, 128, 64]
    cache = model.cache(max_batch=8, max_length=310, max_draft=max_draft)
    rows = [model.sequence(cache=cache) for _ in lengths]
    batch = Batch(rows)
    for logits, n in zip(batch.append([text[:n] for n in lengths], "large"), lengths, strict=True):
        same(logits, expected["large"][n - 1])
    more = [3, 1, 5, 2, 1, 4]
    added = [text[n : n + m] for n, m in zip(lengths, more, strict=True)]
    for logits, n, m in zip(batch.append(added, "large"), lengths, more, strict=True):
        same(logits, expected["large"][n + m - 1])
    for row in rows:
        assert row.audit("large").ok
        row.close()


@pytest.mark.parametrize("name", PATTERNS)
def test_every_kind_of_layer_equals_transformers(name: str, text: list[int]) -> None:
    pattern, sizes = PATTERNS[name]
    source = parent(pattern, **sizes)
    model = elastic(source)
    for slice in ("small", "large"):
        logits = reference_logits(prefix(source, *WIDTHS[slice]), text[:40])
        with model.sequence() as seq:
            same(seq.append(text[:32], slice), logits[31])
            for n in range(32, 40):
                same(seq.append([text[n]], slice), logits[n])
            assert seq.audit(slice).ok


def test_a_slice_is_the_parents_storage_and_no_bytes(model: ElasticModel) -> None:
    whole = dict(model.weights("large").named_tensors())
    for slice in WIDTHS:
        for name, view in model.weights(slice).named_tensors():
            assert storage(view) == storage(whole[name]), name
            assert view.data_ptr() == whole[name].data_ptr(), name
    owned = {storage(t): t.untyped_storage().nbytes() for t in whole.values()}
    assert sum(owned.values()) == sum(t.nbytes for t in whole.values())


def test_narrowing_allocates_no_tensor_memory(model: ElasticModel) -> None:
    whole = model.weights("large")
    with torch.profiler.profile(profile_memory=True) as profile:
        assert isinstance(whole.narrow(16, 8), ModelWeights)
    assert sum(event.self_cpu_memory_usage for event in profile.key_averages()) == 0


def storage(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()
