"""Which implementation `load` gives, and that the CPU path never touches CuPy."""

from __future__ import annotations

import inspect
import subprocess
import sys

import pytest

from cascade.kernels import Backend, load, reference


def test_the_cpu_gets_its_own_kernels_and_no_cupy() -> None:
    script = (
        "import sys; from cascade.kernels import load; kernels = load('cpu');"
        "assert kernels.__name__ == 'cascade.kernels.cpu', kernels;"
        "plain = load('cpu', 'reference');"
        "assert plain.__name__ == 'cascade.kernels.reference', plain;"
        "assert 'cupy' not in sys.modules and 'cascade.kernels.cuda' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", script], check=True, timeout=120)


@pytest.mark.parametrize("backend", ["cpu", "cuda"])
def test_every_backend_has_the_same_functions_and_signatures(backend: Backend) -> None:
    if backend == "cuda":
        pytest.importorskip("cupy")
    kernels = load(backend, backend)
    for name in reference.__all__:
        function = getattr(reference, name)
        if callable(function):
            assert inspect.signature(getattr(kernels, name)) == inspect.signature(function), name
