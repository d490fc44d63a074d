"""Launcher of cache_digest.cu."""

from __future__ import annotations

from math import prod

from torch import Tensor

from cascade.kernels import checks
from cascade.kernels.compiler import Kernel

THREADS = 256
SHARE = 16 * 1024  # elements of a state that one block digests, about

_ATTENTION = Kernel("cache_digest", "attention_digest", 10)
_RECURRENT = Kernel("cache_digest", "recurrent_digest", 9)


def cache_digest(
    keys: Tensor,
    values: Tensor,
    window: Tensor,
    state: Tensor,
    rows: Tensor,
    lengths: Tensor,
    block: int = 64,
) -> tuple[Tensor, Tensor]:
    """64-bit digests (attention [La, R, ceil(M / block)], recurrent [Lm, R]) of slots.

    See reference.cache_digest; equal to it bit for bit. Two launches and no wait: the digests are
    allocated by torch, which a CUDA graph's capture allows.
    """
    shape = attention_layers, slots, positions, heads, dim = checks.sizes(
        "keys", keys, "La S M heads D"
    )
    key = checks.array("keys", keys, checks.STORED, shape)
    value = checks.array("values", values, (keys.dtype,), shape)
    mamba_layers, _, taps, channels = checks.sizes("window", window, "Lm S K-1 C")
    windows = checks.array("window", window, checks.STORED, (mamba_layers, slots, taps, channels))
    _, _, *inner = checks.sizes("state", state, "Lm S H P N")
    states = checks.array("state", state, checks.STORED, (mamba_layers, slots, *inner))
    number = rows.numel()
    row = checks.index("rows", rows, number)
    length = checks.index("lengths", lengths, number)
    checks.within("block", block, 1, 1 << 31)
    device = checks.one_gpu(keys, values, window, state, rows, lengths)
    blocks = -(-positions // block)
    attention = rows.new_empty((attention_layers, number, blocks))
    recurrent = rows.new_zeros((mamba_layers, number))
    if attention.numel():
        _ATTENTION.launch(
            device,
            (blocks, number, attention_layers),
            (THREADS, 1, 1),
            (
                attention.data_ptr(),
                key,
                value,
                row,
                length,
                slots,
                positions,
                heads * dim,
                block,
                keys.element_size(),
            ),
        )
    if recurrent.numel():
        window_width = taps * channels
        state_width = prod(inner)
        _RECURRENT.launch(
            device,
            (max(1, -(-state_width // SHARE)), number, mamba_layers),
            (THREADS, 1, 1),
            (
                recurrent.data_ptr(),
                windows,
                states,
                row,
                slots,
                window_width,
                state_width,
                window.element_size(),
                state.element_size(),
            ),
        )
    return attention, recurrent
