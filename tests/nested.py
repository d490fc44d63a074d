"""Tiny random nested models built in memory, beside transformers' own model of each slice."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn
from transformers import NemotronHConfig, NemotronHForCausalLM

from cascade.model import ElasticModel
from cascade.slices import resolve_slices
from cascade.weights import (
    AttentionWeights,
    LayerWeights,
    MambaWeights,
    Mixer,
    MLPWeights,
    ModelWeights,
    MoEWeights,
)

SLICES = {"small": (16, 8), "medium": (24, 8), "large": (32, 16)}
SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "ssm_state_size": 8,
    "mamba_num_heads": 4,
    "mamba_head_dim": 8,
    "n_groups": 2,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "moe_shared_expert_intermediate_size": 24,
    "intermediate_size": 24,
    "chunk_size": 128,
    "max_position_embeddings": 1024,
}


def parent(pattern: str, *, seed: int = 0, **sizes: Any) -> NemotronHForCausalLM:
    """transformers' model with weights large enough for its slices to disagree."""
    kinds = NemotronHConfig._pattern_to_list(pattern)
    generator = torch.Generator().manual_seed(seed)
    model = NemotronHForCausalLM(NemotronHConfig(layers_block_type=kinds, **SIZES | sizes)).eval()
    model.requires_grad_(False)
    for name, tensor in model.state_dict().items():
        noise = torch.randn(tensor.shape, generator=generator)
        if name.endswith(("A_log", "D", "dt_bias", "norm.weight", "norm_f.weight")):
            tensor.copy_(tensor + 0.1 * noise)
        elif tensor.dim() == 1:
            tensor.copy_(0.1 * noise)
        elif "conv1d" in name:
            tensor.copy_(0.4 * noise)
        else:
            tensor.copy_(1.5 * noise * tensor.shape[-1] ** -0.5)
    return model


def elastic(
    source: NemotronHForCausalLM, slices: dict[str, tuple[int, int]] | None = None
) -> ElasticModel:
    """The same weights, not copied, as an ElasticModel."""
    config = source.config
    layers = tuple(
        LayerWeights(layer.norm.weight, _mixer(layer.block_type, layer.mixer))
        for layer in source.model.layers
    )
    weights = ModelWeights(
        source.model.embeddings.weight, layers, source.model.norm_f.weight, source.lm_head.weight
    )
    return ElasticModel(config, weights, resolve_slices(config, slices or SLICES, None))


def prefix(source: NemotronHForCausalLM, hidden: int, ffn: int) -> NemotronHForCausalLM:
    """A slice as transformers' own model, from copies of the prefixes of every weight."""
    config = deepcopy(source.config)
    config.hidden_size, config.moe_intermediate_size = hidden, ffn
    model = NemotronHForCausalLM(config).eval()
    model.requires_grad_(False)
    whole = source.state_dict()
    for name, tensor in model.state_dict().items():
        tensor.copy_(whole[name][tuple(slice(n) for n in tensor.shape)])
    return model


def reference_logits(model: NemotronHForCausalLM, ids: list[int]) -> Tensor:
    """[len(ids), V] by transformers, without a cache."""
    return model(torch.tensor([ids]), use_cache=False).logits[0]


def _mixer(kind: str, m: nn.Module) -> Mixer:
    match kind:
        case "linear_attention":
            return MambaWeights(
                m.in_proj.weight,
                m.in_proj.bias,
                m.conv1d.weight[:, 0],
                m.conv1d.bias,
                m.dt_bias,
                -m.A_log.float().exp(),
                m.D,
                m.norm.weight,
                m.out_proj.weight,
                m.out_proj.bias,
            )
        case "full_attention":
            return AttentionWeights(
                m.q_proj.weight, m.k_proj.weight, m.v_proj.weight, m.o_proj.weight
            )
        case "mlp":
            return _mlp(m)
    experts = m.experts.up_proj, m.experts.down_proj
    latent: list[Tensor | None] = []
    for name in ("fc1_latent_proj", "fc2_latent_proj"):
        projection = getattr(m, name, None)
        latent += [getattr(projection, "weight", None), getattr(projection, "bias", None)]
    return MoEWeights(
        m.gate.weight, m.gate.e_score_correction_bias, *experts, _mlp(m.shared_experts), *latent
    )


def _mlp(m: nn.Module) -> MLPWeights:
    return MLPWeights(m.up_proj.weight, m.up_proj.bias, m.down_proj.weight, m.down_proj.bias)
