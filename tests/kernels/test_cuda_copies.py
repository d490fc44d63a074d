"""kv_compact, fork_copy and cache_digest on a GPU against the reference."""

from __future__ import annotations

import math
from types import ModuleType

import pytest
import torch

from cascade.kernels import reference

pytestmark = pytest.mark.gpu

F32, BF16 = torch.float32, torch.bfloat16


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    kind = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[a.element_size()]
    return torch.equal(a.contiguous().view(kind), b.contiguous().view(kind))


def path(width: int, members: int) -> torch.Tensor:
    """`members` increasing offsets below `width`, padded with -1 to `width`."""
    kept = torch.randperm(width)[:members].sort().values
    return torch.cat([kept, torch.full((width - members,), -1)])


@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize(("heads", "dim"), [(2, 128), (2, 32), (1, 5)])
@pytest.mark.parametrize("number", [1, 3, 17])
@pytest.mark.parametrize("width", [1, 63, 64, 65, 200])
def test_kv_compact(
    cuda: ModuleType, dtype: torch.dtype, heads: int, dim: int, number: int, width: int
) -> None:
    positions = 3 * width + 5
    shape = (2, number + 1, positions, heads, dim)
    keys, values = (torch.randn(shape, device="cuda").to(dtype) for _ in range(2))
    rows = torch.randperm(number + 1, device="cuda")[:number]
    starts = torch.randint(0, 2 * width + 5, (number,), device="cuda")
    members = torch.randint(0, width + 1, (number,)).tolist()
    members[0] = width // 2
    if number > 1:
        members[1] = 0
    kept = torch.stack([path(width, m) for m in members]).cuda()
    wanted, again = (keys.clone(), values.clone()), (keys.clone(), values.clone())
    reference.kv_compact(*wanted, rows, starts, kept)
    cuda.kv_compact(keys, values, rows, starts, kept)
    cuda.kv_compact(*again, rows, starts, kept)
    assert same_bits(keys, wanted[0]) and same_bits(values, wanted[1])
    assert same_bits(keys, again[0]) and same_bits(values, again[1])


@pytest.mark.parametrize(("dtype", "state_dtype"), [(BF16, F32), (F32, F32), (BF16, BF16)])
@pytest.mark.parametrize("length", [0, 1, 63, 64, 65])
@pytest.mark.parametrize("targets", [1, 3, 17])
@pytest.mark.parametrize(("heads", "dim", "channels"), [(2, 128, 768), (1, 5, 7)])
def test_fork_copy(
    cuda: ModuleType,
    dtype: torch.dtype,
    state_dtype: torch.dtype,
    length: int,
    targets: int,
    heads: int,
    dim: int,
    channels: int,
) -> None:
    slots = targets + 3

    def poisoned(*shape: int, dtype: torch.dtype) -> torch.Tensor:
        whole = torch.full((2, slots, *shape), math.nan, device="cuda", dtype=dtype)
        whole[:, 1] = torch.randn(2, *shape, device="cuda").to(dtype)
        return whole

    parts = [
        poisoned(66, heads, dim, dtype=dtype),
        poisoned(66, heads, dim, dtype=dtype),
        poisoned(3, channels, dtype=dtype),
        poisoned(4, 8, 20, dtype=state_dtype),
    ]
    free = torch.tensor([s for s in range(slots) if s != 1], device="cuda")
    chosen = free[torch.randperm(slots - 1, device="cuda")[:targets]]
    wanted = [part.clone() for part in parts]
    reference.fork_copy(*wanted, 1, chosen, length)
    cuda.fork_copy(*parts, 1, chosen, length)
    for part, want in zip(parts, wanted, strict=True):
        assert same_bits(part, want)


@pytest.mark.parametrize(("dtype", "state_dtype"), [(BF16, F32), (F32, F32), (BF16, BF16)])
@pytest.mark.parametrize("number", [1, 3, 17])
@pytest.mark.parametrize("block", [64, 7])
def test_cache_digest(
    cuda: ModuleType, dtype: torch.dtype, state_dtype: torch.dtype, number: int, block: int
) -> None:
    keys, values = (torch.randn(2, number + 1, 150, 2, 20, device="cuda").to(dtype) for _ in "kv")
    window = torch.randn(3, number + 1, 3, 33, device="cuda").to(dtype)
    state = torch.randn(3, number + 1, 4, 64, 80, device="cuda").to(state_dtype)
    rows = torch.randperm(number + 1, device="cuda")[:number]
    lengths = torch.tensor([0, 1, 63, 64, 65, 128, 150] * 3, device="cuda")[-number:]
    for i, length in enumerate(lengths.tolist()):
        keys[:, rows[i], length:] = values[:, rows[i], length:] = math.nan
    wanted = reference.cache_digest(keys, values, window, state, rows, lengths, block)
    got = cuda.cache_digest(keys, values, window, state, rows, lengths, block)
    for a, b in zip(got, wanted, strict=True):
        assert torch.equal(a, b)
    state[0, rows[0], 0, 0, 0] += 1
    changed = cuda.cache_digest(keys, values, window, state, rows, lengths, block)
    assert torch.equal(changed[0], wanted[0])
    assert int((changed[1] != wanted[1]).sum()) == 1
