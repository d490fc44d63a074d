"""Launcher of journal_keep.cu."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from cascade.kernels import checks
from cascade.kernels.compiler import Kernel

THREADS = 128
PARTS = 3  # as in the .cu

_KERNELS = {size: Kernel("journal_keep", f"keep_{size}", 3 * PARTS + 7) for size in (16, 4, 2)}


def journal_keep(
    targets: Sequence[Tensor],
    journals: Sequence[Tensor],
    rows: Tensor,
    sources: Tensor,
    entries: Tensor,
) -> None:
    """Copy one journal entry a row to entry 0 of the target's row: all parts in one launch.

    See reference.journal_keep; at most three parts. Where a target is its journal, no row may read
    an entry 0 that another row of the same call writes.
    """
    checks.within("the number of parts", len(targets), 1, PARTS)
    checks.within("the number of journals", len(journals), len(targets), len(targets))
    layers, target_rows, target_entries, _ = checks.sizes("targets[0]", targets[0], "L S J X")
    _, journal_rows, journal_entries, _ = checks.sizes("journals[0]", journals[0], "L S' J' X")
    to, origin, lines = [0] * PARTS, [0] * PARTS, [0] * PARTS
    for i, (target, journal) in enumerate(zip(targets, journals, strict=True)):
        channels = checks.sizes(f"targets[{i}]", target, "L S J X")[3]
        shape = layers, target_rows, target_entries, channels
        to[i] = checks.array(f"targets[{i}]", target, checks.STORED, shape)
        shape = layers, journal_rows, journal_entries, channels
        origin[i] = checks.array(f"journals[{i}]", journal, (target.dtype,), shape)
        checks.aligned(f"targets[{i}]", to[i])
        checks.aligned(f"journals[{i}]", origin[i])
        lines[i] = channels * target.element_size()
    number = rows.numel()
    numbers = (
        checks.index("rows", rows, number),
        checks.index("sources", sources, number),
        checks.index("entries", entries, number),
    )
    device = checks.one_gpu(*targets, *journals, rows, sources, entries)
    if not (layers and number and target_entries and any(lines)):
        return
    unit = checks.unit(*lines)
    units = [line // unit for line in lines]
    _KERNELS[unit].launch(
        device,
        (-(-sum(units) // THREADS), number, layers),
        (THREADS, 1, 1),
        (
            *to,
            *origin,
            *units,
            *numbers,
            target_rows,
            target_entries,
            journal_rows,
            journal_entries,
        ),
    )
