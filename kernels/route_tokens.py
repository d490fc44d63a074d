"""Launcher of route_tokens.cu; for many tokens the same in two steps."""

from __future__ import annotations

from torch import Tensor

from cascade.kernels import choose_experts as choosing
from cascade.kernels.norm_linear import FEW, norm_linear
from cascade.kernels.plan import Plan
from cascade.kernels.skinny_linear import skinny_linear

MOST_PICKS = 512  # as in the .cu: tokens times top_k


def route_tokens(
    x: Tensor,
    norm: Tensor,
    eps: float,
    router: Tensor,
    bias: Tensor,
    counts: Tensor,
    top_k: int,
    normalise: bool,
    scale: float,
    logits: Tensor,
    plan: Plan,
) -> None:
    """The router's logits and the experts that they choose.

    See reference_decode.route_tokens, and the launchers that this one calls for what they refuse.
    """
    settings = logits, bias, counts, top_k, normalise, scale, plan
    if x.shape[0] <= FEW and x.shape[0] * top_k <= MOST_PICKS:
        choice = choosing.arguments(*settings)
        skinny_linear(x, [router], [logits], ["store"], norm, eps=eps, choice=choice)
        return
    norm_linear(x, [router], [logits], ["store"], norm, eps=eps)
    choosing.choose_experts(*settings)
