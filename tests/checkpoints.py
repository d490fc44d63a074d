"""Tiny random nested checkpoints on disk, in the format that NVIDIA's have on the Hub."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import NemotronHForCausalLM

from cascade.config import quiet
from cascade.tensors import ROUTER_BIAS, stored_names
from tests.nested import SLICES, parent, prefix

PATTERN = "MEM*EME-"


def write_nested(
    directory: Path,
    *,
    pattern: str = PATTERN,
    seed: int = 0,
    hub_names: bool = True,
    shards: int = 2,
    elastic: bool | Literal["config"] = True,
    dtype: torch.dtype = torch.float32,
    **sizes: Any,
) -> Path:
    """Write config, weights and slices; returns the directory.

    hub_names: each expert by itself under `backbone.`, or transformers' own stacked names
    shards:    files of weights; above one there is an index
    elastic:   declare slices in elastic.json, not at all, or in the config
    """
    directory.mkdir(parents=True, exist_ok=True)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)  # transformers draws dt_bias from the global generator
        source = parent(pattern, seed=seed, **{"chunk_size": 16} | sizes)
    config = source.config.to_diff_dict() | {
        "architectures": ["NemotronHForCausalLM"],
        "hybrid_override_pattern": pattern,
        "num_hidden_layers": len(pattern),
        "dtype": str(dtype).removeprefix("torch."),
    }
    del config["layers_block_type"]  # transformers' own spelling of the pattern
    slices = {
        "slices": {
            name: {"hidden_size": h, "moe_intermediate_size": f, "trained": True}
            for name, (h, f) in SLICES.items()
        }
    }
    if elastic == "config":
        config["elastic"] = slices
    elif elastic:
        write_json(directory / "elastic.json", slices)
    write_json(directory / "config.json", config)

    tensors: dict[str, Tensor] = {}
    for name, tensor in source.state_dict().items():
        value = tensor if name.endswith(ROUTER_BIAS) else tensor.to(dtype)
        names = stored_names(name, len(tensor)) if hub_names else [name]
        values = list(value) if len(names) > 1 else [value]
        tensors |= {at: part.clone() for at, part in zip(names, values, strict=True)}
    write_shards(directory, tensors, shards)
    return directory


def write_shards(directory: Path, tensors: dict[str, Tensor], shards: int) -> None:
    """One file, or `shards` files and their index."""
    names = list(tensors)
    places: dict[str, str] = {}
    for shard in range(shards):
        file = f"model-{shard + 1:05d}-of-{shards:05d}.safetensors"
        if shards == 1:
            file = "model.safetensors"
        held = names[shard::shards]
        save_file({n: tensors[n] for n in held}, directory / file, metadata={"format": "pt"})
        places |= dict.fromkeys(held, file)
    if shards > 1:
        total = sum(tensor.nbytes for tensor in tensors.values())
        index = {"metadata": {"total_size": total}, "weight_map": places}
        write_json(directory / "model.safetensors.index.json", index)


def write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value), encoding="utf-8")


def read_json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def edit_json(path: Path, **changes: Any) -> None:
    """Set fields of a JSON file."""
    write_json(path, read_json(path) | changes)


def reference_model(
    directory: Path, widths: tuple[int, int], dtype: torch.dtype = torch.float32
) -> NemotronHForCausalLM:
    """A slice as transformers' own model, from copies of the prefixes of what it loads itself."""
    with quiet():
        whole = NemotronHForCausalLM.from_pretrained(directory, dtype=dtype, local_files_only=True)
    return prefix(whole, *widths).to(dtype)
