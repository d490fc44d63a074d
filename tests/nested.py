"""Tiny random nested models built in memory, beside transformers' own model of each slice."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import torch
from torch import Tensor
from transformers import NemotronHConfig, NemotronHForCausalLM

from cascade.cache import Cache
from cascade.kernels import Backend
from cascade.model import ElasticModel
from cascade.sequence import Sequence
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
    model = NemotronHForCausalLM(NemotronHConfig(layers_block_type=kinds, **SIZES | sizes))
    model.eval().requires_grad_(False)
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
    source: NemotronHForCausalLM,
    slices: dict[str, tuple[int, int]] | None = None,
    backend: Backend = "auto",
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
    specs = resolve_slices(config, slices or SLICES, None)
    return ElasticModel(config, weights, specs, backend=backend)


def prefix(source: NemotronHForCausalLM, hidden: int, ffn: int) -> NemotronHForCausalLM:
    """A slice as transformers' own model, from copies of the prefixes of every weight."""
    config = deepcopy(source.config)
    config.hidden_size, config.moe_intermediate_size = hidden, ffn
    model = NemotronHForCausalLM(config)
    model.eval().requires_grad_(False)
    whole = source.state_dict()
    for name, tensor in model.state_dict().items():
        tensor.copy_(whole[name][tuple(slice(n) for n in tensor.shape)])
    return model


def reference_logits(model: NemotronHForCausalLM, ids: list[int]) -> Tensor:
    """[len(ids), V] by transformers, without a cache."""
    logits: Tensor = model(torch.tensor([ids]), use_cache=False).logits
    return logits[0]


def _mixer(kind: str, m: Any) -> Mixer:
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


def _mlp(m: Any) -> MLPWeights:
    return MLPWeights(m.up_proj.weight, m.up_proj.bias, m.down_proj.weight, m.down_proj.bias)


class Replay:
    """A fresh sequence whose tokens were run by the given writers, the last one included.

    What a cache with that provenance must hold; `logits` [V] predict the token after the last.
    """

    def __init__(
        self, model: ElasticModel, tokens: list[int], writers: list[str], cache: Cache | None = None
    ) -> None:
        cache = cache or model.cache(max_batch=1, max_length=len(tokens) + 1, max_draft=64)
        self.sequence = model.sequence(cache=cache, consistency="shared")
        # The last token of an `append` is run again by the next one: spans end one token late.
        ends = [i for i in range(1, len(tokens) - 1) if writers[i] != writers[i - 1]]
        for end in ends:
            self.sequence.append(tokens[self.sequence.length : end + 1], writers[end - 1])
        writer = writers[-2] if len(tokens) > 1 else writers[-1]
        self.logits = self.sequence.append(tokens[self.sequence.length :], writer)
        if writer != writers[-1]:
            self.sequence.draft(1, writers[-1])
            self.logits = self.sequence.rows[0]

    def deviation(self, other: Sequence) -> float:
        """The largest of max |other's - mine| / max |mine| over the parts of the cache.

        The last token is in neither.
        """
        mine, its = self.sequence.slot.index, other.slot.index
        end = max(self.sequence.length - 1, 0)
        pairs = [
            (getattr(other.cache, part)[:, its], getattr(self.sequence.cache, part)[:, mine])
            for part in ("keys", "values", "window", "state")
        ]
        pairs[:2] = [(a[:, :end], b[:, :end]) for a, b in pairs[:2]]
        relative = [
            (a - b).abs().max() / b.abs().max().clamp(min=1e-30) for a, b in pairs if b.numel()
        ]
        return float(torch.stack(relative).nan_to_num(nan=torch.inf).max())

    def __enter__(self) -> Replay:
        return self

    def __exit__(self, *exc: object) -> None:
        self.sequence.close()
