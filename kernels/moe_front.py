"""Launcher of moe_front.cu; for many tokens the same in two steps."""

from __future__ import annotations

from torch import Tensor

from cascade.kernels import choose_experts as choosing
from cascade.kernels.norm_linear import FEW, norm_linear
from cascade.kernels.plan import Plan
from cascade.kernels.skinny_linear import skinny_linear


def moe_front(
    x: Tensor,
    norm: Tensor,
    eps: float,
    router: Tensor,
    bias: Tensor,
    shared_up: Tensor,
    counts: Tensor,
    top_k: int,
    normalise: bool,
    scale: float,
    logits: Tensor,
    dense: Tensor,
    plan: Plan,
) -> None:
    """The router, the first half of the shared expert, and the choice of the experts.

    See reference_decode.moe_front, and the launchers that this one calls for what they refuse.
    """
    weights, outs = [router, shared_up], [logits, dense]
    if x.shape[0] <= FEW:
        choice = choosing.arguments(logits, bias, counts, top_k, normalise, scale, plan)
        skinny_linear(x, weights, outs, ["store", "relu2"], norm, eps=eps, choice=choice)
        return
    norm_linear(x, weights, outs, ["store", "relu2"], norm, eps=eps)
    choosing.choose_experts(logits, bias, counts, top_k, normalise, scale, plan)
