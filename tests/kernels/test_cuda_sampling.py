"""race_sample and accept_resample on a GPU against the reference, on the CPU and on the GPU.

Indices may differ only where the two best scores agree to 1e-12; none did so far.
"""

from __future__ import annotations

from types import ModuleType

import pytest
import torch

from cascade.kernels import reference

pytestmark = pytest.mark.gpu

SIZES = [1, 63, 64, 65, 1023, 1024, 1025, 5000, 131072]


def differ(weights: torch.Tensor, a: torch.Tensor, b: torch.Tensor, clock: torch.Tensor) -> int:
    """Rows whose two indices are further apart than rounding explains."""
    scores = weights.double() / clock
    x, y = (scores.gather(1, i[:, None])[:, 0] for i in (a, b))
    return int(((x - y).abs() > 1e-12 * torch.maximum(x, y)).sum())


def clock(seeds: torch.Tensor, positions: torch.Tensor, stream: int, size: int) -> torch.Tensor:
    at = torch.arange(size, device=seeds.device)
    return -reference._uniform(seeds[:, None], positions[:, None], stream, at).log()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("number", [1, 3, 17])
def test_race_sample(cuda: ModuleType, dtype: torch.dtype, size: int, number: int) -> None:
    weights = torch.rand(number, size, device="cuda", dtype=dtype).pow(4)
    weights *= torch.rand(number, size, device="cuda") < 0.7
    seeds = torch.randint(-(2**62), 2**62, (number,), device="cuda")
    positions = torch.randint(0, 2**31, (number,), device="cuda")
    for stream in (0, 2):
        wanted = reference.race_sample(weights, seeds, positions, stream)
        got = cuda.race_sample(weights, seeds, positions, stream)
        assert torch.equal(got, cuda.race_sample(weights, seeds, positions, stream))
        assert differ(weights, got, wanted, clock(seeds, positions, stream, size)) == 0
        on_cpu = reference.race_sample(weights.cpu(), seeds.cpu(), positions.cpu(), stream).cuda()
        assert differ(weights, got, on_cpu, clock(seeds, positions, stream, size)) == 0


def test_race_sample_of_greedy_and_of_empty_rows(cuda: ModuleType) -> None:
    weights = torch.zeros(3, 4000, device="cuda")
    weights[0, 3999] = weights[1, 17] = 1.0
    seeds = torch.arange(3, device="cuda")
    assert cuda.race_sample(weights, seeds, seeds).tolist() == [3999, 17, 0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("size", [1, 63, 65, 1025, 131072])
@pytest.mark.parametrize(("number", "width"), [(1, 1), (3, 8), (17, 5), (3, 0), (2, 65)])
def test_accept_resample(
    cuda: ModuleType, dtype: torch.dtype, size: int, number: int, width: int
) -> None:
    if size > 10_000 and width > 8:
        pytest.skip("wider than any real draft, and a gigabyte")
    logits = 2 * torch.randn(number, width + 1, size, device="cuda", dtype=dtype)
    target = logits.softmax(-1)
    draft = (logits[:, :width] + 0.7 * torch.randn_like(logits[:, :width])).softmax(-1)
    seeds = torch.arange(number, device="cuda") * 1000 + size
    positions = torch.randint(0, 4096, (number,), device="cuda")
    ids = torch.empty(number, width, dtype=torch.int64, device="cuda")
    for i in range(width):
        ids[:, i] = reference.race_sample(draft[:, i], seeds, positions + i)
    counts = torch.randint(0, width + 1, (number,), device="cuda")
    counts[0] = width
    if number > 1:
        counts[1] = 0
    poisoned = ids.clone()
    poisoned[torch.arange(width, device="cuda") >= counts[:, None]] = 2**62
    wanted = reference.accept_resample(target, draft, ids, counts, seeds, positions)
    got = cuda.accept_resample(target, draft, poisoned, counts, seeds, positions)
    again = cuda.accept_resample(target, draft, poisoned, counts, seeds, positions)
    assert torch.equal(got[0], wanted[0])
    assert torch.equal(got[0], again[0]) and torch.equal(got[1], again[1])
    row = torch.arange(number, device="cuda")
    after = target[row, got[0]].double()
    rejected = got[0] < counts
    if width:
        residual = (after - draft[row, got[0].clamp(max=width - 1)].double()).clamp(min=0)
        usable = rejected & (residual.sum(1) > 0)
        after = torch.where(usable[:, None], residual, after)
    assert differ(after, got[1], wanted[1], clock(seeds, positions + got[0], 2, size)) == 0


def test_accept_resample_takes_both_branches(cuda: ModuleType) -> None:
    """Over many rows some drafts are accepted whole and some are not, as in the reference."""
    number, width, size = 200, 4, 97
    target = torch.randn(number, width + 1, size, device="cuda").softmax(-1)
    draft = torch.randn(number, width, size, device="cuda").softmax(-1)
    target[::3, :width] = draft[::3]  # always accepted
    ids = torch.randint(size, (number, width), device="cuda")
    counts = torch.full((number,), width, device="cuda")
    seeds = torch.arange(number, device="cuda")
    wanted = reference.accept_resample(target, draft, ids, counts, seeds, seeds)
    got = cuda.accept_resample(target, draft, ids, counts, seeds, seeds)
    assert set(got[0].tolist()) >= {0, 1, width}
    assert torch.equal(got[0], wanted[0]) and torch.equal(got[1], wanted[1])


def test_accept_resample_without_residual_draws_from_the_target(cuda: ModuleType) -> None:
    p = torch.zeros(1, 2, 3000, device="cuda")
    p[0, :, [5, 2900]] = 0.5
    ids, count = torch.tensor([[7]], device="cuda"), torch.tensor([1], device="cuda")
    wanted = reference.accept_resample(p, p[:, :1].contiguous(), ids, count, count, count)
    got = cuda.accept_resample(p, p[:, :1].contiguous(), ids, count, count, count)
    assert int(got[0]) == 0
    assert int(got[1]) == int(wanted[1])
    assert int(got[1]) in (5, 2900)
