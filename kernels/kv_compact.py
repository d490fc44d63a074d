"""Launcher of kv_compact.cu."""

from __future__ import annotations

from torch import Tensor

from cascade.kernels import checks
from cascade.kernels.compiler import Kernel

COLUMNS, LINES = 32, 8  # a block's shape, as in the .cu

_KERNELS = {size: Kernel("kv_compact", f"compact_{size}", 9) for size in (16, 4, 2)}


def kv_compact(keys: Tensor, values: Tensor, rows: Tensor, starts: Tensor, kept: Tensor) -> None:
    """Move accepted positions together, keys and values of all layers in one launch.

    See reference.kv_compact. Source and target ranges may overlap; a position that stays where it
    is is not touched.
    """
    shape = layers, slots, positions, heads, dim = checks.sizes("keys", keys, "L S M heads D")
    key = checks.array("keys", keys, checks.STORED, shape)
    value = checks.array("values", values, (keys.dtype,), shape)
    number = rows.numel()
    _, width = checks.sizes("kept", kept, "R X")
    numbers = (
        checks.index("rows", rows, number),
        checks.index("starts", starts, number),
        checks.array("kept", kept, checks.INDEX, (number, width)),
    )
    checks.aligned("keys", key)
    checks.aligned("values", value)
    device = checks.one_gpu(keys, values, rows, starts, kept)
    if not (layers and number and width and heads and dim):
        return
    line = heads * dim * keys.element_size()
    unit = checks.unit(line)
    units = line // unit
    _KERNELS[unit].launch(
        device,
        (-(-units // COLUMNS), number, 2 * layers),
        (COLUMNS, LINES, 1),
        (key, value, *numbers, slots, positions, units, width),
    )
