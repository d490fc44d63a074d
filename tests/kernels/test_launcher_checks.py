"""What launchers refuse. Runs on the CPU: everything but the device is checked first."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from cascade.kernels import checks
from cascade.kernels.accept_resample import accept_resample
from cascade.kernels.cache_digest import cache_digest
from cascade.kernels.checks import KernelArgumentError
from cascade.kernels.conv_commit import conv_commit
from cascade.kernels.fork_copy import fork_copy
from cascade.kernels.journal_keep import journal_keep
from cascade.kernels.kv_compact import kv_compact
from cascade.kernels.provenance_stamp import provenance_stamp
from cascade.kernels.race_sample import race_sample
from cascade.kernels.ssm_commit import ssm_commit

L, S, J, H, P, N, G = 2, 3, 5, 4, 8, 16, 2
X = H * P + G * N


def rows() -> torch.Tensor:
    return torch.arange(2)


def kv(dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.zeros(L, S, 7, 2, 4, dtype=dtype)


def arguments() -> dict[Callable[..., Any], dict[str, Any]]:
    """Good arguments of every launcher, but on the CPU."""
    state, window = torch.zeros(L, S, H, P, N), torch.zeros(L, S, 3, 6)
    three = {name: rows() for name in ("rows", "sources", "counts")}
    return {
        ssm_commit: {
            "state": state,
            "scanned": torch.zeros(L, S, J, X),
            "dt": torch.zeros(L, S, J, H),
            "decay": torch.zeros(L, H),
            **three,
        },
        conv_commit: {"window": window, "inputs": torch.zeros(L, S, J, 6), **three},
        journal_keep: {
            "targets": [torch.zeros(L, S, J, 6), torch.zeros(L, S, J, 3)],
            "journals": [torch.zeros(L, 2, 9, 6), torch.zeros(L, 2, 9, 3)],
            "rows": rows(),
            "sources": rows(),
            "entries": rows(),
        },
        kv_compact: {
            "keys": kv(),
            "values": kv(),
            "rows": rows(),
            "starts": rows(),
            "kept": torch.zeros(2, 3, dtype=torch.int64),
        },
        fork_copy: {
            "keys": kv(),
            "values": kv(),
            "window": window,
            "state": state,
            "source": 0,
            "targets": rows(),
            "length": 3,
        },
        provenance_stamp: {
            "provenance": torch.zeros(S, 7, dtype=torch.int8),
            "rows": rows(),
            "starts": rows(),
            "counts": rows(),
            "writers": rows(),
        },
        cache_digest: {
            "keys": kv(),
            "values": kv(),
            "window": window,
            "state": state,
            "rows": rows(),
            "lengths": rows(),
        },
        race_sample: {"weights": torch.ones(2, 5), "seeds": rows(), "positions": rows()},
        accept_resample: {
            "target": torch.ones(2, 3, 5),
            "draft": torch.ones(2, 2, 5),
            "ids": torch.zeros(2, 2, dtype=torch.int64),
            "counts": rows(),
            "seeds": rows(),
            "positions": rows(),
        },
    }


BAD = [
    (
        ssm_commit,
        {"state": torch.zeros(L, S, H, P)},
        r"state has shape \(2, 3, 4, 8\); expected \[L, S, H, P, N",
    ),
    (
        ssm_commit,
        {"state": torch.zeros(L, S, H, P, N).double()},
        "state is torch.float64; expected",
    ),
    (ssm_commit, {"state": torch.zeros(L, S, H, N, P).mT}, "state has strides"),
    (ssm_commit, {"scanned": torch.zeros(L, S, J, X + 1)}, "scanned has 65 channels"),
    (ssm_commit, {"scanned": torch.zeros(L, S, J, H * P)}, "scanned has 32 channels"),
    (ssm_commit, {"scanned": torch.zeros(L, S, J, H * P + 3 * N)}, "a divisor of 4"),
    (ssm_commit, {"scanned": torch.zeros(L, S, J, X).half()}, "scanned is torch.float16"),
    (ssm_commit, {"dt": torch.zeros(L, S, J + 1, H)}, "dt has shape"),
    (ssm_commit, {"dt": torch.zeros(L, S, J, H).bfloat16()}, "dt is torch.bfloat16"),
    (ssm_commit, {"decay": torch.zeros(H)}, "decay has shape"),
    (ssm_commit, {"rows": rows().int()}, "rows is torch.int32; expected torch.int64"),
    (ssm_commit, {"counts": torch.arange(3)}, r"counts has shape \(3,\); expected \(2,\)"),
    (
        ssm_commit,
        {"state": torch.zeros(L, S, H, P, 6)},
        "the state size N is 6; expected a multiple",
    ),
    (
        ssm_commit,
        {"state": torch.zeros(L, S, H, P, 516)},
        "the state size N is 516; expected 1 to 512",
    ),
    (
        ssm_commit,
        {"state": torch.zeros(L, S, H, 6, N), "scanned": torch.zeros(L, S, J, H * 6 + G * N)},
        "the head dim P is 6",
    ),
    (
        ssm_commit,
        {"state": torch.zeros(L * S * H * P * N + 1)[1:].view(L, S, H, P, N)},
        "state starts at address",
    ),
    (conv_commit, {"inputs": torch.zeros(L, S, J, 6).bfloat16()}, "inputs is torch.bfloat16"),
    (conv_commit, {"inputs": torch.zeros(L, S, J, 7)}, "inputs has shape"),
    (conv_commit, {"window": torch.zeros(L, S, 6, 3).mT}, "window has strides"),
    (
        journal_keep,
        {"journals": [torch.zeros(L, 2, 9, 6), torch.zeros(L, 2, 8, 3)]},
        r"journals\[1\] has shape",
    ),
    (journal_keep, {"journals": [torch.zeros(L, 2, 9, 6)]}, "the number of journals is 1"),
    (journal_keep, {"targets": [], "journals": []}, "the number of parts is 0; expected 1 to 3"),
    (journal_keep, {"entries": rows().bool()}, "entries is torch.bool"),
    (kv_compact, {"values": kv(torch.bfloat16)}, "values is torch.bfloat16"),
    (kv_compact, {"kept": torch.zeros(3, 3, dtype=torch.int64)}, "kept has shape"),
    (kv_compact, {"starts": torch.arange(4)[::2]}, "starts has strides"),
    (fork_copy, {"source": 3}, "source is 3; expected 0 to 2"),
    (fork_copy, {"source": -1}, "source is -1"),
    (fork_copy, {"length": 8}, "length is 8; expected 0 to 7"),
    (fork_copy, {"state": torch.zeros(L, S + 1, H, P, N)}, "state has shape"),
    (provenance_stamp, {"provenance": torch.zeros(S, 7)}, "provenance is torch.float32"),
    (provenance_stamp, {"writers": rows().int()}, "writers is torch.int32; expected torch.int64"),
    (cache_digest, {"block": 0}, "block is 0"),
    (cache_digest, {"lengths": torch.arange(3)}, "lengths has shape"),
    (race_sample, {"weights": torch.ones(2, 5).bfloat16()}, "weights is torch.bfloat16"),
    (race_sample, {"weights": torch.ones(2, 0)}, "the vocabulary V is 0"),
    (race_sample, {"weights": torch.ones(5)}, "weights has shape"),
    (accept_resample, {"draft": torch.ones(2, 3, 5)}, "draft has shape"),
    (accept_resample, {"ids": torch.zeros(2, 3, dtype=torch.int64)}, "ids has shape"),
]


@pytest.mark.parametrize(
    ("launcher", "changed", "message"), BAD, ids=[f"{b[0].__name__}: {b[2]}" for b in BAD]
)
def test_bad_arguments_are_refused_by_name(
    launcher: Callable[..., Any], changed: dict[str, Any], message: str
) -> None:
    with pytest.raises(KernelArgumentError, match=message):
        launcher(**arguments()[launcher] | changed)


@pytest.mark.parametrize("launcher", list(arguments()), ids=lambda f: f.__name__)
def test_good_arguments_are_refused_for_their_device_alone(launcher: Callable[..., Any]) -> None:
    with pytest.raises(KernelArgumentError, match="tensors are on cpu; expected all on one CUDA"):
        launcher(**arguments()[launcher])


@pytest.mark.parametrize(("bytes", "unit"), [((64, 32), 16), ((64, 24), 4), ((6, 64), 2)])
def test_unit_is_the_widest_that_fits_all(bytes: tuple[int, ...], unit: int) -> None:
    assert checks.unit(*bytes) == unit
