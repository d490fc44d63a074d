"""Which models the kernels of a short pass can run, and how much at once."""

from __future__ import annotations

from typing import Any

import torch

from cascade.kernels import (
    choose_experts,
    experts_few,
    experts_pairs,
    mamba_decode,
    mamba_step,
    slot_attention,
)
from cascade.kernels.plan import ANY, Limits


def short_pass_obstacle(arch: Any, dtype: torch.dtype, entries: int) -> str | None:
    """Why the kernels cannot run a model, or None where they can.

    arch:    its sizes, by the names of `cascade.architecture.Architecture`
    entries: of a journal row
    """
    shared = mamba_step.shared_bytes(entries, arch.head_dim, arch.state_size)
    group = arch.query_heads // max(arch.kv_heads, 1)
    obstacles = (
        (dtype != torch.bfloat16, f"weights are {dtype}, not bfloat16"),
        (arch.conv_taps != mamba_step.TAPS, f"{arch.conv_taps} taps of the convolution"),
        (arch.state_size not in mamba_decode.SIZES, f"a state size of {arch.state_size}"),
        (
            arch.state_size > mamba_step.largest_size(arch.head_dim),
            f"a state size of {arch.state_size} with a head dim of {arch.head_dim}",
        ),
        (arch.head_dim % 8 or arch.head_dim > 64, f"a Mamba head dim of {arch.head_dim}"),
        (arch.heads % 4, f"{arch.heads} Mamba heads"),
        (shared > mamba_step.LARGEST_SHARED, f"a journal of {entries} entries"),
        (arch.attention_dim not in slot_attention.DIMS, f"a head dim of {arch.attention_dim}"),
        (group > 16, f"{group} heads that share K and V"),
        (arch.experts > choose_experts.LARGEST_EXPERTS, f"{arch.experts} experts"),
        (arch.experts % 4, f"{arch.experts} experts, no multiple of 4"),
        (arch.top_k > choose_experts.LARGEST_CHOICE, f"{arch.top_k} experts a token"),
    )
    return next((text for holds, text in obstacles if holds), None)


def short_pass_limits(arch: Any, depth: int, shared: bool, device: torch.device) -> Limits:
    """How much fits: on a GPU with little shared memory perhaps no more than a few tokens.

    depth: columns of the experts' products, the most of both halves
    shared: whether every layer of experts has one that all tokens share, as few tokens need it
    """
    pairs = experts_pairs.most_together(depth, device.index)
    if pairs or "moe" not in arch.kinds:
        return Limits(pairs, ANY)
    return Limits(pairs, experts_few.most_tokens(arch.top_k) if shared else 0)
