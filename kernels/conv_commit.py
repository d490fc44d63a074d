"""Launcher of conv_commit.cu."""

from __future__ import annotations

from torch import Tensor

from cascade.kernels import checks
from cascade.kernels.compiler import Kernel

THREADS = 128

_KERNELS = {size: Kernel("conv_commit", f"shift_{size}", 10) for size in (16, 4, 2)}


def conv_commit(
    window: Tensor, inputs: Tensor, rows: Tensor, sources: Tensor, counts: Tensor
) -> None:
    """Shift journalled inputs into the convolution windows: all layers and rows in one launch.

    See reference.conv_commit. A slot whose count is zero is neither read nor written.
    """
    shape = layers, slots, taps, channels = checks.sizes("window", window, "L S K-1 C")
    windows = checks.array("window", window, checks.STORED, shape)
    _, journal_rows, entries, _ = checks.sizes("inputs", inputs, "L S' J C")
    lines = layers, journal_rows, entries, channels
    journal = checks.array("inputs", inputs, (window.dtype,), lines)
    number = rows.numel()
    numbers = (
        checks.index("rows", rows, number),
        checks.index("sources", sources, number),
        checks.index("counts", counts, number),
    )
    checks.aligned("window", windows)
    checks.aligned("inputs", journal)
    device = checks.one_gpu(window, inputs, rows, sources, counts)
    if not (layers and number and entries and taps and channels):
        return
    line = channels * window.element_size()
    unit = checks.unit(line)
    units = line // unit
    _KERNELS[unit].launch(
        device,
        (-(-units // THREADS), number, layers),
        (THREADS, 1, 1),
        (windows, journal, *numbers, slots, journal_rows, entries, taps, units),
    )
