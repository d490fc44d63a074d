"""The kernels on a processor: fewer and larger operations of PyTorch than the reference's.

Same names and signatures as `reference`, which stays the definition and serves what is not
float32. Nothing is compiled at run time. Small models are bound by the time an operation takes
to start (about a microsecond), so what counts here is their number.

The functions named `*_step` (one token, `cpu_steps`) and `*_span` (a few, `cpu_spans`) come on top:
what `cascade.cpu` runs a row's tokens by.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from cascade.kernels import reference
from cascade.kernels.cpu_spans import (
    attention_span,
    causal_conv_span,
    experts_span,
    gated_norm_span,
    mlp_span,
    rms_norm_span,
    route_span,
    ssm_scan_span,
)
from cascade.kernels.cpu_steps import (
    attention_step,
    causal_conv_step,
    dt_step,
    experts_step,
    gated_norm_step,
    mlp_step,
    rms_norm_step,
    route_step,
    ssm_scan_step,
)

CAPTURABLE = False
SCAN_LIMIT = 128  # tokens up to which the scan is one quadratic form

__all__ = [
    "CAPTURABLE",
    "attention_span",
    "attention_step",
    "causal_conv_span",
    "causal_conv_step",
    "dt_step",
    "experts",
    "experts_span",
    "experts_step",
    "gated_norm",
    "gated_norm_span",
    "gated_norm_step",
    "mlp_span",
    "mlp_step",
    "rms_norm",
    "rms_norm_span",
    "rms_norm_step",
    "route_span",
    "route_step",
    "ssm_commit",
    "ssm_scan",
    "ssm_scan_span",
    "ssm_scan_step",
]


def __getattr__(name: str) -> Any:
    return getattr(reference, name)  # what is not defined here


def rms_norm(x: Tensor, weight: Tensor, eps: float, groups: int = 1) -> Tensor:
    if x.dtype != torch.float32 or groups != 1:
        return reference.rms_norm(x, weight, eps, groups)
    return (x * weight).mul_(_inverse_size(x, eps))


def gated_norm(y: Tensor, gate: Tensor, weight: Tensor, groups: int, eps: float) -> Tensor:
    if y.dtype != torch.float32 or gate.dtype != torch.float32:
        return reference.gated_norm(y, gate, weight, groups, eps)
    gated = F.silu(gate).mul_(y)
    parts = gated.view(*gated.shape[:-1], groups, -1)
    parts.mul_(_inverse_size(parts, eps))
    return gated.mul_(weight)


def _inverse_size(x: Tensor, eps: float) -> Tensor:
    """1 / sqrt(mean(x ** 2) + eps) over the last dimension, which is kept."""
    size: Tensor = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    return size.square_().mul_(1 / x.shape[-1]).add_(eps).rsqrt_()


def ssm_commit(
    state: Tensor,
    scanned: Tensor,
    dt: Tensor,
    decay: Tensor,
    rows: Tensor,
    sources: Tensor,
    counts: Tensor,
) -> None:
    """All layers in one go."""
    if state.dtype != torch.float32 or scanned.dtype != torch.float32:
        return reference.ssm_commit(state, scanned, dt, decay, rows, sources, counts)
    longest = int(counts.max()) if counts.numel() else 0
    if longest == 0:
        return None
    layers, _, heads, head_dim, size = state.shape
    number, inner = len(rows), heads * head_dim
    groups = (scanned.shape[-1] - inner) // size
    entries, steps = scanned[:, sources, :longest], dt[:, sources, :longest]
    used = torch.arange(longest) < counts[:, None]
    if not bool(used.all()):
        # Entries past a row's count may hold anything, NaN of a failed pass included.
        entries = entries.masked_fill(~used[..., None], 0)
        steps = steps.masked_fill(~used[..., None], 0)
    x, write = entries.split_with_sizes((inner, groups * size), -1)
    cumulative = (steps * decay[:, None, None]).cumsum(2)  # [L, R, n, H]
    last = cumulative[:, :, -1:]
    weight = (last - cumulative).exp_().mul_(steps)
    left = x.reshape(*x.shape[:3], heads, head_dim) * weight[..., None]
    pairs = layers * number * groups
    left = left.view(layers * number, longest, groups, -1).transpose(1, 2).flatten(0, 1)
    right = write.reshape(layers * number, longest, groups, size).transpose(1, 2).flatten(0, 1)
    old = state[:, rows].mul_(last.exp().view(layers, number, heads, 1, 1))
    new = torch.baddbmm(old.view(pairs, -1, size), left.transpose(1, 2), right)
    state[:, rows] = new.view_as(old)
    return None


def ssm_scan(
    state: Tensor, scanned: Tensor, dt: Tensor, read: Tensor, decay: Tensor, skip: Tensor
) -> Tensor:
    total, (rows, length, groups, size) = scanned.shape[1], read.shape
    if scanned.dtype != torch.float32 or state.dtype != torch.float32 or total > SCAN_LIMIT:
        return reference.ssm_scan(state, scanned, dt, read, decay, skip)
    heads, head_dim = state.shape[1:3]
    x, write = scanned.split_with_sizes((heads * head_dim, groups * size), -1)
    x = x.reshape(rows, total, heads, head_dim)
    query = read.transpose(1, 2)  # [R, G, T, N]
    cumulative = (dt * decay).cumsum(1).transpose(1, 2)  # [R, H, J + T]
    now = cumulative[:, :, total - length :]
    # What lies in a token's future may overflow; `tril_` drops it unread.
    mix = (now[..., None] - cumulative[:, :, None]).exp_().tril_(total - length)
    seen = query @ write.reshape(rows, total, groups, size).permute(0, 2, 3, 1)
    mix.view(rows, groups, -1, length, total).mul_(seen[:, :, None])
    y = mix @ (x * dt[..., None]).transpose(1, 2)  # [R, H, T, P]
    before = query @ state.view(rows, groups, -1, size).transpose(-1, -2)  # [R, G, T, H / G * P]
    before = before.view(rows, groups, length, -1, head_dim).transpose(2, 3)
    y.view_as(before).addcmul_(before, now.exp().view(rows, groups, -1, length, 1))
    out = y.transpose(1, 2) + skip[:, None] * x[:, total - length :]
    return out.reshape(rows, length, heads * head_dim)


def experts(x: Tensor, up: Tensor, down: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
    """Token by token sorted by expert, so that each expert's rows stand together."""
    if x.dtype != torch.float32:
        return reference.experts(x, up, down, chosen, weights)
    order = chosen.flatten().argsort()
    counts = chosen.flatten().bincount(minlength=len(up)).tolist()
    token = order.div(chosen.shape[1], rounding_mode="floor")
    inputs = x[token]
    inner = x.new_empty(len(order), up.shape[1])
    out = x.new_empty(len(order), x.shape[1])
    used = [(number, size) for number, size in enumerate(counts) if size]
    numbers, sizes = zip(*used, strict=True)
    for number, rows, into in zip(numbers, inputs.split(sizes), inner.split(sizes), strict=True):
        torch.mm(rows, up[number].t(), out=into)
    inner.relu_().square_().mul_(weights.flatten()[order, None])
    for number, rows, into in zip(numbers, inner.split(sizes), out.split(sizes), strict=True):
        torch.mm(rows, down[number].t(), out=into)
    return torch.zeros_like(x).index_add_(0, token, out)
