"""Which slices a checkpoint holds: where they are declared, what is refused, which one fits."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import NemotronHConfig

from cascade.errors import CheckpointError, RequestError, SliceError
from cascade.shapes import SHAPES
from cascade.slices import (
    Declaration,
    SliceSpec,
    custom_slice,
    elastic_section,
    parse_bytes,
    parse_count,
    resolve_slices,
    slice_for,
)
from tests.checkpoints import write_json
from tests.nested import SIZES, parent, prefix

KINDS = NemotronHConfig._pattern_to_list("MEM*E")


def tiny(**changes: Any) -> NemotronHConfig:
    """A parent of widths 32 x 16."""
    return NemotronHConfig(layers_block_type=KINDS, **SIZES | changes)


def declared(hidden: int, **more: Any) -> dict[str, Any]:
    return {"slices": {f"w{hidden}": {"hidden_size": hidden, "moe_intermediate_size": 8, **more}}}


@pytest.fixture(scope="module")
def nano_v3() -> NemotronHConfig:
    return NemotronHConfig(**SHAPES["30b"]["config"])


def test_argument_comes_before_config_before_file_before_preset(
    tmp_path: Path, nano_v3: NemotronHConfig
) -> None:
    assert list(resolve_slices(nano_v3, None, tmp_path)) == ["12b", "30b"]
    write_json(tmp_path / "elastic.json", declared(64))
    assert list(resolve_slices(nano_v3, None, tmp_path)) == ["w64", "30b"]
    nano_v3.elastic = declared(128)
    assert list(resolve_slices(nano_v3, None, tmp_path)) == ["w128", "30b"]
    assert list(resolve_slices(nano_v3, {"mine": (256, 8)}, tmp_path)) == ["mine", "30b"]
    assert list(resolve_slices(nano_v3, {}, tmp_path)) == ["30b"]
    del nano_v3.elastic


def test_the_preset_counts_what_the_paper_counts(nano_v3: NemotronHConfig) -> None:
    slices = resolve_slices(nano_v3)
    assert slices["30b"].parameters == pytest.approx(31.58e9, rel=1e-3)
    assert slices["12b"].parameters == pytest.approx(12.43e9, rel=1e-3)
    assert 3.2e9 < slices["30b"].active < 3.6e9
    assert 1.8e9 < slices["12b"].active < 2.1e9
    assert all(spec.trained for spec in slices.values())


def test_an_unknown_parent_without_declaration_names_all_places_and_presets(
    tmp_path: Path,
) -> None:
    with pytest.raises(SliceError) as error:
        resolve_slices(tiny(), None, tmp_path)
    for said in ("32 x 16", "elastic.json", str(tmp_path), "2688 x 1856", "12b", "slices={"):
        assert said in str(error.value)


def test_slices_run_from_the_smallest_to_the_parent() -> None:
    given = {"middle": (24, 8), "tiny": (16, 8), "wide": (16, 16)}
    slices = resolve_slices(tiny(), given)
    assert list(slices) == ["tiny", "wide", "middle", "parent"]
    assert slices["parent"].widths == (32, 16) and slices["parent"].trained
    assert not slices["tiny"].trained
    sizes = [spec.parameters for spec in slices.values()]
    assert sizes == sorted(sizes)


@pytest.mark.parametrize(
    "value",
    [
        (16, 8),
        [16, 8],
        {"hidden_size": 16, "moe_intermediate_size": 8},
        Declaration(hidden_size=16, moe_intermediate_size=8),
        custom_slice(tiny(), "16x8"),
    ],
    ids=["pair", "list", "mapping", "declaration", "spec"],
)
def test_a_slice_may_be_declared_in_several_ways(value: Any) -> None:
    spec = resolve_slices(tiny(), {"small": value})["small"]
    assert (spec.name, spec.widths, spec.trained) == ("small", (16, 8), False)


def test_parameters_are_those_of_transformers_own_model_of_the_slice() -> None:
    source = parent("MEM*E-", moe_latent_size=16, use_bias=True, mlp_bias=True)
    for name, spec in resolve_slices(source.config, {"s": (16, 8), "m": (24, 16)}).items():
        model = prefix(source, *spec.widths)
        assert spec.parameters == sum(p.numel() for p in model.parameters()), name
        assert spec.bytes(torch.bfloat16) == 2 * spec.parameters


def test_active_parameters_leave_out_experts_not_reached_and_unread_embeddings() -> None:
    config, spec = tiny(), resolve_slices(tiny(), {"s": (16, 8)})["s"]
    experts = 2 * (config.n_routed_experts - config.num_experts_per_tok) * 2 * 16 * 8
    assert spec.parameters - spec.active == experts + 16 * (config.vocab_size - 1)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ((40, 8), "hidden_size=40 is wider than its parent's 32"),
        ((16, 24), "moe_intermediate_size=24 is wider than its parent's 16"),
        ((20, 8), "hidden_size=20 is not a multiple of 8.*16"),
        ((4, 8), "hidden_size=4 is not a multiple of 8"),
        ((0, 8), "greater than 0"),
        ((-8, 8), "greater than 0"),
        ((16.0, 8), "valid integer"),
        (("16", 8), "valid integer"),
        ({"hidden_size": 16}, "moe_intermediate_size"),
        ({"hidden_size": 16, "moe_intermediate_size": 8, "depth": 2}, "depth"),
        ("16x8", "pair of widths"),
        (16, "pair of widths"),
    ],
    ids=str,
)
def test_widths_that_do_not_fit_are_refused(value: Any, message: str) -> None:
    with pytest.raises(SliceError, match=message):
        resolve_slices(tiny(), {"small": value})


def test_the_parents_own_widths_need_no_multiple() -> None:
    slices = resolve_slices(tiny(hidden_size=36, moe_intermediate_size=12), {"all": (36, 12)})
    assert list(slices) == ["all"]


@pytest.mark.parametrize(
    ("slices", "message"),
    [
        ({"a": (16, 8), "b": (16, 8)}, "twice: 'a' and 'b'"),
        ({"parent": (16, 8)}, "is the parent's name"),
        ({"a b": (16, 8)}, "letters, digits"),
        ({"": (16, 8)}, "letters, digits"),
        ({"24x8": (16, 8)}, "its widths are 16x8"),
    ],
)
def test_names_that_mislead_are_refused(slices: Any, message: str) -> None:
    with pytest.raises(SliceError, match=message):
        resolve_slices(tiny(), slices)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not readable as JSON"),
        ("[]", "valid dictionary"),
        ("{}", "slices: Field required"),
        ('{"slices": {}, "depths": 1}', "depths"),
        ('{"slices": {"a": {"hidden_size": 16}}}', r"slices\.a\.moe_intermediate_size"),
        ('{"slices": {"a": {"hidden_size": "16", "moe_intermediate_size": 8}}}', "got '16'"),
    ],
)
def test_a_broken_elastic_json_is_named(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "elastic.json").write_text(text)
    with pytest.raises(CheckpointError, match=message) as error:
        resolve_slices(tiny(), None, tmp_path)
    assert str(tmp_path / "elastic.json") in str(error.value)


def test_a_broken_section_of_the_config_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"'elastic' section of .*config\.json"):
        resolve_slices(tiny(elastic={"slices": 3}), None, tmp_path)


def test_training_for_a_shared_cache_is_declared(tmp_path: Path) -> None:
    assert elastic_section(tiny(), tmp_path) is None
    write_json(tmp_path / "elastic.json", declared(16) | {"trained_for_shared_cache": True})
    section = elastic_section(tiny(), tmp_path)
    assert section is not None and section.trained_for_shared_cache


@pytest.mark.parametrize("text", ["16x8", " 16 X 8 "])
def test_a_slice_may_be_named_by_its_widths(text: str) -> None:
    spec = custom_slice(tiny(), text)
    assert (spec.name, spec.widths, spec.trained) == ("16x8", (16, 8), False)


@pytest.mark.parametrize("text", ["16", "16x", "ax8", "16x8x4", ""])
def test_what_names_no_widths_is_refused(text: str) -> None:
    with pytest.raises(SliceError, match="'1920x960'"):
        custom_slice(tiny(), text)


@pytest.fixture(scope="module")
def three() -> dict[str, SliceSpec]:
    trained = {"hidden_size": 16, "moe_intermediate_size": 8, "trained": True}
    return resolve_slices(tiny(), {"small": trained, "between": (24, 8)})


def test_the_largest_trained_slice_that_fits(three: dict[str, SliceSpec]) -> None:
    small, between, whole = three.values()
    assert slice_for(three, params=whole.parameters).name == "parent"
    assert slice_for(three, params=whole.parameters - 1).name == "small"  # between: not trained
    assert slice_for(three, params=between.parameters).name == "small"
    assert slice_for(three, memory=2 * whole.parameters).name == "parent"
    assert slice_for(three, memory=2 * whole.parameters, cache_bytes=1).name == "small"
    assert slice_for(three, memory=2 * whole.parameters, bytes_per_parameter=4).name == "small"
    assert slice_for(three, params="1B", memory=2 * small.parameters).name == "small"


def test_no_slice_fits_says_what_the_smallest_needs(three: dict[str, SliceSpec]) -> None:
    with pytest.raises(
        SliceError, match=r"'small', needs .* for params=10 and .* for memory='1KB'"
    ):
        slice_for(three, params=10, memory="1KB")
    with pytest.raises(SliceError, match="no trained slice among between"):
        slice_for({"between": three["between"]}, params="1B")


@pytest.mark.parametrize("limit", [{}, {"params": "much"}, {"params": -1}, {"memory": "1 pound"}])
def test_a_limit_that_is_none_is_refused(three: dict[str, SliceSpec], limit: Any) -> None:
    with pytest.raises(RequestError):
        slice_for(three, **limit)


def test_counts_and_bytes_are_read_exactly() -> None:
    assert parse_count("12.5B") == 12_500_000_000
    assert parse_count("31_577_940_288") == 31_577_940_288
    assert parse_bytes("24GB") == 24 * 10**9
    assert parse_bytes("24 GiB") == 24 * 2**30
    assert parse_bytes(7) == 7
    assert math.isclose(parse_count("0.3M"), 300_000)
