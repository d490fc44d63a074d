"""Launcher of pick_tokens.cu."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from cascade.kernels import checks
from cascade.kernels.compiler import Kernel

THREADS, LANES = 256, 4
BLOCKS = 128  # a row, at most
COLUMNS = 5  # of a table
AT_ONCE = 1024  # blocks of all rows: about what a GPU holds

_FP32 = (torch.float32,)
_KERNEL = Kernel("pick_tokens", "pick", 10, overlaps=True)


def pick_tokens(
    logits: Tensor, picked: Tensor, latest: Tensor, slots: Tensor, table: Tensor | None = None
) -> None:
    """The likeliest id of each row, also by slot; -1 where a logit is not finite.

    See reference_decode.pick_tokens. Lines of 16 bytes; one call at a time on a device.
    """
    rows, size = checks.sizes("logits", logits, "R V")
    address, stride = checks.strided("logits", logits, _FP32, (rows, size))
    slots_held = latest.numel()
    places = (
        checks.index("picked", picked, rows),
        checks.index("latest", latest, slots_held),
        checks.index("slots", slots, rows),
    )
    moved = 0 if table is None else checks.array("table", table, checks.INDEX, (COLUMNS, rows))
    device = checks.one_gpu(logits, picked, latest, slots, *([] if table is None else [table]))
    if not (rows and size):
        return
    blocks = min(BLOCKS, max(AT_ONCE // rows, 1), -(-size // (THREADS * LANES)))
    best, arrived = _scratch(logits.device, rows)
    _KERNEL.launch(
        device,
        (blocks, rows, 1),
        (THREADS, 1, 1),
        (address, *places, moved, best.data_ptr(), arrived.data_ptr(), size, stride, slots_held),
    )


@cache
def _scratch(device: torch.device, rows: int) -> tuple[Tensor, Tensor]:
    """What blocks found, and how many have: zero before and after every call."""
    return (
        torch.zeros(rows, BLOCKS, dtype=torch.int64, device=device),
        torch.zeros(rows, dtype=torch.int32, device=device),
    )
