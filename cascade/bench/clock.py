"""Times of work on a device, and how fast that device copies."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable

import torch

WARM = 2  # runs that do not count: compilation, captured graphs, pages that are touched first


class Clock:
    """Medians over repeated runs: CUDA events around work on a GPU, wall time elsewhere."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.on_gpu = device.type == "cuda"

    def median(
        self,
        work: Callable[[], object],
        runs: int,
        before: Callable[[], object] = lambda: None,
    ) -> float:
        """Median seconds of `work`, from its call to the end of what it started on the device.

        before: called ahead of every run, not timed: fresh input
        """
        times = []
        for _ in range(WARM + runs):
            before()
            times.append(self._once(work))
        return statistics.median(times[WARM:])

    def copy_bandwidth(self) -> float:
        """Bytes read and written a second by a copy that is larger than any cache, random data."""
        size = 2**30 if self.on_gpu else 2**27
        source = torch.empty(size // 8, dtype=torch.int64, device=self.device).random_()
        target = torch.empty_like(source)
        return 2 * source.nbytes / self.median(lambda: target.copy_(source), 20)

    def free_bytes(self) -> int | None:
        """Bytes that can still be allocated on a GPU; None elsewhere."""
        if not self.on_gpu:
            return None
        gc.collect()
        torch.cuda.empty_cache()
        return torch.cuda.mem_get_info(self.device)[0]

    def forget_peak(self) -> None:
        """Begin anew with what is allocated now."""
        if self.on_gpu:
            torch.cuda.reset_peak_memory_stats(self.device)

    def peak_bytes(self) -> int:
        """Most bytes of tensors on a GPU at once since `forget_peak`; 0 elsewhere."""
        return torch.cuda.max_memory_allocated(self.device) if self.on_gpu else 0

    @property
    def name(self) -> str:
        if self.on_gpu:
            return torch.cuda.get_device_name(self.device)
        return f"processor, {torch.backends.cpu.get_cpu_capability()}"

    def _once(self, work: Callable[[], object]) -> float:
        if not self.on_gpu:
            began = time.perf_counter()
            work()
            return time.perf_counter() - began
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        stream = torch.cuda.current_stream(self.device)
        torch.cuda.synchronize(self.device)
        start.record(stream)
        work()
        end.record(stream)
        torch.cuda.synchronize(self.device)
        return float(start.elapsed_time(end)) * 1e-3
