"""Loading a checkpoint, refusing a bad one, and writing a slice out again."""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import huggingface_hub
import numpy as np
import pytest
import torch
from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError
from safetensors.torch import load_file, safe_open, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, NemotronHForCausalLM

from cascade import checkpoint, fetch
from cascade import export as export_module
from cascade.checkpoint import assemble
from cascade.config import quiet
from cascade.errors import CheckpointError, RequestError, UnsupportedModel
from cascade.export import checkpoint_tensors
from cascade.model import ElasticModel
from cascade.tensors import tensor_shapes
from tests.checkpoints import (
    PATTERN,
    edit_json,
    read_json,
    reference_model,
    write_json,
    write_nested,
    write_shards,
)
from tests.nested import SLICES, elastic, parent, reference_logits

IDS = [3, 1, 41, 5, 9, 26, 53, 58, 9, 7, 9, 32]
EXPERT = "backbone.layers.1.mixer.experts.2.up_proj.weight"
NORM = "backbone.layers.0.norm.weight"
INDEX = "model.safetensors.index.json"
SHARD = "model-00001-of-00002.safetensors"
OTHER = "model-00002-of-00002.safetensors"


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_nested(tmp_path_factory.mktemp("nested") / "parent")


@pytest.fixture(scope="module")
def model(directory: Path) -> ElasticModel:
    return ElasticModel.from_pretrained(directory, device="cpu")


@pytest.fixture
def copy(directory: Path, tmp_path: Path) -> Path:
    """A checkpoint of one's own to damage."""
    return shutil.copytree(directory, tmp_path / "copy")


def load(path: str | Path, **options: Any) -> checkpoint.LoadedCheckpoint:
    return checkpoint.load(path, device=options.pop("device", "cpu"), **options)


def logits(model: ElasticModel, slice: str) -> torch.Tensor:
    """[V] after IDS."""
    with model.sequence() as seq:
        return seq.append(IDS, slice)


def auto(directory: Path, dtype: torch.dtype = torch.float32) -> NemotronHForCausalLM:
    with quiet():
        return AutoModelForCausalLM.from_pretrained(
            directory, dtype=dtype, local_files_only=True, trust_remote_code=False
        )


def close(mine: torch.Tensor, its: torch.Tensor) -> None:
    torch.testing.assert_close(mine, its, atol=1e-5, rtol=1e-5)


# ---- loading ----


def test_every_slice_of_a_hub_style_directory_equals_transformers(
    model: ElasticModel, directory: Path
) -> None:
    assert {name: spec.widths for name, spec in model.slices.items()} == SLICES
    assert (model.name, model.directory) == ("parent", directory)
    for slice, widths in SLICES.items():
        its = reference_logits(reference_model(directory, widths), IDS)[-1]
        close(logits(model, slice), its)


@pytest.mark.parametrize(
    "layout",
    [
        {"shards": 1},
        {"shards": 5, "elastic": "config"},
        {"hub_names": False, "shards": 1},
        {"dtype": torch.bfloat16},
    ],
    ids=["one file", "five shards", "transformers' names", "bfloat16"],
)
def test_the_layout_of_the_files_does_not_matter(
    model: ElasticModel, tmp_path: Path, layout: dict[str, Any]
) -> None:
    other = ElasticModel.from_pretrained(write_nested(tmp_path, **layout), device="cpu")
    assert list(other.slices) == list(SLICES)
    for name, tensor in other.weights("large").named_tensors():
        mine = dict(model.weights("large").named_tensors())[name]
        if layout.get("dtype") is not None and "decay" in name:
            torch.testing.assert_close(tensor, mine, rtol=0.02, atol=0)
        elif layout.get("dtype") is not None and not name.endswith("router_bias"):
            assert torch.equal(tensor, mine.bfloat16().float()), name
        else:
            assert torch.equal(tensor, mine), name


def test_every_kind_of_tensor_is_taken(tmp_path: Path) -> None:
    sizes = {"use_bias": True, "mlp_bias": True, "moe_latent_size": 16}
    path = write_nested(tmp_path, pattern="M-*E", **sizes)
    mine = ElasticModel.from_pretrained(path, device="cpu")
    torch.manual_seed(0)  # transformers draws dt_bias from the global generator
    theirs = elastic(parent("M-*E", **sizes))
    expected = dict(theirs.weights("large").named_tensors())
    found = dict(mine.weights("large").named_tensors())
    assert found.keys() == expected.keys()
    for name, tensor in found.items():
        assert torch.equal(tensor, expected[name]), name


def test_one_copy_is_resident_and_slices_are_views_of_it(model: ElasticModel) -> None:
    whole = dict(model.weights("large").named_tensors())
    bytes_of = {
        t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in whole.values()
    }
    assert sum(bytes_of.values()) == sum(t.nbytes for t in whole.values()) == model.nbytes
    for slice in SLICES:
        for name, view in model.weights(slice).named_tensors():
            assert view.data_ptr() == whole[name].data_ptr(), name
            assert view.untyped_storage().data_ptr() in bytes_of, name
            assert not view.requires_grad


def test_assembling_allocates_nothing_but_the_decay() -> None:
    source = parent(PATTERN)
    tensors = {name: tensor.detach() for name, tensor in source.state_dict().items()}
    with torch.profiler.profile(profile_memory=True) as profile:
        weights = assemble(source.config, tensors)
    decays = sum(t.nbytes for name, t in weights.named_tensors() if name.endswith("decay"))
    allocated = sum(max(event.self_cpu_memory_usage, 0) for event in profile.key_averages())
    assert allocated <= 2 * decays


@pytest.mark.parametrize(
    ("stored", "asked", "found"),
    [
        ("bfloat16", "auto", torch.float32),
        ("bfloat16", "checkpoint", torch.bfloat16),
        ("float32", "checkpoint", torch.float32),
        ("float32", "bfloat16", torch.bfloat16),
        ("bfloat16", torch.float16, torch.float16),
        ("bfloat16", "torch.float32", torch.float32),
    ],
)
def test_dtypes(tmp_path: Path, stored: str, asked: Any, found: torch.dtype) -> None:
    path = write_nested(tmp_path, pattern="ME", dtype=getattr(torch, stored))
    weights = load(path, dtype=asked).weights
    for name, tensor in weights.named_tensors():
        wide = name.endswith(("decay", "router_bias"))
        assert tensor.dtype == (torch.float32 if wide else found), name


def test_without_a_dtype_in_the_config_the_files_decide(tmp_path: Path) -> None:
    path = write_nested(tmp_path, pattern="ME", dtype=torch.bfloat16)
    edit_json(path / "config.json", dtype=None)
    assert load(path, dtype="checkpoint").weights.dtype == torch.bfloat16


@pytest.mark.parametrize(
    "device_map", ["auto", "cpu", {"": "cpu"}, {"model": "cpu", "lm_head": "cpu"}]
)
def test_a_device_map_of_one_device_is_taken(directory: Path, device_map: Any) -> None:
    if device_map == "auto" and torch.cuda.is_available():
        pytest.skip("there is a GPU to choose")
    found = load(directory, device="auto", device_map=device_map)
    assert found.weights.device == torch.device("cpu")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"device_map": {"model": "cpu", "lm_head": "cuda:0"}}, "one device|0 CUDA devices"),
        ({"device_map": {"model": "cpu", "lm_head": "disk"}}, "'disk'"),
        ({"device": "cuda:99"}, "CUDA devices"),
        ({"device": "gpu"}, "'gpu' is no device"),
        ({"device": "meta"}, "cpu and cuda"),
        ({"dtype": "float8"}, "unknown dtype 'float8'"),
        ({"dtype": "bloat16"}, "did you mean 'bfloat16'"),
        ({"dtype": torch.int8}, "unknown dtype 'int8'"),
    ],
    ids=str,
)
def test_a_place_or_dtype_that_cannot_be_is_refused(
    directory: Path, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(RequestError, match=message):
        load(directory, **options)


def test_a_map_over_two_devices_is_refused(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    for device_map in ("auto", {"model": 0, "lm_head": 1}, {"model": "cuda:1", "lm_head": "cpu"}):
        with pytest.raises(RequestError, match="one copy of the weights, which needs one device"):
            load(directory, device="auto", device_map=device_map)


def test_loading_says_nothing(directory: Path, capfd: pytest.CaptureFixture[str]) -> None:
    from transformers.utils import logging

    before = logging.get_verbosity(), logging.is_progress_bar_enabled()
    load(directory)
    assert capfd.readouterr() == ("", "")
    assert (logging.get_verbosity(), logging.is_progress_bar_enabled()) == before


@pytest.mark.parametrize("trust", [False, True])
def test_code_of_a_checkpoint_is_not_run(copy: Path, tmp_path: Path, trust: bool) -> None:
    edit_json(
        copy / "config.json",
        auto_map={
            "AutoConfig": "evil.NemotronHConfig",
            "AutoModelForCausalLM": "evil.NemotronHForCausalLM",
        },
    )
    (copy / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w').close()\n")
    model = ElasticModel.from_pretrained(copy, device="cpu", trust_remote_code=trust)
    model.export("small", tmp_path / "small")
    assert not (tmp_path / "ran").exists()
    assert "auto_map" not in read_json(tmp_path / "small" / "config.json")


def test_weights_of_token_prediction_heads_are_left_out(copy: Path) -> None:
    shard = copy / SHARD
    tensors = load_file(shard) | {"mtp.layers.0.norm.weight": torch.full((3,), torch.nan)}
    save_file(tensors, shard, metadata={"format": "pt"})
    assert load(copy).weights.hidden == 32


# ---- bad checkpoints ----


def damage(change: Callable[[dict[str, torch.Tensor]], Any]) -> Callable[[Path], None]:
    """Rewrite all tensors after a change of them."""

    def apply(directory: Path) -> None:
        tensors = {}
        for shard in sorted(directory.glob("*.safetensors")):
            tensors |= load_file(shard)
        change(tensors)
        write_shards(directory, tensors, 2)

    return apply


def config(**changes: Any) -> Callable[[Path], None]:
    return lambda directory: edit_json(directory / "config.json", **changes)


def index(**places: str) -> Callable[[Path], None]:
    def apply(directory: Path) -> None:
        found = read_json(directory / INDEX)
        found["weight_map"] |= {"lm_head.weight": places["head"]}
        write_json(directory / INDEX, found)

    return apply


def only_pickles(directory: Path) -> None:
    no_weights(directory)
    (directory / "pytorch_model.bin").write_bytes(b"\x80\x04.")


def no_weights(directory: Path) -> None:
    for path in directory.glob("*.safetensors*"):
        path.unlink()


def cut(count: int) -> Callable[[Path], None]:
    """Drop bytes from the end of a shard, or keep so few from its start."""

    def apply(directory: Path) -> None:
        data = (directory / SHARD).read_bytes()
        (directory / SHARD).write_bytes(data[:count])

    return apply


def header(rewrite: Callable[[bytes], bytes]) -> Callable[[Path], None]:
    """Rewrite the JSON of a shard's header."""

    def apply(directory: Path) -> None:
        data = (directory / SHARD).read_bytes()
        (size,) = struct.unpack("<Q", data[:8])
        text = rewrite(data[8 : 8 + size])
        (directory / SHARD).write_bytes(struct.pack("<Q", len(text)) + text + data[8 + size :])

    return apply


def shifted(text: bytes) -> bytes:
    entries = json.loads(text)
    name = next(name for name in entries if name != "__metadata__")
    entries[name]["data_offsets"][1] += 4
    return json.dumps(entries).encode()


def poison(name: str, value: float) -> Callable[[Path], None]:
    return damage(lambda tensors: tensors[name].view(-1)[-1:].fill_(value))


def quantized(directory: Path) -> None:
    damage(lambda tensors: tensors.update({NORM: tensors[NORM].to(torch.float8_e4m3fn)}))(directory)


BAD: dict[str, tuple[Callable[[Path], Any], type[CheckpointError], str]] = {
    "no directory": (shutil.rmtree, CheckpointError, "no directory '.*copy'"),
    "no config": (lambda d: (d / "config.json").unlink(), CheckpointError, "no config.json; it ho"),
    "config cut": (
        lambda d: (d / "config.json").write_text('{"model_type": '),
        CheckpointError,
        r"config\.json is not readable as JSON",
    ),
    "config a list": (
        lambda d: (d / "config.json").write_text("[]"),
        CheckpointError,
        "holds a list",
    ),
    "config in bytes": (
        lambda d: (d / "config.json").write_bytes(b"\xff\xfe{"),
        CheckpointError,
        "not readable as JSON",
    ),
    "another model": (config(model_type="llama"), UnsupportedModel, "model_type 'llama'"),
    "no model_type": (config(model_type=None), UnsupportedModel, "has no model_type"),
    "wrong type": (config(hidden_size="wide"), CheckpointError, "hidden_size"),
    "unknown layer": (config(hybrid_override_pattern="MEX"), CheckpointError, "KeyError: 'X'"),
    "layer count": (
        config(num_hidden_layers=52),
        CheckpointError,
        "num_hidden_layers=52.*8 layers",
    ),
    "no mamba": (
        config(hybrid_override_pattern="*E-", num_hidden_layers=3),
        UnsupportedModel,
        "no Mamba layer",
    ),
    "zero heads": (config(mamba_num_heads=0), CheckpointError, "mamba_num_heads=0"),
    "head groups": (config(n_groups=3), CheckpointError, "mamba_num_heads=4 .* n_groups=3"),
    "top-k": (config(num_experts_per_tok=5), CheckpointError, "more than n_routed_experts=4"),
    "tied": (config(tie_word_embeddings=True), UnsupportedModel, "tie_word_embeddings=True"),
    "attention bias": (config(attention_bias=True), UnsupportedModel, "attention_bias=True"),
    "window": (config(sliding_window=128), UnsupportedModel, "sliding_window=128"),
    "activation": (config(mlp_hidden_act="silu"), UnsupportedModel, "mlp_hidden_act='silu'"),
    "mamba activation": (config(mamba_hidden_act="gelu"), UnsupportedModel, "'gelu'"),
    "quantization": (
        config(quantization_config={"quant_method": "fp8"}),
        UnsupportedModel,
        "quantized weights",
    ),
    "no weights": (no_weights, CheckpointError, "no weights"),
    "only pickles": (only_pickles, CheckpointError, r"only pickles \(pytorch_model.bin\)"),
    "no index": (lambda d: (d / INDEX).unlink(), CheckpointError, "without an index"),
    "index cut": (lambda d: (d / INDEX).write_text("{"), CheckpointError, "not readable as JSON"),
    "index empty": (lambda d: write_json(d / INDEX, {}), CheckpointError, "no weight_map"),
    "shard missing": (lambda d: (d / SHARD).unlink(), CheckpointError, f"{SHARD}.*incomplete"),
    "shard above": (index(head="../other.safetensors"), CheckpointError, "inside the directory"),
    "shard rooted": (index(head="/etc/x.safetensors"), CheckpointError, "inside the directory"),
    "shard a pickle": (index(head="model.bin"), CheckpointError, "only safetensors"),
    "shard without it": (index(head=OTHER), CheckpointError, f"places lm_head.weight in {OTHER}"),
    "shard empty": (cut(0), CheckpointError, r"\(0 bytes\) is cut short or corrupt"),
    "shard a stub": (cut(300), CheckpointError, r"\(300 bytes\) is cut short or corrupt"),
    "shard cut": (cut(-40), CheckpointError, "cut short or corrupt"),
    "header no JSON": (
        header(lambda text: text.replace(b"{", b"[", 1)),
        CheckpointError,
        "cut short or corrupt",
    ),
    "header offsets": (header(shifted), CheckpointError, "cut short or corrupt"),
    "header length": (
        lambda d: (d / SHARD).write_bytes(b"\xff" * 8 + (d / SHARD).read_bytes()[8:]),
        CheckpointError,
        "cut short or corrupt",
    ),
    "tensor missing": (
        damage(lambda tensors: tensors.pop(NORM)),
        CheckpointError,
        r"lack model\.layers\.0\.norm\.weight",
    ),
    "expert missing": (
        damage(lambda tensors: tensors.pop(EXPERT)),
        CheckpointError,
        r"lack model\.layers\.1\.mixer\.experts\.2\.up_proj\.weight",
    ),
    "tensor unexpected": (
        damage(lambda tensors: tensors.update({"backbone.extra": torch.ones(3)})),
        CheckpointError,
        r"hold model\.extra, unknown",
    ),
    "expert unexpected": (config(n_routed_experts=2), CheckpointError, r"experts\.2\.down_proj"),
    "tensor misshaped": (
        damage(lambda tensors: tensors.update({NORM: torch.ones(24)})),
        CheckpointError,
        r"norm\.weight \[24\] instead of \[32\]",
    ),
    "config wider": (config(hidden_size=40), CheckpointError, r"\[64, 32\] instead of \[64, 40\]"),
    "quantized": (quantized, UnsupportedModel, "F8_E4M3"),
    "nan": (poison(NORM, float("nan")), CheckpointError, f"{NORM} in .*NaN or infinity"),
    "infinity": (poison("lm_head.weight", float("-inf")), CheckpointError, "lm_head.weight in"),
    "nan in an expert": (poison(EXPERT, float("nan")), CheckpointError, f"{EXPERT} in .*of-00002"),
    "decay too wide": (
        poison("backbone.layers.0.mixer.A_log", 100.0),
        CheckpointError,
        "A_log in .*NaN or infinity",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_checkpoint_is_refused_by_name(copy: Path, case: str) -> None:
    spoil, error, message = BAD[case]
    spoil(copy)
    with pytest.raises(error, match=message) as raised:
        load(copy)
    assert type(raised.value) is error


def test_a_number_too_wide_for_the_asked_dtype_is_found(copy: Path) -> None:
    poison("lm_head.weight", 1e6)(copy)
    assert load(copy).weights.head.abs().max() == 1e6
    with pytest.raises(CheckpointError, match=r"lm_head\.weight .* torch\.float16"):
        load(copy, dtype="float16")


def test_a_revision_of_a_directory_is_refused(directory: Path) -> None:
    with pytest.raises(CheckpointError, match="revision='main' is for Hub ids"):
        load(directory, revision="main")


def test_a_file_is_not_a_checkpoint(copy: Path) -> None:
    with pytest.raises(CheckpointError, match="is a file; give the directory"):
        load(copy / "config.json")


def test_bad_files_are_found_before_weights_are_read(
    copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpoint, "_read", lambda *_: pytest.fail("weights were read"))
    for case in ("tensor missing", "shard cut", "activation"):
        BAD[case][0](copy)
        with pytest.raises(CheckpointError):
            load(copy)


# ---- the Hub ----


def hub(monkeypatch: pytest.MonkeyPatch, directory: Path, *faults: Exception) -> list[str]:
    """Stand in for the Hub: raise the faults in turn, then serve `directory`. Returns the calls."""
    calls: list[str] = []
    waiting = list(faults)

    def fetched(repo: str, file: str | None = None, **_: Any) -> str:
        calls.append(file or "snapshot")
        if waiting:
            raise waiting.pop(0)
        return str(directory / file if file else directory)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", fetched)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", fetched)
    monkeypatch.setattr("tenacity.nap.time.sleep", lambda _: None)
    return calls


def status(code: int, kind: type[HfHubHTTPError] = HfHubHTTPError) -> HfHubHTTPError:
    request = httpx.Request("GET", "https://huggingface.co")
    return kind(f"status {code}", response=httpx.Response(code, request=request))


def test_a_hub_id_is_fetched_config_first(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = hub(monkeypatch, directory)
    assert fetch.locate("owner/nested") == (directory, "owner/nested")
    assert calls == ["config.json", "snapshot"]


def test_passing_faults_are_tried_again(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    faults = (httpx.ReadTimeout("slow"), status(503), status(429))
    calls = hub(monkeypatch, directory, *faults)
    assert load("owner/nested").name == "owner/nested"
    assert calls == ["config.json"] * 4 + ["snapshot"]


def test_a_fault_that_stays_is_reported_after_a_few_attempts(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = hub(monkeypatch, directory, *[status(502)] * 9)
    with pytest.raises(CheckpointError, match=r"status 502 \(4 attempts\)"):
        load("owner/nested")
    assert len(calls) == fetch.ATTEMPTS


def test_other_faults_are_not_tried_again(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = hub(monkeypatch, directory, status(404, RepositoryNotFoundError))
    with pytest.raises(CheckpointError, match=r"no directory 'owner/nested' .* no such repository"):
        load("owner/nested")
    assert len(calls) == 1


def test_another_model_of_the_hub_is_refused_before_its_weights_are_fetched(
    copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config(model_type="llama")(copy)
    calls = hub(monkeypatch, copy)
    with pytest.raises(UnsupportedModel, match="llama"):
        load("owner/llama")
    assert calls == ["config.json"]


def test_offline_says_so() -> None:
    with pytest.raises(CheckpointError, match="HF_HUB_OFFLINE is set and the cache"):
        load("owner/never-fetched")


@pytest.mark.parametrize("name", ["nanno", "/no/such/directory", "a/b/c", "../x", ""])
def test_what_can_be_no_hub_id_is_not_looked_for_there(
    name: str, directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = hub(monkeypatch, directory)
    with pytest.raises(CheckpointError, match=r"'nano', a directory, or a Hub id|no config\.json"):
        load(name)
    assert calls == []


# ---- export ----


@pytest.mark.parametrize("slice", ["small", "large", "24x16"])
def test_an_exported_slice_is_the_slice(
    model: ElasticModel, directory: Path, tmp_path: Path, slice: str
) -> None:
    path = model.export(slice, tmp_path / "slice")
    spec = model.slices[slice]
    whole = auto(path)
    assert type(whole) is NemotronHForCausalLM
    close(logits(model, slice), reference_logits(whole, IDS)[-1])
    close(logits(model, slice), reference_logits(reference_model(directory, spec.widths), IDS)[-1])
    again = ElasticModel.from_pretrained(path, device="cpu")
    assert again.slices == {slice: spec}
    close(logits(model, slice), logits(again, slice))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_dtypes_are_written_as_they_are(directory: Path, tmp_path: Path, dtype: Any) -> None:
    model = ElasticModel.from_pretrained(directory, device="cpu", dtype=dtype)
    path = model.export("medium", tmp_path / "slice")
    again = load(path, dtype="checkpoint").weights
    found = dict(again.named_tensors())
    for name, tensor in model.weights("medium").named_tensors():
        assert torch.equal(tensor, found[name]), name


def test_every_kind_of_tensor_is_written(tmp_path: Path) -> None:
    sizes = {"use_bias": True, "mlp_bias": True, "moe_latent_size": 16}
    model = elastic(parent("M-*E", **sizes))  # in memory only: no directory
    path = model.export("medium", tmp_path / "slice")
    close(logits(model, "medium"), reference_logits(auto(path), IDS)[-1])


def test_names_and_shapes_are_those_of_the_config(model: ElasticModel) -> None:
    tensors = dict(checkpoint_tensors(model.weights("medium")))
    expected = tensor_shapes(model.config, *SLICES["medium"])
    assert sum(t.numel() for t in tensors.values()) == sum(map(np.prod, expected.values()))
    assert tensors[EXPERT].shape == (8, 24) and NORM in tensors


def test_a_large_slice_is_written_in_shards(
    model: ElasticModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(export_module, "SHARD_BYTES", 20_000)
    path = model.export("medium", tmp_path / "slice")
    places = read_json(path / INDEX)["weight_map"]
    files = sorted(path.glob("*.safetensors"))
    assert {file.name for file in files} == set(places.values()) and len(files) > 2
    for file in files:
        with safe_open(file, framework="pt") as shard:
            assert {places[name] for name in shard.keys()} == {file.name}  # noqa: SIM118
        assert sum(tensor.nbytes for tensor in load_file(file).values()) <= 20_000
    close(logits(model, "medium"), reference_logits(auto(path), IDS)[-1])


def test_config_keeps_all_but_the_widths_and_tokenizer_files_come_along(
    copy: Path, tmp_path: Path
) -> None:
    edit_json(copy / "config.json", elastic=read_json(copy / "elastic.json"), eos_token_id=11)
    write_json(copy / "generation_config.json", {"eos_token_id": 11, "temperature": 0.5})
    write_tokenizer(copy)
    (copy / "chat_template.jinja").write_text("{{ messages[0]['content'] }}")
    (copy / "setup.py").write_text("")
    path = ElasticModel.from_pretrained(copy, device="cpu").export("small", tmp_path / "slice")
    before, after = read_json(copy / "config.json"), read_json(path / "config.json")
    changed = {key for key in before if before[key] != after.get(key)}
    assert changed == {"hidden_size", "moe_intermediate_size", "elastic"}
    assert (after["hidden_size"], after["moe_intermediate_size"]) == SLICES["small"]
    assert "elastic" not in after
    assert read_json(path / "elastic.json") == {
        "slices": {"small": {"hidden_size": 16, "moe_intermediate_size": 8, "trained": True}}
    }
    assert {file.name for file in path.iterdir()} == {
        "chat_template.jinja",
        "config.json",
        "elastic.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    assert read_json(path / "generation_config.json")["temperature"] == 0.5
    tokenizer = AutoTokenizer.from_pretrained(path, local_files_only=True)
    assert tokenizer.encode("b a") == [1, 0]


def write_tokenizer(directory: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers

    tokenizer = Tokenizer(models.WordLevel({"a": 0, "b": 1}, unk_token="a"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(directory / "tokenizer.json"))
    write_json(directory / "tokenizer_config.json", {"tokenizer_class": "PreTrainedTokenizerFast"})


def test_without_a_generation_config_the_ends_come_from_the_config(
    model: ElasticModel, tmp_path: Path
) -> None:
    path = model.export("small", tmp_path / "slice")
    assert read_json(path / "generation_config.json")["eos_token_id"] == 2


@pytest.mark.parametrize("fault", [OSError(28, "No space left on device"), KeyboardInterrupt()])
@pytest.mark.parametrize("before", ["nothing", "empty", "a checkpoint"])
def test_a_failed_export_leaves_what_was_there(
    model: ElasticModel,
    copy: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    fault: BaseException,
    before: str,
) -> None:
    target = copy if before == "a checkpoint" else tmp_path / "slice"
    if before == "empty":
        target.mkdir()
    there = snapshot(tmp_path)

    def full(*_: Any) -> None:
        raise fault

    monkeypatch.setattr(export_module, "_write_config", full)
    expected = KeyboardInterrupt if isinstance(fault, KeyboardInterrupt) else CheckpointError
    with pytest.raises(expected):
        model.export("small", target, overwrite=True)
    assert snapshot(tmp_path) == there


def test_an_export_that_cannot_take_its_place_puts_the_old_one_back(
    model: ElasticModel, copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    there = snapshot(tmp_path)
    replace = export_module.os.replace

    def refuses(source: Path, target: Path) -> None:
        if Path(source).name == "new":
            raise PermissionError("in use")
        replace(source, target)

    monkeypatch.setattr(export_module.os, "replace", refuses)
    with pytest.raises(CheckpointError, match="cannot be written: in use"):
        model.export("small", copy, overwrite=True)
    assert snapshot(tmp_path) == there


def snapshot(directory: Path) -> dict[str, bytes | None]:
    """Everything below a directory, with its content."""
    return {
        str(path.relative_to(directory)): path.read_bytes() if path.is_file() else None
        for path in directory.rglob("*")
    }


def test_a_directory_that_is_taken_is_refused(model: ElasticModel, tmp_path: Path) -> None:
    target = model.export("small", tmp_path / "slice")
    with pytest.raises(RequestError, match="not empty"):
        model.export("medium", target)
    assert list(ElasticModel.from_pretrained(target, device="cpu").slices) == ["small"]
    model.export("medium", target, overwrite=True)
    assert list(ElasticModel.from_pretrained(target, device="cpu").slices) == ["medium"]
    assert [path.name for path in tmp_path.iterdir()] == ["slice"]


def test_only_a_checkpoint_is_overwritten_and_never_the_parent(
    model: ElasticModel, directory: Path, tmp_path: Path
) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(RequestError, match="only a checkpoint is overwritten"):
        model.export("small", tmp_path, overwrite=True)
    with pytest.raises(RequestError, match="is a file"):
        model.export("small", tmp_path / "thesis.tex", overwrite=True)
    with pytest.raises(RequestError, match="the checkpoint that the slice comes from"):
        model.export("small", directory, overwrite=True)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]
