"""Kernels that raise in the middle of a verb, to test that nothing is left behind."""

from __future__ import annotations

from types import ModuleType
from typing import Any


class Injected(Exception):
    """Raised by a kernel on purpose."""


class FaultyKernels:
    """A kernel namespace whose n-th call from now on raises instead of running.

    only: names of the kernels that count; all of them where it is empty
    late: raise after the kernel has done its work
    """

    def __init__(self, kernels: ModuleType) -> None:
        self._kernels = kernels
        self.disarm()

    def arm(
        self,
        countdown: int,
        error: BaseException | None = None,
        only: tuple[str, ...] = (),
        late: bool = False,
    ) -> None:
        self._countdown: int | None = countdown
        self._error, self._only, self._late = error or Injected(), only, late

    def disarm(self) -> None:
        self._countdown = None

    @property
    def armed(self) -> bool:
        return self._countdown is not None

    def __getattr__(self, name: str) -> Any:
        kernel = getattr(self._kernels, name)

        def called(*args: Any, **kwargs: Any) -> Any:
            raising = False
            if self._countdown is not None and (not self._only or name in self._only):
                raising, self._countdown = self._countdown == 0, self._countdown - 1
            if raising and not self._late:
                self.disarm()
                raise self._error
            result = kernel(*args, **kwargs)
            if raising:
                self.disarm()
                raise self._error
            return result

        return called
