"""What every test may rely on: no hub, a fixed seed, `gpu` tests skipped with the reason."""

from __future__ import annotations

import os
import random
from importlib.util import find_spec

# Before transformers is imported: it reads this once. Tests never reach for a hub.
os.environ["HF_HUB_OFFLINE"] = "1"

import hypothesis
import numpy as np
import pytest
import torch

hypothesis.settings.register_profile("dev", deadline=None)
hypothesis.settings.register_profile("ci", deadline=None, derandomize=True, database=None)
hypothesis.settings.load_profile("ci" if os.environ.get("CI") else "dev")

# Small matrices gain nothing from threads, which wait for each other where cores are busy.
torch.set_num_threads(1)


def _missing_for_gpu() -> str | None:
    """Why `gpu` tests cannot run here, or None where they can."""
    if not torch.cuda.is_available():
        return "no CUDA device"
    if find_spec("cupy") is None:
        return "CuPy is not installed: pip install 'cascade-reasoning[cuda12]' or '[cuda13]'"
    return None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    gpu_tests = [item for item in items if item.get_closest_marker("gpu")]
    if gpu_tests and (reason := _missing_for_gpu()):
        for item in gpu_tests:
            item.add_marker(pytest.mark.skip(reason=reason))


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup() -> None:
    # Before the fixtures of each test, so that they are seeded too.
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
