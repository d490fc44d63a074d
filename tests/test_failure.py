"""A verb that fails leaves every sequence as it was, wherever in the verb it fails."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from cascade import passes
from cascade.batch import Batch
from cascade.cache import Cache
from cascade.errors import (
    CacheFull,
    CapacityExceeded,
    NumericalError,
    RequestError,
    SequenceClosed,
    SequenceError,
    SliceError,
)
from cascade.model import ElasticModel
from cascade.sequence import Consistency, Sequence
from tests.faults import FaultyKernels, Injected
from tests.nested import elastic, parent

PROMPT = [5, 9, 2, 33, 60, 1, 17, 17, 40, 8]
FOLDING = ("ssm_commit", "conv_commit", "provenance_stamp", "journal_keep")
ERRORS = [MemoryError("out of memory"), KeyboardInterrupt(), RuntimeError("device lost")]


@pytest.fixture(scope="module")
def kernels() -> FaultyKernels:
    return FaultyKernels(elastic(parent("M")).kernels)


@pytest.fixture(scope="module")
def model(kernels: FaultyKernels) -> ElasticModel:
    model = elastic(parent("M*EM-"))
    model.kernels = kernels
    return model


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch, kernels: FaultyKernels) -> Iterator[None]:
    monkeypatch.setattr(passes, "PREFILL_CHUNK", 4)
    monkeypatch.setattr(passes, "SNAPSHOT_INTERVAL", 6)
    yield
    kernels.disarm()


@pytest.fixture
def cache(model: ElasticModel) -> Cache:
    return model.cache(max_batch=4, max_length=32, max_draft=6)


def mixed(model: ElasticModel, cache: Cache, mode: Consistency) -> Sequence:
    """A sequence with a past: written by two slices, with drafts pending."""
    sequence = model.sequence(cache=cache, consistency=mode)
    sequence.append(PROMPT, "large")
    sequence.draft(3, "small")
    sequence.commit(2)  # not verified
    sequence.draft(4, "medium")
    return sequence


VERBS: dict[str, Callable[[Sequence], Any]] = {
    "append": lambda seq: seq.append([7, 8, 9], "large"),
    "append, several chunks": lambda seq: seq.append(list(range(15)), "large"),
    "append, nothing to repair": lambda seq: seq.append([7, 8], "medium"),
    "draft": lambda seq: seq.draft(2, "small"),
    "draft, the same slice": lambda seq: seq.draft(2, "medium"),
    "verify": lambda seq: seq.verify("large"),
    "verify, the same slice": lambda seq: seq.verify("medium"),
    "commit": lambda seq: seq.commit(3),
    "rollback": lambda seq: seq.rollback(9),
    "rollback far": lambda seq: seq.rollback(3),
    "refresh": lambda seq: seq.refresh("large"),
    "fork": lambda seq: seq.fork(2),
    "audit": lambda seq: seq.audit("large"),
}


def told(seq: Sequence) -> tuple[Any, ...]:
    """All that a sequence says of itself."""
    proposals = [row.tolist() for row in seq.proposals]
    rows = [row.tolist() for row in seq.rows]
    return seq.tokens, seq.drafted, seq.provenance[:-1], seq.length, proposals, rows


def continuation(seq: Sequence) -> list[torch.Tensor]:
    """What the sequence goes on to say, and the cache it has then."""
    seq.commit(len(seq.drafted))
    provenance = seq.provenance
    after = [seq.append([3], "medium"), *seq.rows]
    seq.draft(3, "small")
    after += [seq.verify("large"), seq.append([4], "small")]
    cache, slot, end = seq.cache, seq.slot.index, seq.slot.folded
    after += [cache.window[:, slot], cache.state[:, slot]]
    after += [cache.keys[:, slot, :end], cache.values[:, slot, :end]]
    after.append(torch.tensor([list(seq.model.slices).index(name) for name in provenance]))
    return after


def assert_untouched(failed: Sequence, twin: Sequence) -> None:
    """`failed` is as `twin`, which never made the call."""
    assert told(failed) == told(twin)
    for slice in ("small", "large"):
        mine, its = failed.audit(slice), twin.audit(slice)
        assert mine.tokens == its.tokens
        assert mine.max_relative_error == pytest.approx(its.max_relative_error, abs=1e-4, rel=1e-3)
    torch.testing.assert_close(continuation(failed), continuation(twin), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("mode", ["exact", "shared", "refresh"])
@pytest.mark.parametrize("verb", VERBS)
def test_a_kernel_that_raises_anywhere_leaves_no_trace(
    model: ElasticModel, cache: Cache, kernels: FaultyKernels, mode: Consistency, verb: str
) -> None:
    failures = 0
    for call in (*range(6), *range(6, 200, 9)):
        seq, twin = mixed(model, cache, mode), mixed(model, cache, mode)
        kernels.arm(call)
        try:
            result = VERBS[verb](seq)
        except Injected:
            failures += 1
            assert_untouched(seq, twin)
        else:
            for fork in result if verb == "fork" else ():
                fork.close()
            assert kernels.armed  # the verb has fewer kernel calls than that
        finally:
            kernels.disarm()
            seq.close()
            twin.close()
        if call and not failures:
            break
    assert failures or verb == "commit" or verb.endswith("the same slice") or verb == "refresh"
    assert cache.free_slots == cache.max_batch
