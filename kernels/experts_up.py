"""The first half of the experts; the choice in the same launch where tokens are few."""

from __future__ import annotations

import torch
from torch import Tensor

from cascade.kernels.choose_experts import choose_experts
from cascade.kernels.experts_few import experts_few, most_tokens
from cascade.kernels.experts_pairs import experts_pairs_up
from cascade.kernels.group_norm import group_norm
from cascade.kernels.norm_linear import norm_linear
from cascade.kernels.plan import Choice, Plan


def experts_up(
    x: Tensor,
    norm: Tensor,
    eps: float,
    choice: Choice,
    up: Tensor,
    plan: Plan,
    inner: Tensor,
    shared_up: Tensor,
    dense: Tensor,
) -> None:
    """See reference_decode.experts_up. bf16; K and all strides must be multiples of 8."""
    if shared_up.shape[0] and x.shape[0] <= most_tokens(choice.top_k):
        experts_few(x, norm, eps, choice, up, plan, inner, shared_up, dense)
        return
    normed = torch.empty_like(x, memory_format=torch.contiguous_format)
    group_norm(x, norm, 1, eps, normed)
    norm_linear(normed, [choice.router, shared_up], [plan.logits, dense], ["store", "relu2"])
    choose_experts(plan.logits, *choice[1:], plan)
    experts_pairs_up(normed, up, plan, inner)
