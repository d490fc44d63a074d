"""Launcher of accept_resample.cu."""

from __future__ import annotations

import torch
from torch import Tensor

from cascade.kernels import checks
from cascade.kernels.compiler import Kernel
from cascade.kernels.race_sample import CHUNK, THREADS, WEIGHTS

_NAMES = {torch.float32: "f32", torch.float64: "f64"}
_HEATS = {p: Kernel("accept_resample", f"heats_{_NAMES[p]}", 12) for p in WEIGHTS}
_FINISH = {p: Kernel("accept_resample", f"finish_{_NAMES[p]}", 12) for p in WEIGHTS}


def accept_resample(
    target: Tensor, draft: Tensor, ids: Tensor, counts: Tensor, seeds: Tensor, positions: Tensor
) -> tuple[Tensor, Tensor]:
    """Lossless speculative sampling, ragged over rows: (accepted [R], following [R]).

    See reference.accept_resample; probabilities are fp32 or fp64. Two launches, no wait.
    """
    shape = number, rows, size = checks.sizes("target", target, "R X+1 V")
    p = checks.array("target", target, WEIGHTS, shape)
    width = rows - 1
    q = checks.array("draft", draft, (target.dtype,), (number, width, size))
    numbers = (
        checks.array("ids", ids, checks.INDEX, (number, width)),
        checks.index("counts", counts, number),
        checks.index("seeds", seeds, number),
        checks.index("positions", positions, number),
    )
    checks.within("the vocabulary V", size, 1, 1 << 31)
    device = checks.one_gpu(target, draft, ids, counts, seeds, positions)
    accepted, following = torch.empty_like(counts), torch.empty_like(counts)
    if not number:
        return accepted, following
    chunks = -(-size // CHUNK)
    found = counts.new_empty((number, chunks, 2))
    arguments = (
        accepted.data_ptr(),
        following.data_ptr(),
        found.data_ptr(),
        p,
        q,
        *numbers,
        width,
        size,
        chunks,
    )
    kind = target.dtype
    _HEATS[kind].launch(device, (chunks, number, 1), (THREADS, 1, 1), arguments)
    _FINISH[kind].launch(device, (number, 1, 1), (THREADS, 1, 1), arguments)
    return accepted, following
