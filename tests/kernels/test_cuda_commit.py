"""conv_commit, journal_keep and provenance_stamp on a GPU against the reference.

Whatever a call must not read or write holds NaN; afterwards exactly the right elements differ.
"""

from __future__ import annotations

import math
from types import ModuleType

import pytest
import torch

from cascade.kernels import reference

pytestmark = pytest.mark.gpu

F32, BF16 = torch.float32, torch.bfloat16


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    kind = {1: torch.int8, 2: torch.int16, 4: torch.int32}[a.element_size()]
    return torch.equal(a.contiguous().view(kind), b.contiguous().view(kind))


def ragged(number: int, longest: int) -> torch.Tensor:
    """Counts of `number` rows up to `longest`, zero and the longest among them."""
    counts = torch.randint(0, longest + 1, (number,), device="cuda")
    counts[0] = longest
    if number > 1:
        counts[1] = 0
    return counts


@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize(("taps", "channels"), [(3, 6144), (3, 72), (1, 5), (6, 33)])
@pytest.mark.parametrize(("number", "entries"), [(1, 1), (3, 63), (17, 64), (3, 65), (17, 3)])
def test_conv_commit(
    cuda: ModuleType, dtype: torch.dtype, taps: int, channels: int, number: int, entries: int
) -> None:
    device = "cuda"
    window = torch.full((2, number + 2, taps, channels), math.nan, device=device, dtype=dtype)
    rows = torch.randperm(number + 2, device=device)[:number]
    sources = torch.randperm(number + 1, device=device)[:number]
    window[:, rows] = torch.randn(2, number, taps, channels, device=device).to(dtype)
    inputs = torch.randn(2, number + 1, entries, channels, device=device).to(dtype)
    counts = ragged(number, entries)
    wanted, again = window.clone(), window.clone()
    reference.conv_commit(wanted, inputs, rows, sources, counts)
    cuda.conv_commit(window, inputs, rows, sources, counts)
    cuda.conv_commit(again, inputs, rows, sources, counts)
    assert same_bits(window, wanted)
    assert same_bits(window, again)


@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize("channels", [5120, 64, 7])
@pytest.mark.parametrize("number", [1, 3, 17])
def test_journal_keep(cuda: ModuleType, dtype: torch.dtype, channels: int, number: int) -> None:
    device = "cuda"
    target = torch.full((3, number + 1, 2, channels), math.nan, device=device, dtype=dtype)
    journal = torch.randn(3, number + 2, 5, channels, device=device).to(dtype)
    rows = torch.randperm(number + 1, device=device)[:number]
    sources = torch.randperm(number + 2, device=device)[:number]
    entries = torch.randint(0, 5, (number,), device=device)
    wanted = target.clone()
    reference.journal_keep([wanted], [journal], rows, sources, entries)
    cuda.journal_keep([target], [journal], rows, sources, entries)
    assert same_bits(target, wanted)

    same = journal.clone()  # a resident journal: every row moves its own entry
    own = torch.randperm(number + 2, device=device)[:number]
    wanted = same.clone()
    reference.journal_keep([wanted], [wanted.clone()], own, own, entries)
    cuda.journal_keep([same], [same], own, own, entries)
    assert same_bits(same, wanted)


@pytest.mark.parametrize("number", [1, 3, 17])
@pytest.mark.parametrize("channels", [(6144, 5120, 64), (7, 64, 1), (2, 6, 8)])
def test_journal_keep_moves_all_parts_at_once(
    cuda: ModuleType, channels: tuple[int, int, int], number: int
) -> None:
    journal = [
        torch.randn(3, number, 5, width, device="cuda").to(dtype)
        for width, dtype in zip(channels, (BF16, BF16, F32), strict=True)
    ]
    targets = [torch.full_like(part, math.nan) for part in journal]
    wanted = [part.clone() for part in targets]
    rows = torch.randperm(number, device="cuda")
    entries = torch.randint(0, 5, (number,), device="cuda")
    reference.journal_keep(wanted, journal, rows, rows.flip(0), entries)
    cuda.journal_keep(targets, journal, rows, rows.flip(0), entries)
    for part, other in zip(targets, wanted, strict=True):
        assert same_bits(part, other)


@pytest.mark.parametrize(("number", "positions"), [(1, 1), (3, 63), (17, 64), (3, 65), (17, 5000)])
def test_provenance_stamp(cuda: ModuleType, number: int, positions: int) -> None:
    provenance = torch.full((number + 2, positions), -1, device="cuda", dtype=torch.int8)
    rows = torch.randperm(number + 2, device="cuda")[:number]
    starts = torch.randint(0, positions + 1, (number,), device="cuda")
    counts = torch.randint(0, positions + 2, (number,), device="cuda")  # some reach past the end
    counts[0] = 0 if number > 1 else positions
    writers = torch.randint(0, 5, (number,), device="cuda")
    wanted = provenance.clone()
    reference.provenance_stamp(wanted, rows, starts, counts, writers)
    cuda.provenance_stamp(provenance, rows, starts, counts, writers)
    assert torch.equal(provenance, wanted)


def test_rows_outside_of_the_cache_are_left_out(cuda: ModuleType) -> None:
    """The host cannot know them; a kernel must not write where they point."""
    state, window = (
        torch.randn(2, 2, 4, 8, 16, device="cuda"),
        torch.randn(2, 2, 3, 8, device="cuda"),
    )
    provenance = torch.full((2, 9), -1, device="cuda", dtype=torch.int8)
    scanned, dt = torch.randn(2, 2, 3, 48, device="cuda"), torch.rand(2, 2, 3, 4, device="cuda")
    inputs, decay = torch.randn(2, 2, 3, 8, device="cuda"), -torch.rand(2, 4, device="cuda")
    before = state.clone(), window.clone(), provenance.clone(), inputs.clone()
    bad = torch.tensor([-1, 2], device="cuda")
    ones = torch.ones_like(bad)
    cuda.ssm_commit(state, scanned, dt, decay, bad, ones - 1, ones)
    cuda.ssm_commit(state, scanned, dt, decay, torch.arange(2, device="cuda"), bad, ones)
    cuda.conv_commit(window, inputs, bad, ones, ones)
    cuda.provenance_stamp(provenance, bad, ones, ones, ones)
    cuda.journal_keep([inputs], [inputs], bad, ones, ones)
    for part, old in zip((state, window, provenance, inputs), before, strict=True):
        assert same_bits(part, old)


def test_launch_on_nothing_is_no_launch(cuda: ModuleType) -> None:
    none = torch.empty(0, dtype=torch.int64, device="cuda")
    window = torch.randn(2, 2, 3, 8, device="cuda")
    before = window.clone()
    cuda.conv_commit(window, torch.randn(2, 2, 4, 8, device="cuda"), none, none, none)
    assert same_bits(window, before)


def test_tensors_of_two_devices_are_refused(cuda: ModuleType) -> None:
    window, inputs = torch.randn(2, 2, 3, 8, device="cuda"), torch.randn(2, 2, 4, 8, device="cuda")
    rows = torch.arange(2)
    with pytest.raises(cuda.KernelArgumentError, match="tensors are on cpu, cuda:0"):
        cuda.conv_commit(window, inputs, rows, rows, rows)
