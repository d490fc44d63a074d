"""Launcher of race_sample.cu."""

from __future__ import annotations

import torch
from torch import Tensor

from cascade.kernels import checks
from cascade.kernels.compiler import Kernel

THREADS = 256
CHUNK = 1024  # indices a block takes, as in race.cuh
WEIGHTS = (torch.float32, torch.float64)

_HEATS = {
    torch.float32: Kernel("race_sample", "heats_f32", 8),
    torch.float64: Kernel("race_sample", "heats_f64", 8),
}
_FINISH = Kernel("race_sample", "finish", 8)


def race_sample(weights: Tensor, seeds: Tensor, positions: Tensor, stream: int = 0) -> Tensor:
    """Draw one index a row with probability proportional to `weights` [R, V], fp32 or fp64.

    See reference.race_sample: the same index, unless the two best scores are closer than the last
    bits of a logarithm. Ties and rows without a positive weight go to the lowest index.
    """
    shape = number, size = checks.sizes("weights", weights, "R V")
    weight = checks.array("weights", weights, WEIGHTS, shape)
    seed = checks.index("seeds", seeds, number)
    position = checks.index("positions", positions, number)
    checks.within("the vocabulary V", size, 1, 1 << 31)
    device = checks.one_gpu(weights, seeds, positions)
    out = torch.empty_like(seeds)
    if not number:
        return out
    chunks = -(-size // CHUNK)
    found = seeds.new_empty((number, chunks, 2)) if chunks > 1 else out
    arguments = (out.data_ptr(), found.data_ptr(), weight, seed, position, size, chunks, stream)
    _HEATS[weights.dtype].launch(device, (chunks, number, 1), (THREADS, 1, 1), arguments)
    if chunks > 1:
        _FINISH.launch(device, (number, 1, 1), (THREADS, 1, 1), arguments)
    return out
