"""One token of one row through a layer, on a processor: the steps that decoding is made of.

In NumPy, whose operations start two to four times faster than PyTorch's: a small model has nothing
else to wait for. Arrays are views of the tensors' own storage, float32 throughout. Letters in
shapes as in `cascade.kernels`; each function says which of `reference` it equals.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

Array: TypeAlias = NDArray[np.float32]
Indices: TypeAlias = NDArray[np.intp]

LARGE = 2**18  # elements from which on a product is worth PyTorch's threads
STREAMED = 2**16  # elements from which on reading a matrix takes longer than a product with it
FEW = 4  # vectors up to which such a matrix is multiplied with one after the other
HEAVY = 2**20  # multiplications from which on oneDNN's product is faster than MKL's
# oneDNN's float32 product, where this torch has it: up to twice as fast as MKL's on AMD, and a
# thousand times slower on a prefix view.
_ONEDNN: Any = getattr(torch.ops.mkldnn, "_linear_pointwise", None)
ZERO, ONE = np.zeros((), np.float32), np.ones((), np.float32)  # faster operands than numbers are


class Matrix:
    """A weight [m, n], possibly a prefix view, and a bias [m]: products with few vectors.

    The weight stays where it is. `vector` takes x [n] to [m], `rows` takes x [T, n] to [T, m].
    """

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        self.weight, self.bias = weight, bias
        self._onednn = _ONEDNN if weight.is_contiguous() else None
        array: Array = weight.numpy()
        self.vector: Callable[[Array], Array] = array.dot
        if weight.numel() >= LARGE:
            self.vector = self._large
        if bias is not None:
            times, added = self.vector, bias.numpy()
            self.vector = lambda x: np.add(times(x), added)

    def rows(self, x: Array) -> Array:
        if len(x) <= FEW and STREAMED <= self.weight.numel() < LARGE:
            return np.stack([self.vector(row) for row in x])  # the first brings it into cache
        tokens = torch.from_numpy(x)
        if self._onednn is not None and tokens.numel() * len(self.weight) >= HEAVY:
            out = self._onednn(tokens, self.weight, self.bias, "none", [], "")
        else:
            out = F.linear(tokens, self.weight, self.bias)
        array: Array = out.numpy()
        return array

    def _large(self, x: Array) -> Array:
        out: Array = torch.mv(self.weight, torch.from_numpy(x)).numpy()
        return out


def rms_norm_step(x: Array, gain: Array, floor: float) -> Array:
    """`rms_norm` of x [n]: gain = weight * sqrt(n), floor = n * eps."""
    out: Array = x * gain
    out *= (float(x.dot(x)) + floor) ** -0.5
    return out


def gated_norm_step(y: Array, gate: Array, gain: Array, groups: int, floor: float) -> Array:
    """`gated_norm` of y [n]: gain = weight * sqrt(n / groups), floor = n / groups * eps.

    Overwrites y.
    """
    y *= silu(gate)
    if groups == 1:
        return rms_norm_step(y, gain, floor)
    parts = y.reshape(groups, -1)
    sizes = np.einsum("gn,gn->g", parts, parts)
    parts *= ((sizes + np.float32(floor)) ** np.float32(-0.5))[:, None]
    return y * gain


def causal_conv_step(joined: Array, taps: Array, bias: Array | None) -> Array:
    """The last output [C] of `causal_conv`: joined [K, C], taps [K, C]."""
    out: Array = np.add.reduce(joined * taps, 0)
    if bias is not None:
        out += bias
    return silu(out)


def silu(x: Array) -> Array:
    out = np.exp(-x)
    out += ONE
    return np.divide(x, out, out=out)


def ssm_scan_step(
    state: Array, mixed: Array, dt: Array, decay: Array, skip: Array, groups: int
) -> Array:
    """`ssm_scan` of one token, and `ssm_commit` of it: `state` is advanced in place.

    state: [H, P, N]; mixed: [H * P + 2 * G * N], x, B and C; dt, decay, skip: [H].
    Returns y [H * P].
    """
    heads, head_dim, size = state.shape
    inner, written = heads * head_dim, heads * head_dim + groups * size
    x = mixed[:inner].reshape(heads, head_dim)
    by_head = state.reshape(heads, head_dim * size)
    by_head *= np.exp(dt * decay)[:, None]
    y: Array = x * skip[:, None]
    for into, new, out, write, read in zip(
        state.reshape(groups, inner // groups, size),
        (x * dt[:, None]).reshape(groups, inner // groups, 1),
        y.reshape(groups, inner // groups),
        mixed[inner:written].reshape(groups, 1, size),
        mixed[written:].reshape(groups, size),
        strict=True,
    ):
        into += new.dot(write)
        out += into.dot(read)
    return y.reshape(inner)


def dt_step(step: Array, bias: Array, least: float) -> Array:
    """The step sizes [H] of one token: softplus(step + bias), at least `least`."""
    out: Array = np.logaddexp(ZERO, step + bias)
    return np.maximum(out, least, out=out)


def route_step(
    x: Array,
    router: Matrix,
    bias: Array,
    top_k: int,
    num_groups: int,
    top_groups: int,
    normalise: bool,
    scale: float,
) -> list[tuple[int, float]]:
    """`route` of one token: (expert, weight), k of them."""
    scores = np.exp(-router.vector(x))
    scores += ONE
    np.reciprocal(scores, out=scores)
    choice = scores + bias
    if num_groups > 1:
        grouped = choice.reshape(num_groups, -1)
        best = np.partition(grouped, -2, 1)[:, -2:].sum(1)
        grouped[best.argpartition(-top_groups)[:-top_groups]] = -np.inf
    chosen = choice.argpartition(-top_k)[-top_k:]
    shares = scores[chosen].tolist()
    if normalise:
        scale /= sum(shares) + 1e-20
    return [(expert, share * scale) for expert, share in zip(chosen.tolist(), shares, strict=True)]


def experts_step(
    x: Array, up: Sequence[Matrix], down: Sequence[Matrix], picks: Sequence[tuple[int, float]]
) -> Array:
    """`experts` of one token: `up` and `down` hold one matrix an expert, picks (expert, weight)."""
    out: Array | None = None
    for expert, share in picks:
        inner = squared_relu(up[expert].vector(x))
        inner *= share
        part = down[expert].vector(inner)
        out = part if out is None else np.add(out, part, out=out)
    return np.zeros_like(x) if out is None else out


def mlp_step(x: Array, up: Matrix, down: Matrix) -> Array:
    """down(relu(up(x)) ** 2) of one token."""
    return down.vector(squared_relu(up.vector(x)))


def squared_relu(x: Array) -> Array:
    """relu(x) ** 2, in place."""
    np.maximum(x, ZERO, out=x)
    return np.multiply(x, x, out=x)


def attention_step(query: Array, keys: Tensor, values: Tensor, heads: int) -> Array:
    """`attention` of one token over all positions given.

    query: [heads * D]; keys, values: [n, kv_heads, D]. Returns [heads * D].
    """
    q = torch.from_numpy(query).view(1, heads, 1, -1)
    k, v = keys.transpose(0, 1).unsqueeze(0), values.transpose(0, 1).unsqueeze(0)
    out: Array = F.scaled_dot_product_attention(q, k, v, enable_gqa=True).view(-1).numpy()
    return out
