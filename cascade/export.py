"""Write one slice as an ordinary transformers checkpoint.

The result has the Hub's tensor names and no elastic section, so any reader of `nemotron_h` loads
it; its `elastic.json` names the one slice that it holds, so cascade does as well.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cascade.errors import CheckpointError, RequestError
from cascade.files import CONFIG, INDEX, SINGLE
from cascade.slices import SliceSpec
from cascade.tensors import EMBEDDINGS, FINAL_NORM, HEAD, ROUTED, stored_names
from cascade.weights import AttentionWeights, MambaWeights, Mixer, MLPWeights, ModelWeights

SHARD_BYTES = 5_000_000_000
"""Most bytes of tensors in one file, and most that an export copies at a time."""

GENERATION = "generation_config.json"
ELASTIC = "elastic.json"
_COPIED = (
    "tokenizer*.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template*",
    "additional_chat_templates",
)


def export(
    weights: ModelWeights,
    config: Any,
    spec: SliceSpec,
    directory: str | Path,
    *,
    tokenizer_files_from: Path | None = None,
    overwrite: bool = False,
) -> Path:
    """Write a slice, whole or not at all, and return its directory.

    weights:              the slice's views; copied one shard at a time
    config:               the parent's `NemotronHConfig`; only the two widths change
    tokenizer_files_from: where tokenizer, chat template and generation config are copied from
    overwrite:            replace a checkpoint that is there

    Raises RequestError where the directory is taken, CheckpointError where it cannot be written.
    """
    target = Path(directory).expanduser().resolve()
    _check_target(target, tokenizer_files_from, overwrite)
    with _whole_or_nothing(target) as part:
        _write_tensors(checkpoint_tensors(weights), part)
        _write_config(config, spec, weights.dtype, part)
        only = {
            "hidden_size": spec.hidden_size,
            "moe_intermediate_size": spec.moe_intermediate_size,
            "trained": spec.trained,
        }
        _write_json(part / ELASTIC, {"slices": {spec.name: only}})
        if tokenizer_files_from is not None:
            _copy_files(tokenizer_files_from, part)
        if not (part / GENERATION).exists():
            names = ("bos_token_id", "eos_token_id", "pad_token_id")
            _write_json(part / GENERATION, {name: getattr(config, name, None) for name in names})
    return Path(directory)


def checkpoint_tensors(weights: ModelWeights) -> Iterator[tuple[str, Tensor]]:
    """The Hub's name and the tensor, layer by layer: views, as a checkpoint shapes them.

    The inverse of `checkpoint.assemble`.
    """
    for name, tensor in module_tensors(weights):
        yield from _named(name, tensor)


def module_tensors(weights: ModelWeights) -> Iterator[tuple[str, Tensor]]:
    """The same as transformers' modules name and shape them: experts stacked."""
    yield EMBEDDINGS, weights.embeddings
    for index, layer in enumerate(weights.layers):
        yield f"model.layers.{index}.norm.weight", layer.norm
        for name, tensor in _mixer(layer.mixer):
            if tensor is not None:
                yield f"model.layers.{index}.mixer.{name}", tensor
    yield FINAL_NORM, weights.norm
    yield HEAD, weights.head


def _named(name: str, tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
    if name.endswith(ROUTED):
        yield from zip(stored_names(name, len(tensor)), tensor, strict=True)
    else:
        yield stored_names(name, 0)[0], tensor


def _mixer(m: Mixer) -> Iterator[tuple[str, Tensor | None]]:
    if isinstance(m, MambaWeights):
        yield "in_proj.weight", m.in_proj
        yield "in_proj.bias", m.in_bias
        yield "conv1d.weight", m.conv[:, None]
        yield "conv1d.bias", m.conv_bias
        yield "dt_bias", m.dt_bias
        # Rounded to the dtype that it was read in: exact below float32, one unit off within it.
        yield "A_log", (-m.decay).log().to(m.skip.dtype)
        yield "D", m.skip
        yield "norm.weight", m.norm
        yield "out_proj.weight", m.out_proj
        yield "out_proj.bias", m.out_bias
    elif isinstance(m, AttentionWeights):
        yield "q_proj.weight", m.q_proj
        yield "k_proj.weight", m.k_proj
        yield "v_proj.weight", m.v_proj
        yield "o_proj.weight", m.o_proj
    elif isinstance(m, MLPWeights):
        yield from _mlp("", m)
    else:
        yield "gate.weight", m.router
        yield "gate.e_score_correction_bias", m.router_bias
        yield "experts.up_proj", m.up
        yield "experts.down_proj", m.down
        yield from _mlp("shared_experts.", m.shared)
        yield "fc1_latent_proj.weight", m.latent_in
        yield "fc1_latent_proj.bias", m.latent_in_bias
        yield "fc2_latent_proj.weight", m.latent_out
        yield "fc2_latent_proj.bias", m.latent_out_bias


def _mlp(at: str, m: MLPWeights) -> Iterator[tuple[str, Tensor | None]]:
    yield f"{at}up_proj.weight", m.up
    yield f"{at}up_proj.bias", m.up_bias
    yield f"{at}down_proj.weight", m.down
    yield f"{at}down_proj.bias", m.down_bias


def _write_tensors(tensors: Iterable[tuple[str, Tensor]], directory: Path) -> None:
    """One file, or shards and their index. A tensor wider than a shard gets one of its own."""
    from safetensors.torch import save_file

    files: list[tuple[Path, list[str]]] = []
    total = 0
    for shard in _shards(tensors):
        path = directory / f"shard-{len(files)}.safetensors"
        save_file(shard, path, metadata={"format": "pt"})
        files.append((path, list(shard)))
        total += sum(tensor.nbytes for tensor in shard.values())
    if len(files) == 1:
        files[0][0].rename(directory / SINGLE)
        return
    places: dict[str, str] = {}
    for number, (path, names) in enumerate(files, start=1):
        file = f"model-{number:05d}-of-{len(files):05d}.safetensors"
        path.rename(directory / file)
        places |= dict.fromkeys(names, file)
    _write_json(directory / INDEX, {"metadata": {"total_size": total}, "weight_map": places})


def _shards(tensors: Iterable[tuple[str, Tensor]]) -> Iterator[dict[str, Tensor]]:
    """Contiguous copies on the CPU, at most SHARD_BYTES at a time."""
    shard: dict[str, Tensor] = {}
    used = 0
    for name, tensor in tensors:
        if shard and used + tensor.nbytes > SHARD_BYTES:
            yield shard
            shard, used = {}, 0
        shard[name] = tensor.cpu().contiguous()
        used += tensor.nbytes
    yield shard


def _write_config(config: Any, spec: SliceSpec, dtype: torch.dtype, directory: Path) -> None:
    narrowed = deepcopy(config)
    narrowed.hidden_size, narrowed.moe_intermediate_size = spec.widths
    narrowed.architectures, narrowed.dtype = ["NemotronHForCausalLM"], dtype
    for field in ("elastic", "auto_map"):  # the slices and the code of the parent's directory
        if hasattr(narrowed, field):
            delattr(narrowed, field)
    written = narrowed.to_diff_dict()
    # transformers reads the list of layers, other readers the pattern.
    written["hybrid_override_pattern"] = config.hybrid_override_pattern
    written["num_hidden_layers"] = len(config.layers_block_type)
    _write_json(directory / CONFIG, written)


def _copy_files(source: Path, directory: Path) -> None:
    for pattern in (*_COPIED, GENERATION):
        for path in source.glob(pattern):
            if path.is_dir():
                shutil.copytree(path, directory / path.name)
            else:
                shutil.copyfile(path, directory / path.name)


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _check_target(target: Path, source: Path | None, overwrite: bool) -> None:
    if source is not None and target == source.resolve():
        raise RequestError(f"{target} is the checkpoint that the slice comes from; write elsewhere")
    if not target.exists():
        return
    if not target.is_dir():
        raise RequestError(f"{target} is a file; give a directory")
    if not any(target.iterdir()):
        return
    if not overwrite:
        raise RequestError(f"{target} is not empty; give another directory, or overwrite=True")
    if not (target / CONFIG).is_file():
        raise RequestError(
            f"{target} holds other files and no {CONFIG}; only a checkpoint is overwritten"
        )


@contextmanager
def _whole_or_nothing(target: Path) -> Iterator[Path]:
    """A new directory beside `target` that takes its place if all goes well, else vanishes."""
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        holder = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    except OSError as error:
        raise CheckpointError(f"{target} cannot be written: {error}") from error
    part, old = holder / "new", holder / "old"
    try:
        part.mkdir()
        yield part
        replaced = target.exists()
        if replaced:
            os.replace(target, old)
        try:
            os.replace(part, target)
        except OSError:
            if replaced:
                os.replace(old, target)
            raise
    except OSError as error:
        raise CheckpointError(f"{target} cannot be written: {error}") from error
    finally:
        shutil.rmtree(holder, ignore_errors=True)
