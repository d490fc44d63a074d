"""Launcher of fork_copy.cu."""

from __future__ import annotations

from math import prod

from torch import Tensor

from cascade.kernels import checks
from cascade.kernels.compiler import Kernel

THREADS = 256
CHUNK = 1024  # units a block copies, as in the .cu

_KERNELS = {size: Kernel("fork_copy", f"copy_{size}", 24) for size in (16, 4, 2)}


def fork_copy(
    keys: Tensor,
    values: Tensor,
    window: Tensor,
    state: Tensor,
    source: int,
    targets: Tensor,
    length: int,
) -> None:
    """Copy a slot's first `length` positions, windows and states to all `targets`: one launch.

    See reference.fork_copy.
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
    number = targets.numel()
    target = checks.index("targets", targets, number)
    checks.within("source", source, 0, slots - 1)
    checks.within("length", length, 0, positions)
    for name, address in (("keys", key), ("values", value), ("window", windows), ("state", states)):
        checks.aligned(name, address)
    device = checks.one_gpu(keys, values, window, state, targets)
    line = heads * dim * keys.element_size()
    window_bytes = taps * channels * window.element_size()
    state_bytes = prod(inner) * state.element_size()
    unit = checks.unit(line, window_bytes, state_bytes)
    parts: list[int] = []
    grid = 0
    for address, layers, slot_bytes, copied_bytes in (
        (key, attention_layers, positions * line, length * line),
        (value, attention_layers, positions * line, length * line),
        (windows, mamba_layers, window_bytes, window_bytes),
        (states, mamba_layers, state_bytes, state_bytes),
    ):
        copied = copied_bytes // unit
        chunks = -(-copied // CHUNK)
        grid += chunks * layers
        parts += (address, slot_bytes // unit, copied, chunks, layers)
    if not (grid and number):
        return
    _KERNELS[unit].launch(
        device, (grid, 1, 1), (THREADS, 1, 1), (*parts, target, number, slots, source)
    )
