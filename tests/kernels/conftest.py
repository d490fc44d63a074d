from __future__ import annotations

from types import ModuleType

import pytest
import torch


@pytest.fixture
def cuda() -> ModuleType:
    """The CUDA kernels, where they can run."""
    if not torch.cuda.is_available():
        pytest.skip("no NVIDIA GPU here")
    pytest.importorskip("cupy")
    from cascade.kernels import load

    return load("cuda", "cuda")


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(1234)
