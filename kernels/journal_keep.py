"""Launcher of journal_keep.cu."""

from __future__ import annotations

from torch import Tensor

from cascade.kernels import checks
from cascade.kernels.compiler import Kernel

THREADS = 128

_KERNELS = {size: Kernel("journal_keep", f"keep_{size}", 10) for size in (16, 4, 2)}


def journal_keep(
    target: Tensor, journal: Tensor, rows: Tensor, sources: Tensor, entries: Tensor
) -> None:
    """Copy one journal entry a row to entry 0 of the target's row, all layers in one launch.

    See reference.journal_keep. Where target and journal are one tensor, no row may read an entry 0
    that another row of the same call writes.
    """
    shape = layers, target_rows, target_entries, channels = checks.sizes(
        "target", target, "L S J X"
    )
    targets = checks.array("target", target, checks.STORED, shape)
    _, journal_rows, journal_entries, _ = checks.sizes("journal", journal, "L S' J' X")
    lines = layers, journal_rows, journal_entries, channels
    journals = checks.array("journal", journal, (target.dtype,), lines)
    number = rows.numel()
    numbers = (
        checks.index("rows", rows, number),
        checks.index("sources", sources, number),
        checks.index("entries", entries, number),
    )
    checks.aligned("target", targets)
    checks.aligned("journal", journals)
    device = checks.one_gpu(target, journal, rows, sources, entries)
    if not (layers and number and target_entries and channels):
        return
    line = channels * target.element_size()
    unit = checks.unit(line)
    units = line // unit
    _KERNELS[unit].launch(
        device,
        (-(-units // THREADS), number, layers),
        (THREADS, 1, 1),
        (
            targets,
            journals,
            *numbers,
            target_rows,
            target_entries,
            journal_rows,
            journal_entries,
            units,
        ),
    )
