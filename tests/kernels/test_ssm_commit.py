"""ssm_commit against the reference: on a GPU, and thread by thread on any machine with g++.

Whatever a call must not read or write holds NaN; afterwards exactly the right elements differ.
"""

from __future__ import annotations

import math

import pytest
import torch

from cascade.kernels import reference
from cascade.kernels.ssm_commit import ssm_commit

F32, BF16 = torch.float32, torch.bfloat16
DTYPES = [(F32, F32), (F32, BF16), (BF16, F32), (BF16, BF16)]
# H, P, N, G: one like Nemotron's heads, one like nano's, one that divides nothing evenly, one of
# less than a warp, one of several blocks a head.
SHAPES = [(4, 64, 128, 2), (4, 32, 32, 1), (6, 12, 40, 3), (2, 8, 8, 1), (2, 72, 256, 2)]


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    kind = {2: torch.int16, 4: torch.int32}[a.element_size()]
    return torch.equal(a.contiguous().view(kind), b.contiguous().view(kind))


@pytest.mark.parametrize(("state_dtype", "dtype"), DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(
    ("number", "entries"), [(1, 1), (3, 16), (3, 17), (4, 65), (17, 9), (17, 64)]
)
def test_ssm_commit(
    device: str,
    state_dtype: torch.dtype,
    dtype: torch.dtype,
    shape: tuple[int, int, int, int],
    number: int,
    entries: int,
) -> None:
    heads, dim, size, groups = shape
    layers = 3
    if device == "cpu":  # one thread after the other
        layers, number = 1, min(number, 3)
    slots, sources_held = number + 2, number + 1
    rows = torch.randperm(slots)[:number].to(device)
    sources = torch.randperm(sources_held)[:number].to(device)
    counts = torch.randint(0, entries + 1, (number,))
    counts[0] = entries
    if number > 1:
        counts[1] = 0
    counts = counts.to(device)
    state = torch.full((layers, slots, heads, dim, size), math.nan, device=device)
    state[:, rows] = torch.randn(layers, number, heads, dim, size, device=device)
    state = state.to(state_dtype)
    channels = heads * dim + groups * size
    scanned = torch.randn(layers, sources_held, entries, channels, device=device).to(dtype)
    dt = torch.rand(layers, sources_held, entries, heads, device=device)
    unread = torch.ones(sources_held, entries, dtype=torch.bool, device=device)
    unread[sources] = torch.arange(entries, device=device) >= counts[:, None]
    scanned[:, unread] = math.nan
    dt[:, unread] = math.nan
    decay = -torch.rand(layers, heads, device=device) - 0.1

    wanted, again, before = state.clone(), state.clone(), state.clone()
    reference.ssm_commit(wanted, scanned, dt, decay, rows, sources, counts)
    ssm_commit(state, scanned, dt, decay, rows, sources, counts)
    if device != "cpu":
        ssm_commit(again, scanned, dt, decay, rows, sources, counts)
        assert same_bits(state, again)

    written = torch.zeros(slots, dtype=torch.bool, device=device)
    written[rows[counts > 0]] = True
    assert same_bits(state[:, ~written], before[:, ~written])
    got, want = state[:, written].float(), wanted[:, written].float()
    assert got.isfinite().all()
    error = float((got - want).norm() / want.norm())
    assert error < (1e-6 if state_dtype == F32 else 2e-3)
    tolerance = (1e-5, 1e-5) if state_dtype == F32 else (2**-7, 1e-3)
    torch.testing.assert_close(got, want, rtol=tolerance[0], atol=tolerance[1])


def test_a_whole_prefill_chunk(device: str) -> None:
    entries = 512 if device == "cuda" else 200
    state = torch.randn(2, 2, 4, 64, 128, device=device)
    scanned = torch.randn(2, 1, entries, 4 * 64 + 2 * 128, device=device, dtype=BF16)
    dt, decay = torch.rand(2, 1, entries, 4, device=device) * 0.1, -torch.rand(2, 4, device=device)
    rows, sources = torch.tensor([1], device=device), torch.tensor([0], device=device)
    wanted = state.double()
    x, write = scanned.double().split([256, 256], -1)
    for j in range(entries):
        step = dt[:, 0, j].double()
        outer = x[:, 0, j].view(2, 4, 64, 1) * write[:, 0, j].view(2, 2, 1, 128).repeat_interleave(
            2, 1
        )
        decayed = wanted[:, 1] * (step * decay.double()).exp()[..., None, None]
        wanted[:, 1] = decayed + step[..., None, None] * outer
    ssm_commit(state, scanned, dt, decay, rows, sources, torch.tensor([entries], device=device))
    error = (state.double() - wanted).norm() / wanted.norm()
    assert float(error) < 1e-6


def test_nan_and_infinity_are_kept_apart_in_bf16(device: str) -> None:
    """A state that is not finite stays so: rounding to bf16 makes nothing of NaN but NaN."""
    state = torch.tensor([math.nan, math.inf, -math.inf, 3e38] * 2, device=device).repeat(
        1, 1, 1, 4, 1
    )
    state = state.to(BF16)
    scanned = torch.zeros(1, 1, 1, 4 + 8, device=device, dtype=BF16)
    one = torch.tensor([1], device=device)
    ssm_commit(
        state, scanned, torch.ones(1, 1, 1, 1, device=device),
        -torch.full((1, 1), 1e-3, device=device), one - 1, one - 1, one,
    )  # fmt: skip
    found = state.float()[0, 0, 0, 0, :4]
    assert found[0].isnan() and found[1:3].tolist() == [math.inf, -math.inf]
    assert found[3].isfinite()
