"""A commit as a CUDA graph does what its kernels do one by one."""

from types import ModuleType, SimpleNamespace

import pytest
import torch

from cascade.batch import Batch
from cascade.cache import Cache
from tests.nested import elastic, parent

pytestmark = pytest.mark.gpu


def test_commits_replayed_from_a_graph_are_those_of_single_launches(cuda: ModuleType) -> None:
    model = elastic(parent("M*E*M").cuda())
    graphed = model.cache(max_batch=4, max_length=96, max_draft=8)
    single = model.cache(max_batch=4, max_length=96, max_draft=8)
    single.kernels = SimpleNamespace(**{**vars(cuda), "CAPTURABLE": False})  # type: ignore[assignment]
    for rows in (1, 3, 2):
        for cache in (graphed, single):
            drive(model, cache, rows)
        for name in ("state", "window", "provenance", "keys", "values"):
            assert torch.equal(getattr(graphed, name), getattr(single, name)), name
    assert set(graphed._graphs) == {1, 2, 3}
    assert not single._graphs


def drive(model: object, cache: Cache, rows: int) -> None:
    """Prompts, then drafts, verifications and commits of which no row keeps the same count."""
    sequences = [model.sequence(cache=cache) for _ in range(rows)]  # type: ignore[attr-defined]
    batch = Batch(sequences)
    batch.append([[1 + r, 2, 3, 4 + r] for r in range(rows)], "large")
    for round_ in range(6):
        batch.draft([6] * rows, "small")
        batch.verify("large")
        batch.commit([(round_ + 2 * r) % 5 + 1 for r in range(rows)])
    assert all(s.audit("large").ok for s in sequences)
    for sequence in sequences:
        sequence.close()
