"""Which implementation `load` gives, and that the CPU path never touches CuPy."""

from __future__ import annotations

import inspect
import subprocess
import sys

import pytest

from cascade.kernels import load, reference


def test_the_cpu_gets_the_reference_and_no_cupy() -> None:
    script = (
        "import sys; from cascade.kernels import load; kernels = load('cpu');"
        "assert kernels.__name__ == 'cascade.kernels.reference', kernels;"
        "assert 'cupy' not in sys.modules and 'cascade.kernels.cuda' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", script], check=True, timeout=120)


def test_both_backends_have_the_same_functions_and_signatures() -> None:
    pytest.importorskip("cupy")
    cuda = load("cuda", "cuda")
    for name, function in inspect.getmembers(reference, inspect.isfunction):
        if name.startswith("_") or function.__module__ != reference.__name__:
            continue
        assert inspect.signature(getattr(cuda, name)) == inspect.signature(function), name
