"""The processes of `accelerate launch`, each with a device and a share of the problems."""

from __future__ import annotations

import os
from collections.abc import Callable
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

from cascade.errors import EvaluationError

T = TypeVar("T")

PATIENCE = timedelta(days=30)  # one process may have to wait so long for another's share


@dataclass(frozen=True)
class Processes:
    """This process among those that were launched together; one alone unless they were.

    index: from 0; process 0 keeps the run directory and shows the progress
    device: the one that accelerate gave this process; None where it is alone
    """

    index: int = 0
    count: int = 1
    device: str | None = None
    _state: Any = None

    @classmethod
    def current(cls, device: str = "auto") -> Processes:
        """Join the others. Does nothing in a process that was not launched with others."""
        if int(os.environ.get("WORLD_SIZE", "1")) < 2:
            return cls()
        import torch
        from accelerate import PartialState

        cpu = device.startswith("cpu") or not torch.cuda.is_available()
        state = PartialState(cpu=cpu, backend="gloo", timeout=PATIENCE)
        return cls(state.process_index, state.num_processes, str(state.device), state)

    @property
    def first(self) -> bool:
        return self.index == 0

    def share(self, items: Seq[T]) -> list[T]:
        """This process's part of the items: every `count`-th, so that all get easy and hard ones.

        Also the same items whatever the others have finished.
        """
        return list(items[self.index :: self.count])

    def wait(self) -> None:
        """Until all have come so far."""
        if self._state is not None:
            self._state.wait_for_everyone()

    def first_then_all(self, work: Callable[[], T]) -> T | None:
        """Let process 0 do something while the others wait; its result there, None elsewhere.

        Raises its error there, and an EvaluationError with the same message elsewhere.
        """
        if self._state is None:
            return work()
        from accelerate.utils import broadcast_object_list

        result, error = None, None
        if self.first:
            try:
                result = work()
            except BaseException as raised:
                error = raised
        told = [None if error is None else f"{type(error).__name__}: {error}"]
        broadcast_object_list(told)
        if error is not None:
            raise error
        if told[0] is not None:
            raise EvaluationError(f"process 0 could not go on: {told[0]}")
        return result
