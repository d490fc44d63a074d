"""Launcher of provenance_stamp.cu."""

from __future__ import annotations

import torch
from torch import Tensor

from cascade.kernels import checks
from cascade.kernels.compiler import Kernel

THREADS = 128
SHARES = 8  # blocks a row at most: how many positions are stamped is known on the device alone

_KERNEL = Kernel("provenance_stamp", "stamp", 7)
_INT8 = (torch.int8,)


def provenance_stamp(
    provenance: Tensor, rows: Tensor, starts: Tensor, counts: Tensor, writers: Tensor
) -> None:
    """Record the writer of positions `[starts[r], starts[r] + counts[r])`, in one launch.

    See reference.provenance_stamp.
    """
    number = rows.numel()
    shape = slots, positions = checks.sizes("provenance", provenance, "S M")
    table = checks.array("provenance", provenance, _INT8, shape)
    numbers = (
        checks.index("rows", rows, number),
        checks.index("starts", starts, number),
        checks.index("counts", counts, number),
        checks.index("writers", writers, number),
    )
    device = checks.one_gpu(provenance, rows, starts, counts, writers)
    if not (number and positions):
        return
    _KERNEL.launch(
        device,
        (min(SHARES, -(-positions // THREADS)), number, 1),
        (THREADS, 1, 1),
        (table, *numbers, slots, positions),
    )
