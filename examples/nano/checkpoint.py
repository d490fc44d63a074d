"""From training parameters to an ordinary `nemotron_h` checkpoint with Hub-style names."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from . import vocabulary
from .network import Nano, Sizes, Widths, shapes

SHARD_BYTES = 10_000_000
FP32 = ("A_log", "mixer.D", "dt_bias", "e_score_correction_bias")


def write(model: Nano, slices: Mapping[str, Widths], directory: Path) -> None:
    """Config, slices, tokenizer and weights (bf16)."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(config(model.sizes), indent=2) + "\n")
    end = vocabulary.IDS[vocabulary.END]
    generation = {"eos_token_id": end, "pad_token_id": vocabulary.IDS[vocabulary.PAD]}
    (directory / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n")
    declared = {
        name: {"hidden_size": h, "moe_intermediate_size": f, "trained": True}
        for name, (h, f) in slices.items()
    }
    elastic = {"slices": declared, "trained_for_shared_cache": True}
    (directory / "elastic.json").write_text(json.dumps(elastic, indent=2) + "\n")
    vocabulary.write(directory)
    _write_shards(tensors(model), directory)


def config(s: Sizes) -> dict[str, Any]:
    """`config.json` as NVIDIA's checkpoints have it."""
    return {
        "architectures": ["NemotronHForCausalLM"],
        "model_type": "nemotron_h",
        "vocab_size": s.vocab,
        "hidden_size": s.hidden,
        "hybrid_override_pattern": s.pattern,
        "num_hidden_layers": len(s.pattern),
        "num_attention_heads": s.query_heads,
        "num_key_value_heads": s.kv_heads,
        "head_dim": s.attention_dim,
        "max_position_embeddings": 1024,
        "ssm_state_size": s.state,
        "mamba_num_heads": s.heads,
        "mamba_head_dim": s.head_dim,
        "n_groups": 1,
        "conv_kernel": s.taps,
        "use_conv_bias": True,
        "chunk_size": 128,
        # Lower bound that transformers puts on dt in prefill alone: small enough never to act.
        "time_step_min": 1e-6,
        "n_routed_experts": s.experts,
        "num_experts_per_tok": s.top_k,
        "n_shared_experts": 1,
        "moe_intermediate_size": s.ffn,
        "moe_shared_expert_intermediate_size": s.shared,
        "routed_scaling_factor": 1.0,
        "norm_topk_prob": True,
        "n_group": 1,
        "topk_group": 1,
        "mlp_hidden_act": "relu2",
        "mamba_hidden_act": "silu",
        "layer_norm_epsilon": s.eps,
        "tie_word_embeddings": False,
        "pad_token_id": vocabulary.IDS[vocabulary.PAD],
        "bos_token_id": vocabulary.IDS[vocabulary.START],
        "eos_token_id": vocabulary.IDS[vocabulary.END],
        "dtype": "bfloat16",
    }


def tensors(model: Nano) -> dict[str, Tensor]:
    """Checkpoint tensors by their Hub-style names."""
    found: dict[str, Tensor] = {}
    for name in shapes(model.sizes):
        value = model.get(name).detach().cpu()
        if name == "lm_head.weight":
            found[name] = value
        elif ".experts." in name:
            for expert, matrix in enumerate(value):
                at = f"backbone.{name}.weight".replace("experts.", f"experts.{expert}.")
                found[at] = matrix
        else:
            found[f"backbone.{name}"] = value[:, None] if name.endswith("conv1d.weight") else value
    for name in _biases(model.sizes):
        found[f"backbone.{name}"] = model.get(name).detach().cpu()
    return {
        name: value.contiguous().float() if name.endswith(FP32) else value.bfloat16().contiguous()
        for name, value in found.items()
    }


def _write_shards(found: Mapping[str, Tensor], directory: Path) -> None:
    shards: list[dict[str, Tensor]] = [{}]
    used = 0
    for name, value in found.items():
        if used + value.nbytes > SHARD_BYTES and shards[-1]:
            shards.append({})
            used = 0
        shards[-1][name] = value.clone()
        used += value.nbytes
    where: dict[str, str] = {}
    for old in directory.glob("model*.safetensors*"):
        old.unlink()
    for number, shard in enumerate(shards, 1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        save_file(shard, directory / file, metadata={"format": "pt"})
        where |= dict.fromkeys(shard, file)
    total = sum(value.nbytes for value in found.values())
    index = {"metadata": {"total_size": total}, "weight_map": where}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index, indent=1) + "\n")


def read(model: Nano, directory: Path) -> None:
    """Take the weights of a checkpoint that `write` has made."""
    found: dict[str, Tensor] = {}
    for file in sorted(directory.glob("model-*.safetensors")):
        found |= load_file(file)
    with torch.no_grad():
        for name, own in tensors(model).items():
            if found[name].shape != own.shape:
                raise SystemExit(
                    f"{name}: {directory} has {tuple(found[name].shape)}, not {tuple(own.shape)}"
                )
        for name in [*shapes(model.sizes), *_biases(model.sizes)]:
            target = model.get(name)
            if name == "lm_head.weight":
                value = found[name]
            elif ".experts." in name:
                parts = [name.replace("experts.", f"experts.{e}.") for e in range(len(target))]
                value = torch.stack([found[f"backbone.{part}.weight"] for part in parts])
            else:
                value = found[f"backbone.{name}"]
            target.copy_(value.reshape(target.shape))


def _biases(sizes: Sizes) -> list[str]:
    """The router's balance biases: buffers, not parameters."""
    layers = [i for i, kind in enumerate(sizes.pattern) if kind == "E"]
    return [f"layers.{i}.mixer.gate.e_score_correction_bias" for i in layers]


def load_parameters(model: Nano, saved: Mapping[str, Tensor]) -> None:
    """Parameters and buffers saved by `state`."""
    with torch.no_grad():
        for name, value in model.state_dict().items():
            value.copy_(saved[f"model.{name}"])


def state(model: Nano) -> dict[str, Tensor]:
    return {f"model.{name}": value for name, value in model.state_dict().items()}
