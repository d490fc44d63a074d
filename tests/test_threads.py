"""Small passes run on one thread, large ones on all, and torch's setting is left as it was."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from cascade.threads import SMALL, threads_for

CPU = torch.device("cpu")


@pytest.fixture
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("two_threads")
def test_small_work_runs_on_one_thread_and_large_work_on_all() -> None:
    with threads_for(CPU, 1, SMALL - 1):
        assert torch.get_num_threads() == 1
    assert torch.get_num_threads() == 2
    with threads_for(CPU, 1, SMALL):
        assert torch.get_num_threads() == 2
    with threads_for(torch.device("cuda"), 1, 1):
        assert torch.get_num_threads() == 2


@pytest.mark.usefixtures("two_threads")
def test_the_setting_is_restored_after_a_failure() -> None:
    with pytest.raises(RuntimeError), threads_for(CPU, 1, 1):
        raise RuntimeError
    assert torch.get_num_threads() == 2
