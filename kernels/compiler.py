"""CUDA C++ files compiled by NVRTC through CuPy, and launched on torch's current stream.

A kernel takes one struct by value, whose members are all 8 bytes: addresses and int64 numbers.
CuPy compiles a file once per process and architecture and keeps the binary in its on-disk cache
(`CUPY_CACHE_DIR`, by default `~/.cupy/kernel_cache`). CuPy is imported by the first launch.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch

from cascade.kernels import overlap

FOLDER = Path(__file__).parent
OPTIONS = ("-std=c++17",)

_INCLUDE = re.compile(r'^#include "(\w+\.cuh)"$', re.MULTILINE)


@cache
def source(stem: str, leave_out: tuple[str, ...] = ()) -> str:
    """The text of `stem`.cu with the `.cuh` files it includes, so that CuPy's cache sees them."""
    seen = set(leave_out)

    def include(match: re.Match[str]) -> str:
        if match[1] in seen:
            return ""
        seen.add(match[1])
        return _INCLUDE.sub(include, (FOLDER / match[1]).read_text())

    return _INCLUDE.sub(include, (FOLDER / f"{stem}.cu").read_text()).replace("#pragma once", "")


@cache
def _module(stem: str) -> Any:
    import cupy

    return cupy.RawModule(code=source(stem), options=OPTIONS)


@cache
def multiprocessors(device: int) -> int:
    """Multiprocessors of a CUDA device: the blocks of a kernel that keeps one on each."""
    return torch.cuda.get_device_properties(device).multi_processor_count


@cache
def largest_shared(device: int) -> int:
    """Bytes of shared memory that a block may have on a CUDA device."""
    properties = torch.cuda.get_device_properties(device)
    # ROCm builds have the second alone.
    size = getattr(properties, "shared_memory_per_block_optin", properties.shared_memory_per_block)
    return int(size)


class _TorchStream:
    """A torch stream in the CUDA stream protocol, which older torch versions do not speak."""

    def __init__(self, address: int) -> None:
        self._address = address

    def __cuda_stream__(self) -> tuple[int, int]:
        return 0, self._address


@cache
def _stream(address: int) -> Any:
    import cupy

    return cupy.cuda.Stream.from_external(_TorchStream(address))


PLAIN_SHARED = 8 * 1024  # dynamic shared memory that a kernel may have without asking


class Kernel:
    """One entry point of a `.cu` file; `arguments` is how many members its struct has.

    overlaps: whether it may begin while the kernel before it runs (`overlap`)
    """

    def __init__(self, stem: str, entry: str, arguments: int, *, overlaps: bool = False) -> None:
        self.stem, self.entry, self.overlaps = stem, entry, overlaps
        self._shared = PLAIN_SHARED
        self._pack = struct.Struct(f"{arguments}q").pack
        self._dtype: Any = f"V{8 * arguments}"  # opaque bytes; CuPy passes one such value
        self._function: Any = None

    def __repr__(self) -> str:
        return f"Kernel({self.stem}.cu: {self.entry})"

    def launch(
        self,
        device: int,
        grid: tuple[int, int, int],
        block: tuple[int, int, int],
        values: Sequence[int],
        shared: int = 0,
    ) -> None:
        """Launch on torch's current stream of CUDA device `device`; returns without waiting."""
        if device != torch.cuda.current_device():
            with torch.cuda.device(device):
                self.launch(device, grid, block, values, shared)
            return
        if self._function is None:
            self._load()
        if shared > self._shared:
            self._function.max_dynamic_shared_size_bytes = self._shared = shared
        stream_address = torch.cuda.current_stream(device).cuda_stream
        if self.overlaps and overlap.is_supported(device):
            address = self._function.kernel.ptr
            overlap.launch(address, stream_address, grid, block, self._pack(*values), shared)
            return
        stream = _stream(stream_address)
        argument = self._frombuffer(self._pack(*values), self._dtype)
        self._function(grid, block, (argument,), shared_mem=shared, stream=stream)

    def _load(self) -> None:
        import numpy

        self._dtype = numpy.dtype(self._dtype)
        self._frombuffer = numpy.frombuffer
        self._function = _module(self.stem).get_function(self.entry)
