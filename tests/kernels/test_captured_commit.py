"""A commit as a CUDA graph does what its kernels do one by one, and only where they are needed."""

from collections.abc import Sequence
from types import SimpleNamespace

import pytest
import torch

from cascade.batch import Batch
from cascade.cache import Cache
from cascade.kernels import load, reference
from tests.nested import elastic, parent


@pytest.fixture
def kernels(device: str, monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """Kernels whose commits may be captured; without a GPU, what a graph would hold is run."""
    if device == "cuda":
        return SimpleNamespace(**vars(load("cuda", "cuda")))
    from cascade.kernels.conv_commit import conv_commit
    from cascade.kernels.journal_keep import journal_keep
    from cascade.kernels.provenance_stamp import provenance_stamp
    from cascade.kernels.ssm_commit import ssm_commit

    def replay(cache: Cache, numbers: Sequence[tuple[int, ...]]) -> None:
        cache._launch(torch.tensor(list(zip(*numbers, strict=True))))
        cache._graphs[len(numbers)] = None  # type: ignore[assignment]

    monkeypatch.setattr(Cache, "_replay", replay)
    launchers = (conv_commit, journal_keep, provenance_stamp, ssm_commit)
    own = {launcher.__name__: launcher for launcher in launchers}
    known = {**vars(reference), **vars(load("cpu"))}
    return SimpleNamespace(**{**known, **own, "CAPTURABLE": True})


def test_commits_replayed_from_a_graph_are_those_of_single_launches(
    device: str, kernels: SimpleNamespace
) -> None:
    model = elastic(parent("M*E*M").to(device))
    graphed = model.cache(max_batch=9, max_length=96, max_draft=8)
    single = model.cache(max_batch=9, max_length=96, max_draft=8)
    graphed.kernels = kernels  # type: ignore[assignment]
    single.kernels = SimpleNamespace(**{**vars(kernels), "CAPTURABLE": False})  # type: ignore[assignment]
    for rows in (1, 3, 9, 2):
        for cache in (graphed, single):
            drive(model, cache, rows)
        for name in ("state", "window", "provenance", "keys", "values"):
            assert torch.equal(getattr(graphed, name), getattr(single, name)), name
    assert set(graphed._graphs) == {1, 2, 3, 10}  # nine rows, and one that is none
    assert not single._graphs


def drive(model: object, cache: Cache, rows: int) -> None:
    """Prompts, then drafts, verifications and commits of which no row keeps the same count.

    The last id of some rows was run, that of others was not: all drafted ones, or a bonus.
    """
    sequences = [model.sequence(cache=cache) for _ in range(rows)]  # type: ignore[attr-defined]
    batch = Batch(sequences)
    batch.append([[1 + r, 2, 3, 4 + r] for r in range(rows)], "large")
    for round_ in range(6):
        batch.draft([6] * rows, "small")
        if round_ % 2:
            batch.commit([6 - (round_ + r) % 3 for r in range(rows)])
            batch.draft([8] * rows, "small")
        batch.verify("large")
        bonus = [5 if (round_ + r) % 3 == 0 else None for r in range(rows)]
        batch.commit([(round_ + 2 * r) % 5 + 1 for r in range(rows)], bonus)
    batch.draft([8] * rows, "small")
    batch.verify("large")
    batch.commit([8] * rows, [5] * rows)  # every entry of the journal
    assert all(s.audit("large").ok for s in sequences)
    for sequence in sequences:
        sequence.close()
