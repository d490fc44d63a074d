"""How many threads a piece of work on a processor is worth."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

SMALL = 4096  # activations (tokens x width): below this one thread is about as fast as several
SMALL_MODEL = 256 * 2**20  # bytes of weights: the same for a whole process that runs such a model


def suits_one_thread(device: torch.device, weight_bytes: int) -> bool:
    """Whether a process that does nothing else should run this model on one thread."""
    return device.type == "cpu" and weight_bytes < SMALL_MODEL


@contextmanager
def threads_for(device: torch.device, tokens: int, width: int) -> Iterator[None]:
    """Run small work on a CPU on one thread, and leave torch's setting as it was.

    Threads wait for each other after every product: where cores are busy that makes small products
    many times slower, and where they are idle it gains little.
    """
    before = torch.get_num_threads()
    if device.type != "cpu" or before == 1 or tokens * width >= SMALL:
        yield
        return
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
