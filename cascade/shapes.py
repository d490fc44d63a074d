"""Models of a named shape with random weights: for speed and memory, without a checkpoint.

The outputs mean nothing. Weights are drawn so that activations keep their size through the layers
and so that routing spreads: `bench` reports the distinct experts that were really read.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from cascade.errors import RequestError, unknown
from cascade.weights import (
    AttentionWeights,
    LayerWeights,
    MambaWeights,
    Mixer,
    MLPWeights,
    ModelWeights,
    MoEWeights,
)

if TYPE_CHECKING:
    from cascade.model import ElasticModel

# NVIDIA Nemotron Nano v3 (arXiv 2605.07182); a small one of the same kind for tests.
SHAPES: Mapping[str, Mapping[str, Any]] = {
    "30b": {
        "config": {
            "vocab_size": 131072,
            "hidden_size": 2688,
            "hybrid_override_pattern": "MEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEMEM*EMEMEMEME",
            "num_attention_heads": 32,
            "num_key_value_heads": 2,
            "head_dim": 128,
            "ssm_state_size": 128,
            "mamba_num_heads": 64,
            "mamba_head_dim": 64,
            "n_groups": 8,
            "conv_kernel": 4,
            "n_routed_experts": 128,
            "num_experts_per_tok": 6,
            "moe_intermediate_size": 1856,
            "moe_shared_expert_intermediate_size": 3712,
            "routed_scaling_factor": 2.5,
            "max_position_embeddings": 262144,
        },
        "slices": {"12b": (1920, 960), "30b": (2688, 1856)},
    },
    "tiny": {
        "config": {
            "vocab_size": 256,
            "hidden_size": 64,
            "hybrid_override_pattern": "MEM*EME",
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 16,
            "ssm_state_size": 16,
            "mamba_num_heads": 8,
            "mamba_head_dim": 8,
            "n_groups": 2,
            "conv_kernel": 4,
            "n_routed_experts": 8,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 32,
            "moe_shared_expert_intermediate_size": 48,
            "max_position_embeddings": 4096,
        },
        "slices": {"half": (32, 16), "whole": (64, 32)},
    },
}


def random_model(
    shape: str,
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.bfloat16,
    seed: int = 0,
    backend: Any = "auto",
    pattern: str | None = None,
) -> ElasticModel:
    """A model of a named shape, weights drawn on the device. Raises RequestError for a new name.

    pattern: other layers than the shape's own, by letter (`M`, `E`, `*`)
    """
    from transformers import NemotronHConfig

    from cascade.model import ElasticModel
    from cascade.slices import resolve_slices

    if shape not in SHAPES:
        raise RequestError(unknown("shape", shape, SHAPES))
    settings = dict(SHAPES[shape]["config"])
    if pattern is not None:
        settings["hybrid_override_pattern"] = pattern
    config = NemotronHConfig(**settings)
    weights = _Drawer(config, torch.device(device), dtype, seed).model()
    slices = resolve_slices(config, SHAPES[shape]["slices"], None)
    return ElasticModel(config, weights, slices, name=f"random {shape}", backend=backend)


class _Drawer:
    """Draws the tensors of one config, scaled by their fan-in."""

    def __init__(self, config: Any, device: torch.device, dtype: torch.dtype, seed: int) -> None:
        self.config, self.device, self.dtype = config, device, dtype
        self.generator = torch.Generator(device).manual_seed(seed)

    def model(self) -> ModelWeights:
        c = self.config
        makers: dict[str, Callable[[], Mixer]] = {
            "linear_attention": self.mamba,
            "full_attention": self.attention,
            "moe": self.moe,
            "mlp": lambda: self.mlp(c.intermediate_size),
        }
        layers = tuple(
            LayerWeights(self.ones(c.hidden_size), makers[kind]()) for kind in c.layers_block_type
        )
        return ModelWeights(
            embeddings=self.normal(c.vocab_size, c.hidden_size, scale=1.0),
            layers=layers,
            norm=self.ones(c.hidden_size),
            head=self.normal(c.vocab_size, c.hidden_size),
        )

    def mamba(self) -> MambaWeights:
        c = self.config
        inner = c.mamba_num_heads * c.mamba_head_dim
        channels = inner + 2 * c.n_groups * c.ssm_state_size
        step = torch.empty(c.mamba_num_heads, device=self.device)
        step.uniform_(c.time_step_min, c.time_step_max, generator=self.generator)
        return MambaWeights(
            in_proj=self.normal(inner + channels + c.mamba_num_heads, c.hidden_size),
            in_bias=None,
            conv=self.normal(channels, c.conv_kernel),
            conv_bias=torch.zeros(channels, device=self.device, dtype=self.dtype),
            dt_bias=(step + torch.log(-torch.expm1(-step))).to(self.dtype),
            decay=-torch.arange(1, c.mamba_num_heads + 1, device=self.device).float(),
            skip=self.ones(c.mamba_num_heads),
            norm=self.ones(inner),
            out_proj=self.normal(c.hidden_size, inner),
            out_bias=None,
        )

    def attention(self) -> AttentionWeights:
        c = self.config
        query, kv = c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim
        return AttentionWeights(
            self.normal(query, c.hidden_size),
            self.normal(kv, c.hidden_size),
            self.normal(kv, c.hidden_size),
            self.normal(c.hidden_size, query),
        )

    def mlp(self, width: int) -> MLPWeights:
        hidden = self.config.hidden_size
        return MLPWeights(self.normal(width, hidden), None, self.normal(hidden, width), None)

    def moe(self) -> MoEWeights:
        c = self.config
        experts, hidden, width = c.n_routed_experts, c.hidden_size, c.moe_intermediate_size
        return MoEWeights(
            router=self.normal(experts, hidden),
            router_bias=torch.zeros(experts, device=self.device),
            up=self.normal(experts, width, hidden),
            down=self.normal(experts, hidden, width),
            shared=self.mlp(c.moe_shared_expert_intermediate_size),
        )

    def normal(self, *shape: int, scale: float | None = None) -> Tensor:
        tensor = torch.empty(shape, device=self.device, dtype=self.dtype)
        std = shape[-1] ** -0.5 if scale is None else scale
        return tensor.normal_(0, std, generator=self.generator)

    def ones(self, size: int) -> Tensor:
        return torch.ones(size, device=self.device, dtype=self.dtype)
