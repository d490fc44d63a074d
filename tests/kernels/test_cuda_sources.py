"""Every .cu file compiles for the architectures we name, where a CUDA compiler is installed."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from cascade.kernels import compiler

ARCHITECTURES = (80, 90, 120)
STEMS = sorted(path.stem for path in compiler.FOLDER.glob("*.cu"))


def test_every_source_has_a_launcher_of_its_name() -> None:
    assert STEMS
    for stem in STEMS:
        assert (compiler.FOLDER / f"{stem}.py").exists(), stem


@pytest.mark.parametrize("stem", STEMS)
def test_includes_are_inlined(stem: str) -> None:
    assert "#include" not in compiler.source(stem)


@pytest.mark.parametrize("stem", STEMS)
def test_compiles(stem: str, tmp_path: Path) -> None:
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        pytest.skip("no nvcc on this machine")
    targets = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in ARCHITECTURES]
    source = tmp_path / f"{stem}.cu"
    source.write_text(compiler.source(stem))
    result = subprocess.run(
        [
            nvcc,
            *compiler.OPTIONS,
            *targets,
            "--threads=0",
            "-fatbin",
            "-o",
            str(tmp_path / "out"),
            str(source),
        ],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert result.returncode == 0, result.stderr
    assert "warning" not in result.stderr, result.stderr
