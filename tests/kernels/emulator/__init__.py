"""Runs the project's .cu files on a processor, thread by thread, for machines without a GPU.

It shows that indices, fragments and barriers are right, with the launchers' own checks and grids;
it shows nothing about speed, and of races only those that come out where threads take turns, in
every other block from the last to the first.
"""

from __future__ import annotations

import ctypes
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from cascade.kernels import checks, compiler, experts_few

HERE = Path(__file__).parent
COMPILER = shutil.which("g++")
MULTIPROCESSORS, SHARED = 3, 227 * 1024  # the latter as on compute capability 9.0

_DYNAMIC = re.compile(r"extern __shared__ (\w+) (\w+)\[\];")


def source(stem: str) -> str:
    """A .cu file as C++ that runs here."""
    text = compiler.source(stem, leave_out=("ptx.cuh",))
    text = _DYNAMIC.sub(r"\1* const \2 = (\1*)dynamic_shared;", text)
    return f'#include "emulator.h"\n{text}\n#include "runtime.h"\n'


class Emulator:
    """Stands in for a GPU: `install` lets the launchers run on CPU tensors."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._libraries: dict[str, ctypes.CDLL] = {}

    def install(self, patch: pytest.MonkeyPatch) -> None:
        emulator = self

        def launch(
            kernel: compiler.Kernel,
            device: int,
            grid: Sequence[int],
            block: Sequence[int],
            values: Sequence[int],
            shared: int = 0,
        ) -> None:
            emulator._launch(kernel, grid, block, kernel._pack(*values), shared)

        patch.setattr(compiler.Kernel, "launch", launch)
        patch.setattr(checks, "one_gpu", lambda *tensors: 0)
        for module in list(sys.modules.values()):
            for name, number in (("multiprocessors", MULTIPROCESSORS), ("largest_shared", SHARED)):
                if hasattr(module, name):
                    patch.setattr(module, name, lambda device, number=number: number)
        # Blocks run one after the other, so none but the first may be waited for.
        patch.setattr(experts_few, "router_blocks", lambda experts, blocks: 1)

    def _launch(
        self,
        kernel: compiler.Kernel,
        grid: Sequence[int],
        block: Sequence[int],
        values: bytes,
        shared: int,
    ) -> None:
        library = self._library(kernel.stem)
        entry = ctypes.cast(getattr(library, kernel.entry), ctypes.c_void_p)
        three = ctypes.c_uint * 3
        library.launch(
            entry, three(*grid), three(*block), ctypes.c_size_t(shared), ctypes.c_char_p(values)
        )

    def _library(self, stem: str) -> Any:
        if stem not in self._libraries:
            text, library = self._folder / f"{stem}.cc", self._folder / f"{stem}.so"
            text.write_text(source(stem))
            command = [str(COMPILER), "-std=c++17", "-O1", "-fno-strict-aliasing", "-w", "-shared"]
            command += ["-fPIC", f"-I{HERE}", "-o", str(library), str(text)]
            subprocess.run(command, check=True, timeout=120)
            self._libraries[stem] = ctypes.CDLL(str(library))
        return self._libraries[stem]
