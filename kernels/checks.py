"""What every launcher refuses before anything is launched.

Only what the host knows is checked: dtypes, shapes, contiguity, alignment, devices. Numbers that
live on the device (slots, counts, positions) cannot be read without stopping the stream. The
kernels leave out rows, sources and positions that lie outside of their tensors, and cut counts at
the size of the journal, so that a wrong number never touches foreign memory.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence

import torch
from torch import Tensor

STORED = (torch.float32, torch.bfloat16)  # what caches and journals may hold
INDEX = (torch.int64,)


class KernelArgumentError(ValueError):
    """A kernel refused an argument. Nothing was launched."""


def sizes(name: str, tensor: Tensor, letters: str) -> torch.Size:
    """The shape of `tensor`, which must have one size for each of `letters` ("L S J X")."""
    shape = tensor.shape
    if len(shape) != letters.count(" ") + 1:
        raise KernelArgumentError(
            f"{name} has shape {tuple(shape)}; expected [{letters.replace(' ', ', ')}]"
        )
    return shape


def array(name: str, tensor: Tensor, dtypes: Sequence[torch.dtype], shape: Sequence[int]) -> int:
    """The address of `tensor`, which must be contiguous, of one of `dtypes` and of `shape`."""
    if tensor.dtype not in dtypes:
        wanted = " or ".join(str(dtype) for dtype in dtypes)
        raise KernelArgumentError(f"{name} is {tensor.dtype}; expected {wanted}")
    if tensor.shape != shape:
        raise KernelArgumentError(
            f"{name} has shape {tuple(tensor.shape)}; expected {tuple(shape)}"
        )
    if not tensor.is_contiguous():
        raise KernelArgumentError(
            f"{name} has strides {tensor.stride()}; expected a contiguous tensor of shape "
            f"{tuple(shape)}"
        )
    return tensor.data_ptr()


def index(name: str, tensor: Tensor, length: int) -> int:
    """The address of a contiguous int64 tensor [length]."""
    return array(name, tensor, INDEX, (length,))


def strided(
    name: str, tensor: Tensor, dtypes: Sequence[torch.dtype], shape: Sequence[int]
) -> tuple[int, ...]:
    """Address and strides (but the last) of `tensor`, which may be a view of whole lines.

    Its last dimension must be dense, and address and strides multiples of 16 bytes.
    """
    if tensor.dtype not in dtypes:
        wanted = " or ".join(str(dtype) for dtype in dtypes)
        raise KernelArgumentError(f"{name} is {tensor.dtype}; expected {wanted}")
    if tensor.shape != shape:
        raise KernelArgumentError(
            f"{name} has shape {tuple(tensor.shape)}; expected {tuple(shape)}"
        )
    *outer, last = tensor.stride()
    if last != 1 and shape[-1] > 1:
        raise KernelArgumentError(
            f"{name} has strides {tensor.stride()}; expected lines, the last 1"
        )
    address, size = tensor.data_ptr(), tensor.element_size()
    aligned(name, address)
    for stride in outer:
        multiple(f"a stride of {name}, in bytes,", stride * size, 16)
    return address, *outer


def aligned(name: str, address: int) -> None:
    """Vector loads need addresses that are multiples of 16 bytes, as torch allocates them."""
    if address % 16:
        raise KernelArgumentError(
            f"{name} starts at address {address:#x}; expected a multiple of 16 bytes "
            "(a whole tensor rather than a view into one)"
        )


def multiple(name: str, value: int, of: int) -> None:
    if value % of:
        raise KernelArgumentError(f"{name} is {value}; expected a multiple of {of}")


def within(name: str, value: int, low: int, high: int) -> None:
    """`low <= value <= high`, on the host."""
    if not low <= value <= high:
        raise KernelArgumentError(f"{name} is {value}; expected {low} to {high}")


def one_gpu(*tensors: Tensor) -> int:
    """The number of the CUDA device that holds all `tensors`. The last check of a launcher."""
    device = tensors[0].get_device() if tensors[0].is_cuda else -1
    for tensor in tensors:
        if tensor.get_device() != device or device < 0:
            places = sorted({str(t.device) for t in tensors})
            raise KernelArgumentError(
                f"tensors are on {', '.join(places)}; expected all on one CUDA device"
            )
    return device


def unit(*counts: int) -> int:
    """The widest of 16, 4 and 2 bytes that divides every one of `counts` bytes."""
    return next(size for size in (16, 4, 2, 1) if not any(count % size for count in counts))


def float_bits(value: float) -> int:
    """The bits of an fp32 number as an integer: arguments of a kernel are 8 bytes each."""
    bits: int = struct.unpack("i", struct.pack("f", value))[0]
    return bits
