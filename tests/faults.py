"""Ways to break a verb in the middle of it, to test that nothing is left behind."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType, ModuleType
from typing import Any

import numpy as np
import torch

import cascade
from cascade.cache import Cache

SOURCES = Path(cascade.__file__).parent


class Injected(Exception):
    """Raised by a kernel on purpose."""


class FaultyKernels:
    """A kernel namespace whose n-th call from now on raises instead of running.

    only: names of the kernels that count; all of them where it is empty
    late: raise after the kernel has done its work
    nan:  do not raise, but fill what the kernel returns with NaN
    calls: names of the kernels called since `record`
    """

    CAPTURABLE = False  # a kernel in a graph would not raise

    def __init__(self, kernels: ModuleType) -> None:
        self._kernels = kernels
        self.calls: list[str] = []
        self.disarm()

    def arm(
        self,
        countdown: int,
        error: BaseException | None = None,
        only: tuple[str, ...] = (),
        late: bool = False,
        nan: bool = False,
    ) -> None:
        self._countdown: int | None = countdown
        self._error, self._only, self._late = error or Injected(), only, late or nan
        self._nan = nan

    def disarm(self) -> None:
        self._countdown = None

    def record(self) -> None:
        self.calls.clear()

    @property
    def armed(self) -> bool:
        return self._countdown is not None

    def __getattr__(self, name: str) -> Any:
        kernel = getattr(self._kernels, name)

        def called(*args: Any, **kwargs: Any) -> Any:
            self.calls.append(name)
            raising = False
            if self._countdown is not None and (not self._only or name in self._only):
                raising, self._countdown = self._countdown == 0, self._countdown - 1
            if raising:
                self.disarm()
            if raising and not self._late:
                raise self._error
            result = kernel(*args, **kwargs)
            if raising and self._nan:
                full_like = np.full_like if isinstance(result, np.ndarray) else torch.full_like
                return full_like(result, torch.nan)
            if raising:
                raise self._error
            return result

        return called


class Interrupt:
    """Counts the lines that run in some of cascade's files, and raises before the n-th."""

    def __init__(self, files: tuple[str, ...], at: int | None) -> None:
        self._files, self._at = {str(SOURCES / file) for file in files}, at
        self.lines = 0

    def __call__(self, frame: FrameType, event: str, arg: object) -> Any:
        if frame.f_code.co_filename not in self._files:
            return None
        if event == "line":
            self.lines += 1
            if self._at is not None and self.lines > self._at:
                self._at = None
                raise KeyboardInterrupt
        return self


@contextmanager
def interrupting(*files: str, at: int | None = None) -> Iterator[Interrupt]:
    """Raise KeyboardInterrupt before line number `at` of those that the block runs in `files`.

    Every line counts as often as it runs. Without `at` they are only counted.
    """
    tracer, before = Interrupt(files, at), sys.gettrace()
    sys.settrace(tracer)
    try:
        yield tracer
    finally:
        sys.settrace(before)


def cache_bits(cache: Cache) -> list[torch.Tensor]:
    """A copy of everything that a cache holds."""
    parts = (cache.keys, cache.values, cache.window, cache.state, cache.provenance)
    return [part.clone() for part in (*parts, *cache.journal.tensors())]
