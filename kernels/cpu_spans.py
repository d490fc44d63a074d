"""A few tokens of one row through a layer, on a processor: verification, short prompts.

The companions of `cpu_steps`, for x [T, n]: NumPy for what is small, PyTorch for the products.
float32 throughout; each function says which of `reference` it equals.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from cascade.kernels.cpu_steps import ONE, Array, Indices, Matrix, silu, squared_relu

LONGEST = 128  # tokens of a span: the scan is quadratic in them
THREADED = 2**18  # multiplications from which on OpenBLAS uses its own threads
FEW = 12  # tokens of an expert up to which they are run one after the other
ROWS = np.arange(LONGEST)[:, None]
FUTURE = np.triu(np.full((LONGEST, LONGEST), -np.inf, np.float32), 1)


def rms_norm_span(x: Array, gain: Array, floor: float) -> Array:
    """`rms_norm` of x [..., n]: gain = weight * sqrt(n), floor = n * eps."""
    sizes = np.einsum("...n,...n->...", x, x)
    sizes += np.float32(floor)
    out: Array = x * gain
    out /= np.sqrt(sizes, out=sizes)[..., None]
    return out


def gated_norm_span(y: Array, gate: Array, gain: Array, groups: int, floor: float) -> Array:
    """`gated_norm` of y [T, n]: gain = weight * sqrt(n / groups), floor = n / groups * eps."""
    tokens, width = y.shape
    gated = (y * silu(gate)).reshape(tokens, groups, -1)
    return rms_norm_span(gated, gain.reshape(groups, -1), floor).reshape(tokens, width)


def causal_conv_span(joined: Array, taps: Array, bias: Array | None) -> Array:
    """`causal_conv` [T, C]: joined [K - 1 + T, C] has the inputs before; taps [K, C]."""
    (count, width), (by_row, by_channel) = taps.shape, joined.strides
    tokens = len(joined) - count + 1
    windows: Array = np.ndarray(
        (tokens, count, width), np.float32, joined, 0, (by_row, by_row, by_channel)
    )
    out: Array = np.einsum("tkc,kc->tc", windows, taps)
    if bias is not None:
        out += bias
    return silu(out)


def ssm_scan_span(
    state: Array, mixed: Array, dt: Array, decay: Array, skip: Array, groups: int
) -> Array:
    """`ssm_scan` of tokens behind a state, which is only read: the quadratic form.

    state: [H, P, N]; mixed: [T, H * P + 2 * G * N], x, B and C; dt: [T, H]; decay, skip: [H].
    Returns y [T, H * P].
    """
    heads, head_dim, size = state.shape
    tokens, inner = len(mixed), heads * head_dim
    x = mixed[:, :inner].reshape(tokens, heads, head_dim)
    parts = mixed[:, inner:].reshape(tokens, 2 * groups, size).transpose(1, 0, 2)
    write, read = parts[:groups], parts[groups:]  # [G, T, N]
    total = (dt * decay).T.cumsum(1, np.float64).astype(np.float32)  # [H, T]
    mix = total[:, :, None] - total[:, None]  # [H, T, T], what is left of an earlier token
    mix += FUTURE[:tokens, :tokens]
    np.exp(mix, out=mix)
    by_group = mix.reshape(groups, -1, tokens, tokens)
    by_group *= matmul(read, write.transpose(0, 2, 1))[:, None]
    y = matmul(mix, (x * dt[:, :, None]).transpose(1, 0, 2))  # [H, T, P]
    # [G, T, H / G * P]
    before = matmul(read, state.reshape(groups, -1, size).transpose(0, 2, 1))
    old = before.reshape(groups, tokens, -1, head_dim).transpose(0, 2, 1, 3)
    y += old.reshape(heads, tokens, head_dim) * np.exp(total)[:, :, None]
    out: Array = y.transpose(1, 0, 2) + x * skip[:, None]
    return out.reshape(tokens, inner)


def matmul(a: Array, b: Array) -> Array:
    """Products [G, n, m] of matrices, by PyTorch where NumPy's library might start threads."""
    if a.shape[1] * a.shape[2] * b.shape[2] < THREADED:
        out: Array = a @ b
        return out
    out = torch.bmm(torch.from_numpy(a), torch.from_numpy(b)).numpy()
    return out


def route_span(
    x: Array,
    router: Matrix,
    bias: Array,
    top_k: int,
    num_groups: int,
    top_groups: int,
    normalise: bool,
    scale: float,
) -> tuple[Indices, Array]:
    """`route`: experts [T, k] and weights [T, k]."""
    scores = np.exp(-router.rows(x))
    scores += ONE
    np.reciprocal(scores, out=scores)
    choice = scores + bias
    if num_groups > 1:
        grouped = choice.reshape(len(x), num_groups, -1)
        best = np.partition(grouped, -2, 2)[:, :, -2:].sum(2)
        others = best.argpartition(-top_groups, 1)[:, :-top_groups]
        grouped[ROWS[: len(x)], others] = -np.inf
    chosen = choice.argpartition(-top_k, 1)[:, -top_k:]
    weights = scores[ROWS[: len(x)], chosen]
    if normalise:
        weights /= weights.sum(1, keepdims=True) + np.float32(1e-20)
    weights *= np.float32(scale)
    return chosen, weights


def experts_span(
    x: Array, up: Sequence[Matrix], down: Sequence[Matrix], chosen: Indices, weights: Array
) -> Array:
    """`experts` [T, H], one expert after the other: each is read once."""
    tokens, top_k = chosen.shape
    order = chosen.ravel().argsort()
    inputs, shares = x[order // top_k], weights.ravel()[order]
    outputs = np.empty((tokens * top_k, x.shape[1]), np.float32)
    begin = 0
    for expert, count in enumerate(np.bincount(chosen.ravel()).tolist()):
        end = begin + count
        if count <= FEW:  # the first brings the expert into cache
            for row in range(begin, end):
                inner = squared_relu(up[expert].vector(inputs[row]))
                inner *= shares[row]
                outputs[row] = down[expert].vector(inner)
        else:
            inner = squared_relu(up[expert].rows(inputs[begin:end]))
            inner *= shares[begin:end, None]
            outputs[begin:end] = down[expert].rows(inner)
        begin = end
    place = np.empty_like(order)
    place[order] = np.arange(len(order))
    out: Array = np.add.reduce(outputs[place].reshape(tokens, top_k, -1), 1)
    return out


def mlp_span(x: Array, up: Matrix, down: Matrix) -> Array:
    """down(relu(up(x)) ** 2)."""
    return down.rows(squared_relu(up.rows(x)))


def attention_span(query: Array, keys: Tensor, values: Tensor, heads: int) -> Array:
    """`attention` of the last T of n positions.

    query: [T, heads * D]; keys, values: [n, kv_heads, D]. Returns [T, heads * D].
    """
    tokens, end = len(query), len(keys)
    q = torch.from_numpy(query).view(1, tokens, heads, -1).transpose(1, 2)
    k, v = keys.transpose(0, 1).unsqueeze(0), values.transpose(0, 1).unsqueeze(0)
    visible = torch.ones(tokens, end, dtype=torch.bool).tril_(end - tokens)
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=visible, enable_gqa=True)
    flat: Array = out.transpose(1, 2).reshape(tokens, -1).numpy()
    return flat
