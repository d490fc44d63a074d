"""The second half of the experts: added up at once for few tokens, pair by pair for more."""

from __future__ import annotations

import torch
from torch import Tensor

from cascade.kernels.combine_pairs import combine_pairs
from cascade.kernels.experts_pairs import experts_pairs_down
from cascade.kernels.experts_sum import experts_sum
from cascade.kernels.plan import FEW, Plan


def experts_down(
    x: Tensor,
    inner: Tensor,
    down: Tensor,
    plan: Plan,
    shared_inner: Tensor,
    shared_down: Tensor,
) -> None:
    """See reference_decode.experts_down. bf16; F, Fs, K and all strides must be multiples of 8."""
    if x.shape[0] <= FEW:
        experts_sum(x, inner, down, plan, shared_inner, shared_down)
        return
    pairs = torch.empty(inner.shape[0], down.shape[1], dtype=torch.float32, device=x.device)
    experts_pairs_down(inner, down, plan, pairs)  # first: it may begin while the first half ends
    torch.addmm(x, shared_inner, shared_down.T, out=x)
    combine_pairs(x, pairs, plan.places, plan.shares)
