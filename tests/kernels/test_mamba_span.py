"""The Mamba layer of many tokens against the definition, on a GPU or thread by thread."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from cascade.kernels import reference
from cascade.kernels.checks import KernelArgumentError
from cascade.kernels.mamba_span import fits_spans, mamba_span

F32, BF16 = torch.float32, torch.bfloat16


def near(mine: Tensor, its: Tensor) -> bool:
    return bool((mine.float() - its.float()).norm() <= 2e-2 * its.float().norm())


@pytest.mark.parametrize("counts", [(1,), (33,), (5, 70, 16), (64, 0, 1)])
@pytest.mark.parametrize(
    ("heads", "dim", "size", "groups", "state_dtype"),
    [(4, 32, 32, 1, F32), (8, 8, 16, 2, F32), (4, 64, 128, 2, BF16), (4, 24, 64, 4, F32)],
)
@pytest.mark.parametrize("old", [0, 3])
def test_mamba_span(
    device: str,
    heads: int,
    dim: int,
    size: int,
    groups: int,
    state_dtype: torch.dtype,
    counts: tuple[int, ...],
    old: int,
) -> None:
    rows, held, slots_held = len(counts), max(counts) + old + 2, len(counts) + 2
    inner = heads * dim
    channels, width = inner + 2 * groups * size, inner + groups * size
    columns = inner + channels + heads

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, device=device).to(BF16)

    slots = torch.randperm(slots_held, device=device)[:rows]
    sources = torch.randperm(slots_held, device=device)[:rows]
    entries = torch.randint(0, old + 1, (rows,), device=device)
    entries[0] = old
    number = torch.tensor(counts, device=device)
    begins = number.cumsum(0) - number
    journal = (
        normal(slots_held, held, channels),
        normal(slots_held, held, width),
        torch.rand(slots_held, held, heads, device=device),
    )
    unread = torch.ones(slots_held, held, dtype=torch.bool, device=device)
    unread[sources] = torch.arange(held, device=device) >= entries[:, None]
    for part in journal:
        part[unread] = math.nan
    packed = normal(sum(counts), columns)
    state = torch.randn(slots_held, heads, dim, size, device=device).to(state_dtype)
    fixed = state, normal(slots_held, 3, channels)
    weights = (
        normal(channels, 4),
        normal(channels),
        normal(heads),
        -torch.rand(heads, device=device) - 0.1,
        normal(heads),
        0.001,
    )

    longest = max(counts)
    padded = torch.zeros(rows, longest, columns, device=device)
    for r, count in enumerate(counts):
        padded[r, :count] = packed[begins[r] : begins[r] + count]
    wanted = torch.zeros(rows * longest, inner, device=device)
    expected = tuple(part.float().masked_fill(unread[..., None], 0) for part in journal)
    wide = [part.float() if isinstance(part, Tensor) else part for part in (*fixed, *weights)]
    reference.mamba_step(
        padded.flatten(0, 1),
        *wide[:2],
        expected,
        *wide[2:],
        slots,
        sources,
        entries,
        number,
        wanted,
        torch.zeros(rows * longest, heads, device=device),
    )
    before = tuple(part.clone() for part in journal)
    for _ in range(2):  # the same numbers again: nothing but the new entries may be written
        numbers = slots, sources, entries, begins, number
        found = mamba_span(packed, *fixed, journal, *weights, *numbers, longest)
        for r, count in enumerate(counts):
            if count:
                mine = found[begins[r] : begins[r] + count]
                assert near(mine, wanted.view(rows, longest, inner)[r, :count])
    new = torch.zeros_like(unread)
    for r, count in enumerate(counts):
        new[sources[r], entries[r] : entries[r] + count] = True
    for mine, its, old_part in zip(journal, expected, before, strict=True):
        assert near(mine[new], its[new])
        assert torch.equal(mine[~new].nan_to_num(7), old_part[~new].nan_to_num(7))


def test_what_it_takes() -> None:
    sizes = {"conv_taps": 4, "state_size": 128, "heads": 64, "inner": 4096, "groups": 8}
    assert fits_spans(SimpleNamespace(**sizes), BF16)
    assert not fits_spans(SimpleNamespace(**sizes), F32)
    assert not fits_spans(SimpleNamespace(**sizes | {"state_size": 96}), BF16)
    one = torch.zeros(1, dtype=torch.int64)
    with pytest.raises(KernelArgumentError, match="state size N is 8"):
        mamba_span(
            torch.zeros(1, 4 * 8 + 4 * 8 + 16 + 4, dtype=BF16),
            torch.zeros(1, 4, 8, 8),
            torch.zeros(1, 3, 48, dtype=BF16),
            tuple(torch.zeros(1, 2, size) for size in (48, 40, 4)),
            torch.zeros(48, 4, dtype=BF16),
            None,
            torch.zeros(4, dtype=BF16),
            torch.zeros(4),
            torch.zeros(4, dtype=BF16),
            0.0,
            one, one, one, one, one,
            1,
        )  # fmt: skip
