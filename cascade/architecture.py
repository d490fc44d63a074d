"""The sizes of a `nemotron_h` model that the forward pass and the cache need.

Only the residual width and the routed expert width differ between slices, and neither is here:
an `Architecture` is the same for all slices of a checkpoint.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch

Kind = Literal["mamba", "attention", "moe", "mlp"]

_KINDS: dict[str, Kind] = {
    "linear_attention": "mamba",
    "mamba": "mamba",
    "full_attention": "attention",
    "attention": "attention",
    "moe": "moe",
    "mlp": "mlp",
}


@dataclass(frozen=True, slots=True)
class Architecture:
    """Sizes shared by all slices. Source: `NemotronHConfig` of transformers."""

    kinds: tuple[Kind, ...]  # one per layer
    vocab_size: int
    max_positions: int
    # Mamba-2
    heads: int
    head_dim: int
    groups: int
    state_size: int
    conv_taps: int
    min_step: float  # lower bound of dt, as transformers' chunked scan applies it
    # attention
    query_heads: int
    kv_heads: int
    attention_dim: int
    # routing
    experts: int
    top_k: int
    expert_groups: int
    top_groups: int
    normalise: bool
    routed_scale: float
    eps: float

    @classmethod
    def from_config(cls, config: Any) -> Architecture:
        """Read a `NemotronHConfig`."""
        return cls(
            kinds=tuple(_KINDS[kind] for kind in config.layers_block_type),
            vocab_size=config.vocab_size,
            max_positions=config.max_position_embeddings,
            heads=config.mamba_num_heads,
            head_dim=config.mamba_head_dim,
            groups=config.n_groups,
            state_size=config.ssm_state_size,
            conv_taps=config.conv_kernel,
            min_step=float(config.time_step_min),
            query_heads=config.num_attention_heads,
            kv_heads=config.num_key_value_heads,
            attention_dim=config.head_dim,
            experts=config.n_routed_experts,
            top_k=config.num_experts_per_tok,
            expert_groups=config.n_group,
            top_groups=config.topk_group,
            normalise=config.norm_topk_prob,
            routed_scale=float(config.routed_scaling_factor),
            eps=config.layer_norm_epsilon,
        )

    @property
    def inner(self) -> int:
        """Channels of x (and of the gate) in a Mamba mixer."""
        return self.heads * self.head_dim

    @property
    def scanned_channels(self) -> int:
        """x and B: what the scan writes into the state."""
        return self.inner + self.groups * self.state_size

    @property
    def conv_channels(self) -> int:
        """x, B and C: what passes the convolution."""
        return self.inner + 2 * self.groups * self.state_size

    @property
    def num_mamba(self) -> int:
        return self.kinds.count("mamba")

    @property
    def num_attention(self) -> int:
        return self.kinds.count("attention")

    def bytes_per_token(self, dtype: torch.dtype) -> int:
        """Bytes of K and V that one token takes, all layers."""
        return 2 * self.num_attention * self.kv_heads * self.attention_dim * dtype.itemsize

    def state_bytes(self, state_dtype: torch.dtype = torch.float32) -> int:
        """Bytes of SSM state of one sequence, all layers, whatever its length."""
        return self.num_mamba * self.inner * self.state_size * state_dtype.itemsize

    def window_bytes(self, dtype: torch.dtype) -> int:
        """Bytes of convolution window of one sequence, all layers."""
        return self.num_mamba * (self.conv_taps - 1) * self.conv_channels * dtype.itemsize

    def journal_bytes(self, entries: int, dtype: torch.dtype) -> int:
        """Bytes of journal that `entries` uncommitted tokens of one sequence take, all layers."""
        channels = self.conv_channels + self.scanned_channels
        return self.num_mamba * entries * (channels * dtype.itemsize + self.heads * 4)

    def slot_bytes(self, length: int, drafted: int, dtype: torch.dtype) -> int:
        """Bytes of a whole slot for `length` tokens with `drafted` of them not committed.

        A sequence takes one, with draft_cache="own" two. States are fp32.
        """
        tokens = length * (self.bytes_per_token(dtype) + 1)  # and a byte of provenance
        journal = self.journal_bytes(drafted + 1, dtype)
        return tokens + self.state_bytes() + self.window_bytes(dtype) + journal
