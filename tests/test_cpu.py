"""The processor's short passes against the plain route: every verb, mode and layer kind."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from torch import Tensor

from cascade import cpu
from cascade.batch import Batch
from cascade.cache import Cache
from cascade.cpu import MOST_ROWS, CpuRunner
from cascade.kernels.cpu_spans import LONGEST
from cascade.model import ElasticModel
from cascade.runner import Runner
from cascade.sequence import MODES, Consistency, Sequence
from tests.nested import elastic, parent
from tests.test_parity import PATTERNS

PAIRS = {name: (pattern, sizes) for name, (pattern, sizes) in PATTERNS.items() if "M" in pattern}
LENGTH, DRAFT = 400, 9


def pair(pattern: str, **sizes: Any) -> tuple[ElasticModel, ElasticModel]:
    """One checkpoint, run the fast and the plain way."""
    source = parent(pattern, **sizes)
    fast, plain = elastic(source), elastic(source, backend="reference")
    assert type(fast.runner) is CpuRunner and type(plain.runner) is Runner
    return fast, plain


def opened(model: ElasticModel, modes: list[Consistency]) -> Batch:
    cache = model.cache(max_batch=len(modes) + 1, max_length=LENGTH, max_draft=DRAFT)
    return Batch([model.sequence(cache=cache, consistency=mode) for mode in modes])


def same(mine: Any, its: Any) -> None:
    """Equal to 1e-5 of the largest number."""
    if isinstance(mine, int):
        assert mine == its
    elif not isinstance(mine, Tensor):
        for a, b in zip(mine, its, strict=True):
            same(a, b)
    elif its.numel():
        largest = max(float(its.abs().max()), 1.0)
        torch.testing.assert_close(mine, its, atol=1e-5 * largest, rtol=0)


def held(row: Sequence) -> list[Tensor]:
    """What the cache holds of a row's tokens."""
    cache, slot, end = row.cache, row.slot.index, max(row.length - 1, 0)
    parts = cache.keys[:, slot, :end], cache.values[:, slot, :end]
    return [*parts, cache.window[:, slot], cache.state[:, slot]]


def poison(cache: Cache, rows: list[Sequence]) -> None:
    """NaN wherever nothing has been written that anyone may read."""
    for row in rows:
        slot, end = row.slot, row.length + len(row.drafted) - 1
        for part in (cache.keys, cache.values):
            part[:, slot.index, max(end, 0) :] = torch.nan
        for part in cache.journal.tensors():
            part[:, slot.index, slot.entries :] = torch.nan


@pytest.mark.parametrize("name", PAIRS)
def test_a_ragged_life_in_every_mode_is_the_plain_routes(name: str) -> None:
    """The same verbs on both; rows of several lengths, drafts and commits of several counts."""
    pattern, sizes = PAIRS[name]
    batches = [opened(model, [*MODES, "exact"]) for model in pair(pattern, **sizes)]
    chance = random.Random(name)
    prompts = [[chance.randrange(64) for _ in range(n)] for n in (1, 5, 70, LONGEST + 1)]

    def both(verb: str, *arguments: Any, **named: Any) -> Any:
        results = [getattr(batch, verb)(*arguments, **named) for batch in batches]
        if verb != "draft" and results[0] is not None:
            same(*results)
        return results[0]

    both("append", prompts, "large")
    for round_ in range(6):
        slices = chance.choices(["small", "medium", "large"], k=2)
        counts = [chance.randrange(DRAFT + 1) for _ in prompts]
        drafted = both("draft", counts, slices[0])
        assert drafted == [row.drafted for row in batches[1].sequences]
        same(*([row.rows for row in batch.sequences] for batch in batches))
        if any(drafted) and round_ != 2 and slices[0] != slices[1]:
            both("verify", slices[1])
        both("commit", [chance.randint(0, len(ids)) for ids in drafted])
        if round_ == 3:
            both("refresh", "medium")
            both("rollback", [max(row.length - 3, 0) for row in batches[0].sequences])
        if not all(row.length for row in batches[0].sequences):
            break
        for mine, its in zip(*(batch.sequences for batch in batches), strict=True):
            same(held(mine), held(its))
            assert mine.provenance == its.provenance


def test_nothing_is_read_that_has_not_been_written() -> None:
    batches = [opened(model, ["exact", "shared"]) for model in pair("MEM*E")]
    for batch in batches:
        batch.append([[1, 2, 3], [4]], "large")
    for k in ([3, 0], [DRAFT, 1], [2, 5]):
        for batch in batches:
            if batch is batches[0]:
                poison(batch.cache, batch.sequences)
            batch.draft(k, "small")
        same(*([row.rows for row in batch.sequences] for batch in batches))
        poison(batches[0].cache, batches[0].sequences)
        for mine, its in zip(*(batch.sequences for batch in batches), strict=True):
            if mine.drafted:
                same(mine.verify("large"), its.verify("large"))
        for batch in batches:
            batch.commit([count // 2 for count in k])


def test_a_token_at_a_time_is_a_pass_over_all_of_them() -> None:
    model, _ = pair("MEM*-")
    [one] = opened(model, ["exact"]).sequences
    one.append([3, 1, 4, 1, 5], "medium")
    drafted = one.draft(DRAFT, "medium")
    stepped = torch.stack(one.rows[:DRAFT])
    one.commit(0)
    one.propose(drafted)
    same(one.verify("medium")[:DRAFT], stepped)


def test_a_rows_tokens_do_not_depend_on_the_rows_beside_it() -> None:
    """Bit by bit, and whatever the others do."""
    model, _ = pair("MEM*E")
    batch = opened(model, ["exact"] * 3)
    batch.append([[1, 2], [3, 4, 5], [6]], "small")
    alone = [row.fork()[0] for row in batch.sequences[:1]]
    batch.draft([4, 9, 1], "small")
    alone[0].draft(4, "small")
    assert all(
        torch.equal(a, b) for a, b in zip(batch.sequences[0].rows, alone[0].rows, strict=False)
    )


def test_many_rows_are_the_plain_routes_too_while_they_become_few() -> None:
    rows = MOST_ROWS + 3
    batches = [opened(model, ["shared"] * rows) for model in pair("MEM*E")]
    for batch in batches:
        batch.append([[r, r + 1] for r in range(rows)], "small")
        batch.draft([1 + r % DRAFT for r in range(rows)], "small")
    same(*([row.rows for row in batch.sequences] for batch in batches))


def test_states_are_kept_from_one_token_to_the_next_and_never_longer(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A replay where a row starts, and another one wherever something else has written."""
    replayed: list[int] = []
    rows = cpu._rows

    def counted(*arguments: Any, own: bool) -> Any:
        replayed.append(len(arguments[2]) if own else 0)
        return rows(*arguments, own=own)

    monkeypatch.setattr(cpu, "_rows", counted)
    batches = [opened(model, ["shared", "shared"]) for model in pair("MEM*E")]

    def life(batch: Batch) -> list[Tensor]:
        first, second = batch.sequences
        batch.append([[1, 2, 3], [4, 5]], "small")
        replayed.clear()
        said = []
        for verb in (
            lambda: first.draft(3, "small"),  # knows the first row of logits: two tokens to run
            lambda: first.draft(2, "small"),
            lambda: second.draft(2, "small"),
            lambda: first.draft(1, "small"),
            lambda: first.verify("large"),
            lambda: first.commit(4),
            lambda: first.draft(3, "small"),
            lambda: first.draft(1, "large"),  # four tokens to run at once
            lambda: first.commit(0),
            lambda: first.draft(3, "large"),
        ):
            before = sum(replayed)
            verb()
            said += first.rows + second.rows
            costs.append(sum(replayed) - before)
        return said

    costs: list[int] = []
    mine, its = (life(batch) for batch in batches)
    same(mine, its)
    assert costs[:10] == [1, 0, 1, 1, 0, 0, 1, 0, 0, 1]
    assert costs[10:] == [0] * 10


def test_one_cache_after_another_and_a_cache_that_is_gone() -> None:
    model, plain = pair("MEM*E")
    for _ in range(3):
        rows = []
        for one in (model, plain):
            [row] = opened(one, ["exact"]).sequences
            row.append([9, 8, 7], "small")
            row.draft(3, "small")
            rows.append(row.rows)
        same(*rows)


def test_bfloat16_takes_the_plain_route() -> None:
    source = parent("MEM*E").bfloat16()
    rows = []
    for backend in ("auto", "reference"):
        model = elastic(source, backend=backend)
        assert model.kernels.__name__.endswith("cpu" if backend == "auto" else "reference")
        with model.sequence() as row:
            row.append([9, 8, 7], "small")
            row.draft(3, "small")
            row.verify("large")
            rows.append(row.rows)
    assert all(torch.equal(a, b) for a, b in zip(*rows, strict=True))
