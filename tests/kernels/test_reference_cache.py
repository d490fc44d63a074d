"""The reference's cache functions against loops written independently from their formulas."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cascade.kernels import reference

MASK = (1 << 64) - 1
GOLDEN = 0x9E3779B97F4A7C15


def splitmix(x: int) -> int:
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & MASK
    return x ^ (x >> 31)


def uniform(seed: int, position: int, stream: int, index: int) -> float:
    key = splitmix((seed + (position * 4 + stream + 1) * GOLDEN) & MASK)
    return ((splitmix((key + (index + 1) * GOLDEN) & MASK) >> 12) + 0.5) * 2.0**-52


def signed(x: int) -> int:
    x &= MASK
    return x - (1 << 64) if x >> 63 else x


def index(values: list[int]) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int64)


@settings(max_examples=20, deadline=None)
@given(counts=st.lists(st.integers(0, 5), min_size=1, max_size=4), seed=st.integers(0, 99))
def test_ssm_commit_is_the_recurrence(counts: list[int], seed: int) -> None:
    torch.manual_seed(seed)
    layers, slots, heads, dim, size, groups, entries = 2, 5, 4, 3, 2, 2, 5
    state = torch.randn(layers, slots, heads, dim, size)
    scanned = torch.randn(layers, slots, entries, heads * dim + groups * size)
    dt = torch.rand(layers, slots, entries, heads)
    decay = -torch.rand(layers, heads)
    rows, sources = torch.randperm(slots)[: len(counts)], torch.randperm(slots)[: len(counts)]
    for source, count in zip(sources, counts, strict=True):
        scanned[:, source, count:] = dt[:, source, count:] = math.nan  # must never be read

    wanted = state.double()
    for layer in range(layers):
        for row, source, count in zip(rows, sources, counts, strict=True):
            for j in range(count):
                entry = scanned[layer, source, j].double()
                for head in range(heads):
                    x = entry[head * dim : (head + 1) * dim]
                    at = heads * dim + head // (heads // groups) * size
                    step = dt[layer, source, j, head].double()
                    old = wanted[layer, row, head]
                    wanted[layer, row, head] = (step * decay[layer, head]).exp() * old + (
                        step * x[:, None] * entry[at : at + size]
                    )
    before = state.clone()
    reference.ssm_commit(state, scanned, dt, decay, rows, sources, index(counts))
    torch.testing.assert_close(state.double(), wanted, rtol=1e-5, atol=1e-5)
    still = [s for s in range(slots) if s not in rows.tolist()]
    still += [int(r) for r, count in zip(rows, counts, strict=True) if not count]
    assert torch.equal(state[:, still], before[:, still])


@settings(max_examples=20, deadline=None)
@given(counts=st.lists(st.integers(0, 6), min_size=1, max_size=4), taps=st.integers(1, 4))
def test_conv_commit_keeps_the_last_inputs(counts: list[int], taps: int) -> None:
    window, inputs = torch.randn(2, 5, taps, 3), torch.randn(2, 5, 6, 3)
    rows, sources = torch.randperm(5)[: len(counts)], torch.randperm(5)[: len(counts)]
    wanted = window.clone()
    for row, source, count in zip(rows, sources, counts, strict=True):
        line = [*window[:, row].unbind(1), *inputs[:, source, :count].unbind(1)]
        wanted[:, row] = torch.stack(line[-taps:], 1)
    reference.conv_commit(window, inputs, rows, sources, index(counts))
    assert torch.equal(window, wanted)


def test_journal_keep_moves_one_entry() -> None:
    target, journal = torch.randn(2, 4, 3, 5), torch.randn(2, 2, 6, 5)
    wanted = target.clone()
    wanted[:, 3, 0], wanted[:, 1, 0] = journal[:, 0, 5], journal[:, 1, 0]
    reference.journal_keep([target], [journal], index([3, 1]), index([0, 1]), index([5, 0]))
    assert torch.equal(target, wanted)


@settings(max_examples=20, deadline=None)
@given(paths=st.lists(st.sets(st.integers(0, 7), max_size=8), min_size=1, max_size=3))
def test_kv_compact_closes_the_gaps(paths: list[set[int]]) -> None:
    keys, values = torch.randn(2, 3, 12, 1, 2), torch.randn(2, 3, 12, 1, 2)
    kept = torch.full((len(paths), 8), -1)
    starts = index([2, 0, 4])[: len(paths)]
    wanted = keys.clone(), values.clone()
    for row, path in enumerate(paths):
        for i, offset in enumerate(sorted(path)):
            kept[row, i] = offset
            for new, old in zip(wanted, (keys, values), strict=True):
                new[:, row, starts[row] + i] = old[:, row, starts[row] + offset]
    reference.kv_compact(keys, values, torch.arange(len(paths)), starts, kept)
    assert torch.equal(keys, wanted[0])
    assert torch.equal(values, wanted[1])


def test_fork_copy_of_one_layer_and_a_full_slot() -> None:
    keys, values = torch.randn(1, 3, 4, 2, 5), torch.randn(1, 3, 4, 2, 5)
    window, state = torch.randn(1, 3, 3, 6), torch.randn(1, 3, 2, 4, 4)
    reference.fork_copy(keys, values, window, state, 1, index([0, 2]), 4)
    for part in (keys, values, window, state):
        assert torch.equal(part[:, 0], part[:, 1]) and torch.equal(part[:, 2], part[:, 1])


def test_fork_copy_copies_the_prefix_and_the_whole_state() -> None:
    keys, values = torch.randn(2, 4, 6, 1, 2), torch.randn(2, 4, 6, 1, 2)
    window, state = torch.randn(3, 4, 3, 5), torch.randn(3, 4, 2, 2, 2)
    old = [part.clone() for part in (keys, values, window, state)]
    reference.fork_copy(keys, values, window, state, 1, index([3, 0]), 4)
    for part, before in zip((keys, values), old, strict=False):
        for slot in (3, 0):
            assert torch.equal(part[:, slot, :4], before[:, 1, :4])
            assert torch.equal(part[:, slot, 4:], before[:, slot, 4:])
        assert torch.equal(part[:, 1:3], before[:, 1:3])
    for part, before in zip((window, state), old[2:], strict=True):
        assert torch.equal(part, before[:, [1, 1, 2, 1]])


@pytest.mark.parametrize(("start", "count"), [(0, 3), (2, 0), (5, 9), (8, 1)])
def test_provenance_stamp_marks_a_span_and_no_more(start: int, count: int) -> None:
    provenance = torch.full((3, 8), -1, dtype=torch.int8)
    writers = index([4])
    reference.provenance_stamp(provenance, index([1]), index([start]), index([count]), writers)
    marked = [4 if start <= m < start + count else -1 for m in range(8)]
    assert provenance.tolist() == [[-1] * 8, marked, [-1] * 8]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_cache_digest_is_the_documented_sum(dtype: torch.dtype) -> None:
    keys, values = torch.randn(2, 2, 5, 1, 3).to(dtype), torch.randn(2, 2, 5, 1, 3).to(dtype)
    window, state = torch.randn(2, 2, 2, 3).to(dtype), torch.randn(2, 2, 1, 2, 2)

    def bits(tensor: torch.Tensor) -> list[int]:
        kind, mask = (
            (torch.int16, 0xFFFF) if tensor.element_size() == 2 else (torch.int32, MASK >> 32)
        )
        return [v & mask for v in tensor.contiguous().view(kind).flatten().tolist()]

    def total(tensor: torch.Tensor, part: int) -> int:
        return sum(
            splitmix(splitmix(((4 * i + part) * GOLDEN + 1) & MASK) ^ b)
            for i, b in enumerate(bits(tensor))
        )

    attention, recurrent = reference.cache_digest(
        keys, values, window, state, index([1, 0]), index([5, 2]), block=2
    )
    for layer in range(2):
        for i, (row, length) in enumerate(((1, 5), (0, 2))):
            for block in range(3):
                span = slice(block * 2, min(block * 2 + 2, max(length, block * 2)))
                wanted = total(keys[layer, row, span], 0) + total(values[layer, row, span], 1)
                assert attention[layer, i, block] == signed(wanted)
            wanted = total(window[layer, row], 2) + total(state[layer, row], 3)
            assert recurrent[layer, i] == signed(wanted)


@settings(max_examples=20, deadline=None)
@given(
    seed=st.integers(-(2**63), 2**63 - 1),
    position=st.integers(0, 2**40),
    stream=st.integers(0, 2),
    weights=st.lists(st.floats(0, 1e6, width=32), min_size=1, max_size=9).filter(any),
)
def test_race_sample_is_the_exponential_race(
    seed: int, position: int, stream: int, weights: list[float]
) -> None:
    scores = [w / -math.log(uniform(seed, position, stream, i)) for i, w in enumerate(weights)]
    drawn = reference.race_sample(torch.tensor([weights]), index([seed]), index([position]), stream)
    assert scores[int(drawn)] >= max(scores) * (1 - 1e-12)


def test_race_sample_draws_in_proportion() -> None:
    weights = torch.tensor([1.0, 0.0, 2.0, 5.0])
    number = 20_000
    drawn = reference.race_sample(
        weights.expand(number, 4), torch.full((number,), 7), torch.arange(number)
    )
    share = torch.bincount(drawn, minlength=4) / number
    assert share[1] == 0
    torch.testing.assert_close(share, weights / 8, atol=0.015, rtol=0)


def test_uniform_is_never_zero_or_one() -> None:
    # splitmix's finaliser maps 0 to 0 and is a bijection; its largest output is the danger.
    largest = ((1 << 52) - 1 + 0.5) * 2.0**-52
    assert 0 < 0.5 * 2.0**-52 < largest < 1
    drawn = reference._uniform(index([0]), index([0]), 0, torch.arange(100_000))
    assert float(drawn.min()) > 0 and float(drawn.max()) < 1


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 2**31), counts=st.lists(st.integers(0, 3), min_size=1, max_size=3))
def test_accept_resample_is_algorithm_1(seed: int, counts: list[int]) -> None:
    torch.manual_seed(seed)
    rows, width, size = len(counts), 3, 4
    target = torch.rand(rows, width + 1, size).softmax(-1)
    draft = torch.rand(rows, width, size).softmax(-1)
    ids = torch.randint(size, (rows, width))
    seeds, positions = torch.arange(rows) + seed, torch.arange(rows) * 10
    accepted, following = reference.accept_resample(
        target, draft, ids, index(counts), seeds, positions
    )
    for r, count in enumerate(counts):
        n = 0
        while n < count:
            p, q = float(target[r, n, ids[r, n]]), float(draft[r, n, ids[r, n]])
            if uniform(int(seeds[r]), int(positions[r]) + n, 1, 0) * q >= p:
                break
            n += 1
        after = target[r, n].double()
        if n < count:
            after = (after - draft[r, n].double()).clamp(min=0)
        scores = [
            float(w) / -math.log(uniform(int(seeds[r]), int(positions[r]) + n, 2, i))
            for i, w in enumerate(after)
        ]
        assert int(accepted[r]) == n
        assert scores[int(following[r])] >= max(scores) * (1 - 1e-12)


def test_accept_resample_gives_the_targets_distribution() -> None:
    """The first new id, accepted or resampled, is distributed as p whatever q is."""
    number, size = 40_000, 4
    p, q = torch.tensor([0.1, 0.2, 0.3, 0.4]), torch.tensor([0.4, 0.3, 0.3, 0.0])
    at = torch.arange(number)
    ids = reference.race_sample(q.expand(number, size), torch.full_like(at, 3), at)[:, None]
    accepted, following = reference.accept_resample(
        p.expand(number, 2, size),
        q.expand(number, 1, size),
        ids,
        torch.ones_like(at),
        torch.full_like(at, 3),
        at,
    )
    first = torch.where(accepted > 0, ids[:, 0], following)
    share = torch.bincount(first, minlength=size) / number
    torch.testing.assert_close(share, p, atol=0.01, rtol=0)


def test_accept_resample_without_residual_draws_from_the_target() -> None:
    # p == q everywhere, but the id is rejected: q(id) is 0, which only rounding can bring about.
    p = torch.tensor([[[0.5, 0.5, 0.0], [1.0, 0.0, 0.0]]])
    accepted, following = reference.accept_resample(
        p, p[:, :1], index([2])[None], index([1]), index([5]), index([9])
    )
    assert int(accepted) == 0
    assert int(following) in (0, 1)
