"""What fails for a moment is tried again, and counted."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import TypeVar

from tenacity import Retrying, retry_if_exception, stop_after_attempt, wait_exponential

T = TypeVar("T")


class Retries:
    """Calls that may be made again, and how often they were, by what failed.

    wait: seconds before the second call, doubled for each after it
    """

    def __init__(self, wait: float = 1.0) -> None:
        self.wait = wait
        self.counts: Counter[str] = Counter()

    def call(
        self,
        work: Callable[[], T],
        what: str,
        transient: Callable[[BaseException], bool],
        *,
        attempts: int = 4,
        wait: float | None = None,
    ) -> T:
        """The result of `work`. Its last error is raised where it keeps failing, or fails for good.

        transient: whether an error is worth another try; attempts: calls in all
        """

        def count(state: object) -> None:
            self.counts[what] += 1

        first = self.wait if wait is None else wait
        retrying = Retrying(
            stop=stop_after_attempt(attempts),
            wait=wait_exponential(first, max=60 * first),
            retry=retry_if_exception(transient),
            before_sleep=count,
            reraise=True,
        )
        return retrying(work)
