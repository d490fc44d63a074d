from __future__ import annotations

from collections.abc import Iterator
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from tests.kernels import emulator


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


@pytest.fixture(scope="session")
def _emulator(tmp_path_factory: pytest.TempPathFactory) -> emulator.Emulator:
    if emulator.COMPILER is None:
        pytest.skip("no g++ here, which runs CUDA C++ without a GPU")
    return emulator.Emulator(tmp_path_factory.mktemp("emulator"))


@pytest.fixture(params=["emulated", pytest.param("gpu", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> Iterator[str]:
    """Where a kernel written in CUDA C++ runs: on a GPU, or thread by thread on this processor."""
    if request.param == "gpu":
        yield "cuda"
        return
    found: emulator.Emulator = request.getfixturevalue("_emulator")
    with pytest.MonkeyPatch.context() as patch:
        found.install(patch)
        yield "cpu"


@pytest.fixture
def short() -> Any:
    """The launchers of a short pass's kernels."""
    from cascade.kernels.choose_experts import choose_experts
    from cascade.kernels.combine_pairs import combine_pairs
    from cascade.kernels.embed_tokens import embed_tokens
    from cascade.kernels.experts_few import experts_few
    from cascade.kernels.experts_pairs import experts_pairs_down, experts_pairs_up
    from cascade.kernels.experts_sum import experts_sum
    from cascade.kernels.experts_up import experts_up
    from cascade.kernels.group_norm import group_norm
    from cascade.kernels.mamba_step import mamba_step
    from cascade.kernels.pick_tokens import pick_tokens
    from cascade.kernels.skinny_linear import skinny_linear
    from cascade.kernels.slot_attention import slot_attention

    return SimpleNamespace(
        choose_experts=choose_experts,
        embed_tokens=embed_tokens,
        combine_pairs=combine_pairs,
        experts_few=experts_few,
        experts_pairs_down=experts_pairs_down,
        experts_pairs_up=experts_pairs_up,
        experts_sum=experts_sum,
        experts_up=experts_up,
        group_norm=group_norm,
        mamba_step=mamba_step,
        pick_tokens=pick_tokens,
        skinny_linear=skinny_linear,
        slot_attention=slot_attention,
    )
