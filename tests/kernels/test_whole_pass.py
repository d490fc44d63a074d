"""A short pass as a whole, its kernels run thread by thread, against plain PyTorch."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from cascade.bench import parity
from cascade.graphs import Decoder, GraphRunner
from cascade.kernels import experts_pairs
from cascade.model import ElasticModel
from cascade.shapes import random_model
from tests.kernels import emulator


@pytest.fixture
def kernels(_emulator: emulator.Emulator) -> Iterator[Any]:
    """The namespace of the CUDA kernels, which asks for CuPy only to be there."""
    name, product = "cascade.kernels.cuda", torch.mm
    known = sys.modules.pop(name, None)

    def mm(a: Tensor, b: Tensor, *, out: Tensor, out_dtype: torch.dtype | None = None) -> Tensor:
        """With `out_dtype`, which a processor does not know."""
        return product(a, b, out=out) if out_dtype is None else out.copy_(a.float() @ b.float())

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "cupy", ModuleType("cupy"))
        cuda = importlib.import_module(name)
        patch.setattr(torch, "mm", mm)
        _emulator.install(patch)
        yield SimpleNamespace(
            **{**{k: getattr(cuda, k) for k in cuda.__all__}, "CAPTURABLE": False}
        )
    del sys.modules[name]
    if known is not None:
        sys.modules[name] = known


@pytest.mark.parametrize("kilobytes", [227, 48])  # of shared memory: enough for pairs, and not
def test_the_kernels_together_compute_what_the_reference_does(
    kilobytes: int, kernels: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the check that `cascade bench` makes: prompts, drafts and verifications of a slice."""
    few_layers, run = parity.few_layers, Decoder.run
    rows_of_passes: list[int] = []

    def few(model: ElasticModel) -> ElasticModel:
        model = few_layers(model)
        model.runner = GraphRunner(model.runner.views, model.arch, kernels)  # type: ignore[arg-type]
        return model

    def counted(self: Decoder, writer: int, rows: Any) -> Any:
        rows_of_passes.append(len(rows))
        return run(self, writer, rows)

    monkeypatch.setattr(parity, "few_layers", few)
    monkeypatch.setattr(Decoder, "run", counted)
    monkeypatch.setattr(experts_pairs, "largest_shared", lambda device: kilobytes * 1024)
    model = random_model("tiny", dtype=torch.bfloat16)
    for one in parity.agreement(model, [model.smallest], [36]):
        assert one.error <= one.allowed, one
    assert min(rows_of_passes) <= 8  # rows that are left when others have their ids
    assert max(rows_of_passes) == (36 if kilobytes == 227 else 29)  # a row of one id was done
