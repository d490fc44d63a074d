"""The processor's kernels against the reference: awkward sizes, ragged rows, entries of NaN."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cascade.kernels import cpu, reference
from cascade.kernels.cpu_spans import LONGEST
from cascade.kernels.cpu_steps import HEAVY, LARGE, Array, Matrix

SIZES = [1, 2, 5, 12, 63, LONGEST]
GROUPS = [1, 2, 4]
EPS = 1e-5
HEADS, DIM, STATE = 4, 3, 5


def close(mine: torch.Tensor | Array, its: torch.Tensor) -> None:
    torch.testing.assert_close(torch.as_tensor(mine), its, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("tokens", SIZES)
@pytest.mark.parametrize("width", [1, 7, 24, 320])
def test_rms_norm(tokens: int, width: int) -> None:
    x, weight = torch.randn(tokens, width), torch.randn(width)
    wanted = reference.rms_norm(x, weight, EPS)
    gain: Array = (weight * width**0.5).numpy()
    close(cpu.rms_norm(x, weight, EPS), wanted)
    close(cpu.rms_norm_span(x.numpy(), gain, width * EPS), wanted)
    close(cpu.rms_norm_step(x[0].numpy(), gain, width * EPS), wanted[0])


@pytest.mark.parametrize("tokens", SIZES)
@pytest.mark.parametrize("groups", GROUPS)
def test_gated_norm(tokens: int, groups: int) -> None:
    width = 12
    y, gate, weight = torch.randn(tokens, width), 9 * torch.randn(tokens, width), torch.randn(width)
    wanted = reference.gated_norm(y, gate, weight, groups, EPS)
    gain: Array = (weight * (width // groups) ** 0.5).numpy()
    floor = width // groups * EPS
    close(cpu.gated_norm(y, gate, weight, groups, EPS), wanted)
    close(cpu.gated_norm_span(y.numpy(), gate.numpy(), gain, groups, floor), wanted)
    close(cpu.gated_norm_step(y[0].numpy(), gate[0].numpy(), gain, groups, floor), wanted[0])


@pytest.mark.parametrize("tokens", SIZES)
@pytest.mark.parametrize("taps", [1, 2, 4])
@pytest.mark.parametrize("biased", [False, True])
def test_causal_conv(tokens: int, taps: int, biased: bool) -> None:
    history, inputs = torch.randn(1, taps - 1, 6), torch.randn(1, tokens, 6)
    weight, bias = torch.randn(6, taps), torch.randn(6) if biased else None
    wanted = reference.causal_conv(history, inputs, weight, bias)[0]
    joined: Array = torch.cat([history, inputs], 1)[0].numpy()
    turned: Array = weight.t().contiguous().numpy()
    added = None if bias is None else bias.numpy()
    close(cpu.causal_conv_span(joined, turned, added), wanted)
    close(cpu.causal_conv_step(joined[:taps], turned, added), wanted[0])


def test_large_numbers_saturate_as_the_reference_does() -> None:
    x = np.array([-200, -88, 0, 88, 200], np.float32)
    with np.errstate(all="ignore"):
        steps = cpu.dt_step(x, np.zeros_like(x), 1e-3)
        gated = cpu.gated_norm_step(np.ones_like(x), x, np.ones_like(x), 1, EPS)
    ones = torch.ones(5)
    close(steps, torch.nn.functional.softplus(torch.tensor(x)).clamp(min=1e-3))
    close(gated * 5**0.5, reference.gated_norm(ones, torch.tensor(x), ones, 1, EPS / 5))


@pytest.mark.parametrize("groups", GROUPS)
@pytest.mark.parametrize(("past", "tokens"), [(0, 1), (0, 63), (3, 1), (5, 12), (1, LONGEST - 1)])
def test_ssm_scan(groups: int, past: int, tokens: int) -> None:
    rows, total = 3, past + tokens
    state = torch.randn(rows, HEADS, DIM, STATE)
    scanned = torch.randn(rows, total, HEADS * DIM + groups * STATE)
    dt = torch.rand(rows, total, HEADS) * 3  # enough for what lies ahead to overflow
    dt[1, :past] = 0  # entries that do not exist
    read = torch.randn(rows, tokens, groups, STATE)
    decay, skip = -torch.rand(HEADS) * 20, torch.randn(HEADS)
    wanted = reference.ssm_scan(state, scanned, dt, read, decay, skip)
    close(cpu.ssm_scan(state, scanned, dt, read, decay, skip), wanted)
    if past:
        return
    mixed: Array = torch.cat([scanned, read.flatten(2)], 2)[0].numpy()
    arguments = dt[0].numpy(), decay.numpy(), skip.numpy()
    before = state[0].clone()
    with np.errstate(over="ignore"):
        y = cpu.ssm_scan_span(state[0].numpy(), mixed, *arguments, groups)
    close(y, wanted[0])
    assert torch.equal(state[0], before)  # a span only reads
    own = state[0].clone().numpy()
    step = cpu.ssm_scan_step(own, mixed[0], dt[0, 0].numpy(), *arguments[1:], groups)
    close(step, wanted[0, 0])
    after, one = state[:1].clone()[None], torch.tensor([0])
    reference.ssm_commit(
        after, scanned[None, :1, :1], dt[None, :1, :1], decay[None], one, one, torch.tensor([1])
    )
    close(own, after[0, 0])


@settings(max_examples=30, deadline=None)
@given(
    counts=st.lists(st.integers(0, 5), min_size=0, max_size=4),
    groups=st.sampled_from(GROUPS),
    seed=st.integers(0, 99),
)
def test_ssm_commit(counts: list[int], groups: int, seed: int) -> None:
    torch.manual_seed(seed)
    layers, slots, entries = 2, 5, 5
    state = torch.randn(layers, slots, HEADS, DIM, STATE)
    scanned = torch.randn(layers, slots, entries, HEADS * DIM + groups * STATE)
    dt, decay = torch.rand(layers, slots, entries, HEADS), -torch.rand(layers, HEADS)
    rows, sources = (torch.randperm(slots)[: len(counts)] for _ in range(2))
    for source, count in zip(sources, counts, strict=True):
        scanned[:, source, count:] = dt[:, source, count:] = torch.nan
    wanted = state.clone()
    places = decay, rows, sources, torch.tensor(counts, dtype=torch.int64)
    reference.ssm_commit(wanted, scanned, dt, *places)
    cpu.ssm_commit(state, scanned, dt, *places)
    close(state, wanted)


@pytest.mark.parametrize("tokens", SIZES)
@pytest.mark.parametrize(("top_k", "num_experts"), [(1, 1), (2, 5), (6, 128)])
def test_experts(tokens: int, top_k: int, num_experts: int) -> None:
    hidden, width = 10, 6
    whole_up = torch.randn(num_experts, width + 3, hidden + 2)
    whole_down = torch.randn(num_experts, hidden + 2, width + 3)
    up, down = whole_up[:, :width, :hidden], whole_down[:, :hidden, :width]  # prefix views
    x, weights = torch.randn(tokens, hidden), torch.rand(tokens, top_k)
    chosen = torch.stack([torch.randperm(num_experts)[:top_k] for _ in range(tokens)])
    wanted = reference.experts(x, up, down, chosen, weights)
    matrices = [[Matrix(one) for one in part.unbind()] for part in (up, down)]
    torch.testing.assert_close(
        cpu.experts(x, up, down, chosen, weights), wanted, atol=1e-4, rtol=1e-5
    )
    span = cpu.experts_span(x.numpy(), *matrices, chosen.numpy(), weights.numpy())
    torch.testing.assert_close(torch.as_tensor(span), wanted, atol=1e-4, rtol=1e-5)
    picks = list(zip(chosen[0].tolist(), weights[0].tolist(), strict=True))
    step = cpu.experts_step(x[0].numpy(), *matrices, picks)
    torch.testing.assert_close(torch.as_tensor(step), wanted[0], atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("tokens", SIZES)
@pytest.mark.parametrize(("groups", "top_groups"), [(1, 1), (4, 1), (4, 2)])
@pytest.mark.parametrize("normalise", [False, True])
def test_route(tokens: int, groups: int, top_groups: int, normalise: bool) -> None:
    x, router, bias = torch.randn(tokens, 10), torch.randn(16, 10), torch.randn(16)
    settings_ = 2, groups, top_groups, normalise, 2.5
    experts, weights = reference.route(x, router, bias, *settings_)
    wanted = torch.zeros(tokens, 16).scatter_(1, experts, weights)
    chosen, shares = cpu.route_span(x.numpy(), Matrix(router), bias.numpy(), *settings_)
    got = torch.zeros(tokens, 16).scatter_(1, torch.as_tensor(chosen), torch.as_tensor(shares))
    close(got, wanted)
    picks = cpu.route_step(x[0].numpy(), Matrix(router), bias.numpy(), *settings_)
    close(torch.tensor([dict(picks).get(i, 0.0) for i in range(16)]), wanted[0])


@pytest.mark.parametrize(("before", "tokens"), [(0, 1), (7, 1), (0, 12), (5, 63)])
def test_attention(before: int, tokens: int) -> None:
    end = before + tokens
    keys, values = torch.full((2, 2, 90, 2, 4), torch.nan).unbind()
    keys[1, :end], values[1, :end] = torch.randn(2, end, 2, 4).unbind()
    query = torch.randn(1, tokens, 4, 4)
    wanted = reference.attention(query, keys, values, [(1, before)])[0]
    flat: Array = query[0].flatten(1).numpy()
    seen = keys[1, :end], values[1, :end], 4
    close(cpu.attention_span(flat, *seen), wanted)
    close(cpu.attention_step(flat[-1], *seen), wanted[-1])


@pytest.mark.parametrize("whole", [(584, 320), (2048, 160)])
@pytest.mark.parametrize("width", [24, 160])
@pytest.mark.parametrize("tokens", [1, 3, 40])
def test_matrix_of_every_size_and_stride(whole: tuple[int, int], width: int, tokens: int) -> None:
    """Sizes on both sides of the limits, whole matrices and prefix views, with and without bias."""
    weight, x = torch.randn(whole)[:, :width], torch.randn(tokens, width)
    assert (LARGE <= 2048 * 160) and (40 * 2048 * 160 >= HEAVY > 40 * 584 * 24)
    for bias in (None, torch.randn(len(weight))):
        wanted = torch.nn.functional.linear(x, weight, bias)
        matrix = Matrix(weight, bias)
        for got in (matrix.rows(x.numpy()), matrix.vector(x[0].numpy())[None]):
            torch.testing.assert_close(
                torch.as_tensor(got), wanted[: len(got)], atol=1e-4, rtol=1e-5
            )


def test_what_is_not_float32_is_left_to_the_reference() -> None:
    x, weight = torch.randn(3, 8).bfloat16(), torch.randn(8).bfloat16()
    assert torch.equal(cpu.rms_norm(x, weight, EPS), reference.rms_norm(x, weight, EPS))
    up, down = torch.randn(4, 6, 8).bfloat16(), torch.randn(4, 8, 6).bfloat16()
    chosen, shares = torch.tensor([[0, 1], [2, 3], [1, 2]]), torch.rand(3, 2)
    assert torch.equal(
        cpu.experts(x, up, down, chosen, shares), reference.experts(x, up, down, chosen, shares)
    )
