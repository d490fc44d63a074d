"""The kernels of a short pass against their definitions in plain PyTorch, computed in fp32.

On a GPU, and thread by thread on any machine with g++. Outputs hold NaN before each call, and so
does what a kernel must not read.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from cascade.kernels import checks, experts_pairs, mamba_decode, tile_stream
from cascade.kernels import reference_decode as reference
from cascade.kernels.experts_pairs import most_together
from cascade.kernels.plan import Choice, Plan
from cascade.kernels.reference_layers import rms_norm

BF16, F32 = torch.bfloat16, torch.float32
TOLERANCE = 1.2e-2  # of a relative norm; bf16 rounds to 2e-3, and squares twice that


def normal(*shape: int, scale: float = 1.0, device: str = "cpu") -> Tensor:
    return (torch.randn(*shape, device=device) * scale).to(BF16)


def prefix(rows: int, columns: int, device: str, pad: int = 24) -> Tensor:
    """The first rows and columns of a larger matrix, as a slice's weights are."""
    return normal(rows + 3, columns + pad, scale=columns**-0.5, device=device)[:rows, :columns]


def unwritten(*shape: int, device: str, dtype: torch.dtype = BF16) -> Tensor:
    return torch.full(shape, math.nan, device=device).to(dtype)


def wide(value: Any) -> Any:
    """bf16 tensors as fp32 ones."""
    if isinstance(value, Tensor):
        return value.float() if value.dtype == BF16 else value
    return type(value)(map(wide, value)) if isinstance(value, (list, tuple)) else value


def distance(got: Tensor, want: Tensor) -> float:
    got, want = got.float(), want.float()
    assert got.isfinite().all()
    return float((got - want).norm() / want.norm().clamp(min=1e-9))


def assert_near(got: Sequence[Tensor], want: Sequence[Tensor]) -> None:
    for mine, its in zip(got, want, strict=True):
        assert distance(mine, its) <= TOLERANCE


def decided(x: Tensor, norm: Tensor, experts: int, counts: Tensor, top_k: int) -> Choice:
    """A choice in which no token's experts hang on the rounding of a logit."""
    device, normed = str(x.device), rms_norm(wide(x), wide(norm), 1e-5)
    while True:
        router, bias = prefix(experts, x.shape[1], device), torch.randn(experts, device=device)
        scores = (normed @ wide(router).T).sigmoid() + bias
        last, first_left = scores.topk(top_k + 1).values[:, -2:].T
        if (last - first_left).min() > 2e-3:
            return Choice(router, bias, counts, top_k, True, 2.5)


# ---- products ----------------------------------------------------------------------------------


@pytest.mark.parametrize("team", [1, 2, 4, 8])
@pytest.mark.parametrize(("rows", "kind"), [(3, "store"), (61, "relu2"), (150, "add")])
def test_a_tile_may_have_any_team(
    short: Any, device: str, team: int, rows: int, kind: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tile_stream, "team", lambda *sizes: team)
    x, norm, weight = (
        normal(5, 328, device=device),
        normal(328, device=device),
        prefix(rows, 328, device),
    )
    for given in (None, norm):
        out = normal(5, -(-rows // 8) * 8, device=device)[:, :rows]
        expected = wide(out.clone())
        reference.norm_linear(wide(x), [wide(weight)], [expected], [kind], wide(given), eps=1e-5)
        short.skinny_linear(x, [weight], [out], [kind], given, eps=1e-5)
        assert_near([out], [expected])


@pytest.mark.parametrize("norm", ["none", "whole", "groups"])
@pytest.mark.parametrize("depth", [24, 264, 512, 1000, 1024])
@pytest.mark.parametrize("tokens", [1, 3, 8, 9, 17, 32])
def test_skinny_linear(short: Any, device: str, tokens: int, depth: int, norm: str) -> None:
    x = normal(tokens, depth + 8, device=device)[:, :depth]
    weights = [prefix(40, depth, device), prefix(17, depth, device), prefix(5, depth, device)]
    outs = [
        unwritten(tokens, 56, device=device)[:, :40],
        unwritten(tokens, 20, device=device, dtype=F32)[:, :17],
        normal(tokens, 8, device=device)[:, :5],
    ]
    kinds: list[reference.Kind] = ["relu2", "store", "add"]
    options: dict[str, Any] = {}
    if norm != "none":
        options = {"norm": normal(depth, device=device), "eps": 1e-5}
    if norm == "groups":
        groups = {264: 3, 512: 8, 1024: 8}.get(depth, 1)
        squares = x.float().unflatten(-1, (2 * groups, -1)).pow(2).sum(-1)
        options |= {"groups": groups, "squares": squares.contiguous()}
    expected = [wide(out.clone()) for out in outs]
    given = {name: wide(value) for name, value in options.items()}
    reference.norm_linear(wide(x), wide(weights), expected, kinds, **given)
    short.skinny_linear(x, weights, outs, kinds, **options)
    assert_near(outs, expected)


def test_skinny_linear_refuses_what_it_cannot_do(short: Any, device: str) -> None:
    x, weight = normal(2, 32, device=device), prefix(8, 32, device)
    out = unwritten(2, 8, device=device)
    for arguments, message in (
        ((x[:, :30], [weight[:, :30]], [out], ["store"]), "multiple of 8"),
        ((x, [weight[:, :24]], [out], ["store"]), r"weights\[0\] has shape"),
        ((x, [weight.T.contiguous().T], [out], ["store"]), "strides"),
        ((x, [weight], [out.float()], ["add"]), "kinds"),
        ((x.float(), [weight], [out], ["store"]), "float32"),
        ((x, [weight], [out], ["store"], x[0].contiguous(), None, 4), "squares"),
    ):
        with pytest.raises(checks.KernelArgumentError, match=message):
            short.skinny_linear(*arguments)
    assert out.isnan().all()


@pytest.mark.parametrize("groups", [1, 3])
def test_group_norm(short: Any, device: str, groups: int) -> None:
    x, norm = normal(5, 280, device=device)[:, :264], normal(264, device=device)
    out = unwritten(5, 264, device=device)
    short.group_norm(x, norm, groups, 1e-5, out)
    parts = x.float().unflatten(-1, (groups, -1))
    normed = parts * torch.rsqrt(parts.pow(2).mean(-1, keepdim=True) + 1e-5)
    assert_near([out], [norm.float() * normed.flatten(-2)])


# ---- tokens ------------------------------------------------------------------------------------


def test_embed_tokens(short: Any, device: str) -> None:
    embeddings = normal(50, 40, device=device)[:, :32]
    ids = torch.tensor([[3, -1], [-1, 49], [7, 8]], device=device)
    latest, slots = (torch.tensor(x, device=device) for x in ([5, 6, 7], [2, 0, -1]))
    hidden = unwritten(6, 32, device=device)
    short.embed_tokens(hidden, embeddings, ids, latest, slots)
    assert torch.equal(hidden, embeddings[torch.tensor([3, 7, 5, 49, 7, 8], device=device)])


@pytest.mark.parametrize("size", [999, 1000, 1, 5003, 1029])
def test_pick_tokens_of_padded_rows(short: Any, device: str, size: int) -> None:
    """What lies behind a row's last logit is not read as one, wherever the best of it is."""
    places = sorted({0, size // 2, size - 1})
    logits = unwritten(len(places), -(-size // 4) * 4, device=device, dtype=F32)[:, :size]
    logits.copy_(torch.randn(len(places), size, device=device) - 9)
    for row, place in enumerate(places):
        logits[row, place] = 1.0
    picked, latest = (torch.full((3,), -7, device=device) for _ in range(2))
    picked, slots = picked[: len(places)], torch.arange(len(places), device=device)
    short.pick_tokens(logits, picked, latest, slots)
    assert picked.tolist() == latest[: len(places)].tolist() == places


def test_pick_tokens_of_a_large_vocabulary(short: Any, device: str) -> None:
    """More loads than a row's threads have under way at once, in one block a row and in many."""
    rows, size = (1, 600_001) if device == "cuda" else (520, 5001)
    logits = torch.randn(rows, size + 3, device=device)[:, :size]
    picked, slots = (torch.arange(rows, device=device) for _ in range(2))
    latest = torch.full((rows,), -7, device=device)
    short.pick_tokens(logits, picked, latest, slots)
    assert torch.equal(picked, logits.argmax(1)) and torch.equal(latest, picked)


def test_pick_tokens_moves_the_table_on(short: Any, device: str) -> None:
    """Of the rows that count; by the kernel as by its definition."""
    columns = [[2, -1, 0], [9, 0, 31], [4, 0, 0], [1, 0, 1], [17, -1, -1]]
    moved = [[2, -1, 0], [10, 0, 32], [5, 0, 1], [1, 0, 1], [-1, -1, -1]]
    logits = torch.randn(3, 1000, device=device)
    for pick in (short.pick_tokens, reference.pick_tokens):
        table = torch.tensor(columns, device=device)
        latest, picked = torch.full((3,), -7, device=device), torch.full((3,), -7, device=device)
        pick(logits, picked, latest, table[0], table)
        assert picked.tolist() == logits.argmax(1).tolist()
        assert latest.tolist() == [picked[2], -7, picked[0]]
        assert table.tolist() == moved


def test_pick_tokens(short: Any, device: str) -> None:
    logits = torch.randn(6, 1000, device=device)
    logits[1, 3] = math.nan
    logits[2, [5, 900]] = 9.0
    logits[3, 7] = -math.inf
    logits[4] = -logits[4].abs() - 1
    slots = torch.tensor([4, 1, -1, 0, 2, 3], device=device)
    latest, picked = torch.full((6,), -7, device=device), torch.full((6,), -7, device=device)
    for _ in range(2):
        short.pick_tokens(logits, picked, latest, slots)
    best = logits.nan_to_num(-math.inf).argmax(1)
    assert picked.tolist() == [int(best[0]), -1, 5, -1, int(best[4]), int(best[5])]
    assert latest.tolist() == [picked[i] if i >= 0 else -7 for i in (3, 1, 4, 5, 0, -1)]


# ---- the layers between the products -----------------------------------------------------------


@pytest.mark.parametrize(
    ("rows", "length", "old", "blocks"),
    [(1, 1, 0, 128), (3, 1, 5, 128), (3, 1, 5, 1), (2, 9, 3, 128), (3, 20, 4, 128)]
    # With 150 entries several heads of the largest do not fit into a block.
    + [(3, 1, old, 1) for old in (0, 1, 15, 16, 17, 33, 64, 150)],
)
@pytest.mark.parametrize(
    ("heads", "dim", "size", "groups", "state_dtype"),
    [
        (4, 32, 32, 1, F32),
        (8, 8, 16, 2, F32),
        (4, 64, 128, 2, BF16),
        (4, 24, 64, 4, F32),
        (8, 64, 128, 1, F32),
        (6, 64, 16, 1, F32),
    ],
)
def test_mamba_step(
    short: Any,
    device: str,
    heads: int,
    dim: int,
    size: int,
    groups: int,
    state_dtype: torch.dtype,
    rows: int,
    length: int,
    old: int,
    blocks: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(mamba_decode, "BLOCKS", blocks)
    held, slots_held = max(26, old * 5 // 4), rows + 2
    inner, channels = heads * dim, heads * dim + 2 * groups * size
    width, columns = inner + groups * size, inner + channels + heads
    slots = torch.randperm(slots_held, device=device)[:rows]
    sources = torch.randperm(slots_held, device=device)[:rows]
    entries = torch.randint(0, old + 1, (rows,), device=device)
    counts = torch.randint(0, length + 1, (rows,), device=device)
    entries[0], counts[-1] = old, length
    if rows > 2:
        slots[1] = -1
    journal = (
        normal(slots_held, held, channels, device=device),
        normal(slots_held, held, width, device=device),
        torch.rand(slots_held, held, heads, device=device),
    )
    unread = torch.ones(slots_held, held, dtype=torch.bool, device=device)
    unread[sources] = torch.arange(held, device=device) >= entries[:, None]
    for part in journal:
        part[unread] = math.nan
    projected = normal(rows * length, -(-columns // 8) * 8, device=device)[:, :columns]
    fixed = (
        projected,
        torch.randn(slots_held, heads, dim, size, device=device).to(state_dtype),
        normal(slots_held, 3, channels, device=device),
    )
    weights = (
        normal(channels, 4, device=device),
        normal(channels, device=device),
        normal(heads, device=device),
        -torch.rand(heads, device=device) - 0.1,
        normal(heads, device=device),
        0.001,
    )
    numbers = slots, sources, entries, counts
    expected = wide(tuple(part.clone() for part in journal))
    before = tuple(part.clone() for part in journal)
    found = [unwritten(rows * length, inner, device=device)]
    found.append(unwritten(rows * length, heads, device=device, dtype=F32))
    wanted = [wide(part.clone()) for part in found]
    cleared = tuple(part.masked_fill(unread[..., None], 0) for part in expected)
    reference.mamba_step(*wide(fixed), cleared[:3], *wide(weights), *numbers, *wanted)
    short.mamba_step(*fixed, journal, *weights, *numbers, *found)
    assert_near(found[:1], wanted[:1])
    assert distance(found[1], wanted[1]) <= 2 * TOLERANCE
    new = torch.zeros_like(unread)
    for row in range(rows):
        if slots[row] >= 0:
            new[sources[row], entries[row] : entries[row] + counts[row]] = True
    for mine, its, old_part in zip(journal, cleared, before, strict=True):
        if new.any():
            assert distance(mine[new], its[new]) <= TOLERANCE
        assert torch.equal(mine[~new].nan_to_num(7), old_part[~new].nan_to_num(7))


@pytest.mark.parametrize("splits", ["one", "many"])
@pytest.mark.parametrize(("rows", "length"), [(1, 1), (3, 1), (2, 5)])
@pytest.mark.parametrize(
    ("dim", "kv_heads", "group"), [(16, 2, 2), (32, 2, 1), (64, 1, 5), (128, 2, 16)]
)
def test_slot_attention(
    short: Any,
    device: str,
    dim: int,
    kv_heads: int,
    group: int,
    rows: int,
    length: int,
    splits: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import sys

    launcher = sys.modules["cascade.kernels.slot_attention"]
    monkeypatch.setattr(launcher, "BLOCKS", 1 if splits == "one" else 264)
    held, slots_held = 150, rows + 1
    slots = torch.randperm(slots_held, device=device)[:rows]
    starts = torch.randint(0, held - length, (rows,), device=device)
    counts = torch.randint(1, length + 1, (rows,), device=device)
    starts[0], counts[0] = held - length, length
    if rows > 2:
        slots[1] = -1
    heads = kv_heads * group
    qkv = normal(rows * length, (heads + 2 * kv_heads) * dim, device=device)
    parts = qkv.split([heads * dim, kv_heads * dim, kv_heads * dim], 1)
    caches = [normal(slots_held, held, kv_heads, dim, device=device) for _ in range(2)]
    for slot, start in zip(slots.tolist(), starts.tolist(), strict=True):
        for cache in caches:
            if slot >= 0:
                cache[slot, start:] = math.nan
    expected = [cache.float().nan_to_num(0) for cache in caches]
    out, wanted = (unwritten(rows * length, heads * dim, device=device) for _ in range(2))
    wanted = wanted.float()
    reference.slot_attention(*wide(parts), *expected, slots, starts, counts, wanted)
    short.slot_attention(*parts, *caches, slots, starts, counts, out)
    assert_near([out], [wanted])
    for mine, its in zip(caches, expected, strict=True):
        assert torch.equal(mine.float().nan_to_num(0), its)


@pytest.mark.parametrize("many", [8, tile_stream.MANY])  # rows from which a third block pays
@pytest.mark.parametrize(
    ("rows", "length", "experts", "shared"),
    [(1, 1, 8, 24), (2, 5, 132, 304), (19, 1, 20, 8), (8, 4, 256, 40)],
)
def test_experts_are_chosen_on_the_way(
    short: Any,
    device: str,
    rows: int,
    length: int,
    experts: int,
    shared: int,
    many: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(tile_stream, "MANY", many)
    tokens, depth, width, top_k = rows * length, 264, 40, 3
    counts = torch.full((rows,), length, device=device)
    counts[-1] = min(1, length)
    plan, expected = (Plan.empty(tokens, experts, top_k, torch.device(device)) for _ in range(2))
    x, norm = normal(tokens, depth, device=device), normal(depth, device=device)
    choice = decided(x, norm, experts, counts, top_k)
    up = normal(experts, width + 8, depth + 16, scale=depth**-0.5, device=device)
    up, shared_up = up[:, :width, :depth], prefix(shared, depth, device)
    inner = unwritten(tokens * top_k, width, device=device)
    dense = unwritten(tokens, shared, device=device)
    wanted, wanted_dense = wide(inner.clone()), wide(dense.clone())
    exact = choice._replace(router=wide(choice.router))
    reference.experts_up(
        wide(x), wide(norm), 1e-5, exact, wide(up), expected, wanted, wide(shared_up), wanted_dense
    )
    for _ in range(2):
        short.experts_few(x, norm, 1e-5, choice, up, plan, inner, shared_up, dense)
    items, pairs = int(expected.counts[0]), int(counts.sum()) * top_k
    assert torch.equal(plan.counts, expected.counts)
    assert torch.equal(plan.items[:, :items], expected.items[:, :items])
    assert torch.equal(plan.tokens[:pairs], expected.tokens[:pairs])
    valid = expected.places >= 0
    assert torch.equal(plan.places, expected.places)
    assert_near([plan.weights[:pairs]], [expected.weights[:pairs]])
    assert_near([plan.shares[valid]], [expected.shares[valid]])
    assert_near([dense, inner[:pairs]], [wanted_dense, wanted[:pairs]])
    assert (plan.logits.view(torch.int32) == -1).all()


def test_a_token_that_does_not_count_chooses_no_expert(short: Any, device: str) -> None:
    experts, depth, top_k = 8, 72, 2
    choice = Choice(
        prefix(experts, depth, device),
        torch.randn(experts, device=device),
        torch.zeros(1, dtype=torch.int64, device=device),
        top_k,
        True,
        1.0,
    )
    plan = Plan.empty(1, experts, top_k, torch.device(device))
    x, norm = normal(1, depth, device=device), normal(depth, device=device)
    up, shared_up = normal(experts, 16, depth, device=device), prefix(24, depth, device)
    inner, dense = unwritten(top_k, 16, device=device), unwritten(1, 24, device=device)
    short.experts_few(x, norm, 1e-5, choice, up, plan, inner, shared_up, dense)
    assert plan.counts.tolist() == [0, 0]
    assert plan.places.tolist() == [-1, -1]
    assert inner.isnan().all()
    assert dense.isfinite().all()


def test_a_choice_on_the_way_has_its_limits(short: Any, device: str) -> None:
    tokens, experts, top_k = 32, 32, 9
    plan = Plan.empty(tokens, experts, top_k, torch.device(device))
    x, norm = normal(tokens, 32, device=device), normal(32, device=device)
    counts = torch.ones(tokens, dtype=torch.int64, device=device)
    choice = decided(x, norm, experts, counts, top_k)
    up, shared_up = normal(experts, 8, 32, device=device), normal(8, 32, device=device)
    inner = unwritten(tokens * top_k, 8, device=device)
    dense = unwritten(tokens, 8, device=device)
    with pytest.raises(checks.KernelArgumentError, match="tokens times top_k is 288"):
        short.experts_few(x, norm, 1e-5, choice, up, plan, inner, shared_up, dense)
    few, none = choice._replace(top_k=2), (shared_up[:0], dense[:, :0])
    with pytest.raises(checks.KernelArgumentError, match="width of the shared expert is 0"):
        short.experts_few(x, norm, 1e-5, few, up, plan, inner, *none)
    others = Plan.empty(tokens, experts + 1, 2, torch.device(device))
    with pytest.raises(checks.KernelArgumentError, match="experts of the plan is 33"):
        short.experts_few(x, norm, 1e-5, few, up, others, inner[:64], shared_up, dense)
    others = plan._replace(item_tokens=16)
    with pytest.raises(checks.KernelArgumentError, match="tokens of an item is 16"):
        short.experts_few(x, norm, 1e-5, few, up, others, inner[:64], shared_up, dense)
    short.experts_up(x, norm, 1e-5, choice, up, plan, inner, shared_up, dense)
    expected = Plan.empty(tokens, experts, top_k, torch.device(device))
    reference.choose_experts(plan.logits, *choice[1:], expected)
    assert torch.equal(plan.counts, expected.counts)
    assert torch.equal(plan.tokens, expected.tokens)

    # Without a shared expert.
    choice = choice._replace(counts=choice.counts[:3], top_k=2)
    plan, expected = (Plan.empty(3, experts, 2, torch.device(device)) for _ in range(2))
    none = shared_up[:0], dense[:3, :0]
    short.experts_up(x[:3], norm, 1e-5, choice, up, plan, inner[:6], *none)
    reference.choose_experts(plan.logits, *choice[1:], expected)
    assert torch.equal(plan.counts, expected.counts)
    assert inner[:6].isfinite().all()


@pytest.mark.parametrize(
    ("rows", "length", "experts", "top_k", "depth", "width", "shared"),
    [
        (1, 1, 8, 2, 64, 40, 24),
        (3, 1, 16, 3, 72, 48, 48),
        (2, 5, 128, 6, 96, 40, 80),
        (70, 1, 16, 4, 40, 24, 32),
        (1, 9, 4, 2, 200, 200, 8),
        (25, 1, 12, 2, 264, 56, 200),
        (9, 20, 6, 3, 136, 72, 16),
    ],
)
def test_experts(
    short: Any,
    device: str,
    rows: int,
    length: int,
    experts: int,
    top_k: int,
    depth: int,
    width: int,
    shared: int,
) -> None:
    tokens = rows * length
    counts = torch.randint(0, length + 1, (rows,), device=device)
    counts[0] = length
    x, norm = normal(tokens, depth + 8, device=device)[:, :depth], normal(depth, device=device)
    choice = decided(x, norm, experts, counts, top_k)
    normed = rms_norm(wide(x), wide(norm), 1e-5)
    logits = normed @ wide(choice.router).T
    together = most_together(max(depth, width), 0)
    plan, expected = (
        Plan.empty(tokens, experts, top_k, torch.device(device), together) for _ in range(2)
    )
    reference.choose_experts(logits, *choice[1:], expected)
    short.choose_experts(logits, *choice[1:], plan)
    items, pairs = int(expected.counts[0]), int(counts.sum()) * top_k
    assert torch.equal(plan.counts, expected.counts)
    assert torch.equal(plan.items[:, :items], expected.items[:, :items])
    assert torch.equal(plan.tokens[:pairs], expected.tokens[:pairs])
    torch.testing.assert_close(plan.weights[:pairs], expected.weights[:pairs])

    up = normal(experts, width + 8, depth + 16, scale=depth**-0.5, device=device)
    down = normal(experts, depth + 8, width + 8, scale=width**-0.5, device=device)
    up, down = up[:, :width, :depth], down[:, :depth, :width]
    shared_up, shared_down = prefix(shared, depth, device), prefix(depth, shared, device)
    inner = unwritten(tokens * top_k, width, device=device)
    dense = unwritten(tokens, shared + 8, device=device)[:, :shared]
    wanted, wanted_dense = wide(inner.clone()), wide(dense.clone())
    exact = choice._replace(router=wide(choice.router))
    weights = wide(x), wide(norm), 1e-5, exact, wide(up), expected
    reference.experts_up(*weights, wanted, wide(shared_up), wanted_dense)
    if tokens <= 32 and tokens * top_k <= 256:
        short.experts_few(x, norm, 1e-5, choice, up, plan, inner, shared_up, dense)
        assert_near([dense, inner[:pairs]], [wanted_dense, wanted[:pairs]])
        assert inner[pairs:].isnan().all()
        inner.fill_(math.nan)
    short.experts_pairs_up(normed.to(BF16), up, plan, inner)
    assert_near([inner[:pairs]], [wanted[:pairs]])
    assert inner[pairs:].isnan().all()

    dense.copy_(wanted_dense)
    result = wide(x.clone())
    reference.experts_down(
        result, wide(inner), wide(down), expected, wide(dense.clone()), wide(shared_down)
    )
    if tokens <= 32:
        summed = x.clone()
        short.experts_sum(summed, inner, down, plan, dense, shared_down)
        assert_near([summed], [result])
    apart = unwritten(tokens * top_k, depth, device=device, dtype=F32)
    short.experts_pairs_down(inner, down, plan, apart)
    assert apart[pairs:].isnan().all()
    combined, again = x.clone(), x.clone()
    short.combine_pairs(combined, apart, plan.places, plan.shares)
    short.combine_pairs(again, apart.to(BF16), plan.places, plan.shares)
    assert_near([again], [wide(combined)])
    combined += (wide(dense.clone()) @ wide(shared_down).T).to(BF16)
    assert_near([combined], [result])


@pytest.mark.parametrize("room", [32, 35, 64, None])  # pairs in shared memory at once
@pytest.mark.parametrize(
    ("tokens", "experts", "top_k", "depth", "width"),
    [(150, 6, 3, 72, 40), (33, 1, 1, 8, 8), (64, 12, 3, 392, 24), (40, 128, 6, 24, 8)],
)
def test_pairs_that_do_not_fit_at_once(
    short: Any,
    device: str,
    tokens: int,
    experts: int,
    top_k: int,
    depth: int,
    width: int,
    room: int | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if room is not None:
        monkeypatch.setattr(experts_pairs, "room", lambda depth, device: room)
    # The first experts get more tokens than the others, so that items are of all sizes.
    logits = torch.randn(tokens, experts, device=device) - torch.arange(experts, device=device) / 9
    counts = torch.ones(tokens, dtype=torch.int64, device=device)
    counts[tokens // 3] = 0
    plan = Plan.empty(tokens, experts, top_k, torch.device(device), 32)
    reference.choose_experts(
        logits, torch.zeros(experts, device=device), counts, top_k, True, 2.5, plan
    )
    pairs = int(counts.sum()) * top_k
    x, up = normal(tokens, depth, device=device), normal(experts, width, depth, device=device)
    inner, wanted = (unwritten(tokens * top_k, width, device=device) for _ in range(2))
    down = normal(experts, depth, width, device=device)
    apart, summed = (unwritten(tokens * top_k, depth, device=device, dtype=F32) for _ in range(2))
    for expert, first, count in plan.items[:, : int(plan.counts[0])].T.tolist():
        span = slice(first, first + count)
        of_tokens = wide(x[plan.tokens[span].long()])
        wanted[span] = (of_tokens @ wide(up[expert]).T).relu().square().to(BF16)
        summed[span] = wide(wanted[span]) @ wide(down[expert]).T
    short.experts_pairs_up(x, up, plan, inner)
    assert_near([inner[:pairs]], [wanted[:pairs]])
    short.experts_pairs_down(inner, down, plan, apart)
    assert_near([apart[:pairs]], [summed[:pairs]])
    assert inner[pairs:].isnan().all()
    assert apart[pairs:].isnan().all()


def test_pairs_have_their_limits(short: Any, device: str) -> None:
    plan = Plan.empty(40, 8, 2, torch.device(device), 32)
    depth = 10_000
    x, up = normal(40, depth, device=device), normal(8, 8, depth, device=device)
    inner = unwritten(80, 8, device=device)
    assert most_together(depth, 0) == 8
    with pytest.raises(checks.KernelArgumentError, match="pairs of an item is 32; expected 1 to 8"):
        short.experts_pairs_up(x, up, plan, inner)
    with pytest.raises(checks.KernelArgumentError, match="depth K is 9999"):
        short.experts_pairs_up(x[:, :9999], up[..., :9999], plan, inner)
    out = unwritten(80, 8, device=device, dtype=F32)
    with pytest.raises(checks.KernelArgumentError, match="rows of inner is 40"):
        short.experts_pairs_down(inner[:40], up[:, :8, :8], plan, out)


def test_choose_experts_survives_logits_that_are_no_numbers(short: Any, device: str) -> None:
    logits = torch.randn(5, 12, device=device)
    logits[1], logits[3, 4] = math.nan, math.inf
    counts = torch.ones(5, dtype=torch.int64, device=device)
    plan = Plan.empty(5, 12, 3, torch.device(device))
    short.choose_experts(logits, torch.zeros(12, device=device), counts, 3, True, 1.0, plan)
    items = plan.items[:, : int(plan.counts[0])]
    assert (items[0] < 12).all() and (items[1] + items[2] <= 15).all()
