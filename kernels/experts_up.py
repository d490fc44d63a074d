"""The first half of the experts: the shared one in the same launch for few tokens, apart for more."""

from __future__ import annotations

from torch import Tensor

from cascade.kernels.experts_product import SHARED_WIDTHS, experts_pairs_up
from cascade.kernels.norm_linear import norm_linear
from cascade.kernels.plan import Plan


def experts_up(
    x: Tensor,
    norm: Tensor,
    eps: float,
    up: Tensor,
    plan: Plan,
    inner: Tensor,
    shared_up: Tensor,
    dense: Tensor,
) -> None:
    """See reference_decode.experts_up. bf16; K and all strides must be multiples of 8."""
    if x.shape[0] <= SHARED_WIDTHS[-1]:
        experts_pairs_up(x, norm, eps, up, plan, inner, shared_up, dense)
        return
    norm_linear(x, [shared_up], [dense], ["relu2"], norm, eps=eps)
    experts_pairs_up(x, norm, eps, up, plan, inner)
