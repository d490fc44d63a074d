"""What fails for a moment is tried again, and counted."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import TypeVar

from tenacity import Retrying, retry_if_exception, stop_after_attempt, wait_random_exponential

T = TypeVar("T")


class Retries:
    """Calls that may be made again, and how often they were, by what failed.

    attempts: calls in all; wait: longest seconds before the second one, doubled for each after it
    """

    def __init__(self, attempts: int = 4, wait: float = 1.0) -> None:
        self.attempts, self.wait = attempts, wait
        self.counts: Counter[str] = Counter()

    def call(
        self, work: Callable[[], T], what: str, transient: Callable[[BaseException], bool]
    ) -> T:
        """The result of `work`. Its last error is raised where it keeps failing, or fails for good.

        transient: whether an error is worth another try
        """

        def count(state: object) -> None:
            self.counts[what] += 1

        retrying = Retrying(
            stop=stop_after_attempt(self.attempts),
            wait=wait_random_exponential(multiplier=self.wait, max=60 * self.wait),
            retry=retry_if_exception(transient),
            before_sleep=count,
            reraise=True,
        )
        return retrying(work)
