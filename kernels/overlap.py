"""Launches that may begin while the kernel before them still runs (programmatic dependent launch).

CuPy has no name for this launch attribute, so the driver is called. A kernel launched so must call
`wait_for_inputs` (ptx.cuh) in every thread before it reads what the kernel before it writes, and
before it writes anything. CUDA C++ Programming Guide, "Programmatic Dependent Launch and
Synchronization"; compute capability 9.0 and newer.
"""

from __future__ import annotations

import ctypes
from functools import cache

_PROGRAMMATIC_STREAM_SERIALIZATION = 6  # CUlaunchAttributeID


class _Attribute(ctypes.Structure):
    """CUlaunchAttribute: an id, padding, and a union of 64 bytes."""

    _fields_ = (("id", ctypes.c_int), ("pad", ctypes.c_char * 4), ("value", ctypes.c_int * 16))


class _Config(ctypes.Structure):
    """CUlaunchConfig."""

    _fields_ = (
        ("grid", ctypes.c_uint * 3),
        ("block", ctypes.c_uint * 3),
        ("shared", ctypes.c_uint),
        ("stream", ctypes.c_void_p),
        ("attributes", ctypes.POINTER(_Attribute)),
        ("number", ctypes.c_uint),
    )


def launch(
    function: int,
    stream: int,
    grid: tuple[int, int, int],
    block: tuple[int, int, int],
    argument: bytes,
    shared: int,
) -> None:
    """Launch a CUfunction with one argument by value. Raises RuntimeError with the driver's code."""
    attribute = _Attribute(_PROGRAMMATIC_STREAM_SERIALIZATION, b"", (1,))
    config = _Config(grid, block, shared, stream or None, ctypes.pointer(attribute), 1)
    value = ctypes.create_string_buffer(argument, len(argument))
    parameters = (ctypes.c_void_p * 1)(ctypes.addressof(value))
    code = _launch_kernel()(ctypes.byref(config), ctypes.c_void_p(function), parameters, None)
    if code:
        raise RuntimeError(f"cuLaunchKernelEx failed with CUDA driver error {code}")


@cache
def _launch_kernel() -> ctypes._NamedFuncPointer:
    return ctypes.CDLL("libcuda.so.1").cuLaunchKernelEx


@cache
def is_supported(device: int) -> bool:
    import torch

    return torch.cuda.get_device_capability(device) >= (9, 0)
