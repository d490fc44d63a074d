"""Tasks that gather others: outcomes in order, failures, and slots that are always given back."""

from collections.abc import Iterator

import pytest

from cascade import Reasoner
from cascade.errors import CacheFull
from cascade.strategies import Explore
from cascade.strategies.base import Roles, Strategy
from cascade.task import Task
from cascade.verbs import Gather, Run

QUESTION = "State the final answer to the following arithmetic problem: 57 + 87 + 70 ="


@pytest.fixture(scope="module")
def reasoner() -> Reasoner:
    return Reasoner.from_pretrained("nano", max_batch=4, max_length=256)


@pytest.fixture(autouse=True)
def every_slot_is_given_back(reasoner: Reasoner) -> Iterator[None]:
    yield
    assert reasoner.cache.free_slots == reasoner.max_batch


class Gathering(Strategy):
    """Gathers `children` tasks, child i writing i + 1 steps; then writes to the end itself."""

    children: int = 3
    failing: int | None = None
    nested: bool = False
    declared: int = 4

    @property
    def slots(self) -> int:
        return self.declared

    def run(self, task: Task, roles: Roles) -> Run:
        yield from task.prefill(roles.verify)
        order: list[int] = []

        def open_child(number: int) -> tuple[Task, Run]:
            child = task.child(number, 0.7)
            order.append(number)
            return child, self._child(child, number, roles)

        starts = [lambda n=n: open_child(n) for n in range(self.children)]
        ended: list[Task] = yield Gather(starts)
        assert order == list(range(self.children))
        assert [len(child.steps) for child in ended] == list(range(1, self.children + 1))
        while not task.finished:
            task.open_step()
            yield from task.write(64, roles.verify)
            task.close_step("written")

    def _child(self, child: Task, number: int, roles: Roles) -> Run:
        if self.nested:
            yield Gather([lambda: (child.child(9, 0.7), iter(()))] * 2)  # type: ignore[list-item]
        for _ in range(number + 1):
            child.open_step()
            yield from child.write(3, roles.draft)
            child.close_step("written")
            if number == self.failing:
                raise ValueError(f"child {number} fails")


class Patched(Strategy):
    """Thinks small, refreshes the last tokens alone, and answers large."""

    last: int

    def run(self, task: Task, roles: Roles) -> Run:
        yield from task.prefill(roles.draft)
        task.open_step()
        yield from task.write(12, roles.draft)
        task.close_step("written")
        yield from task.refresh(roles.verify, self.last)
        while not task.finished:
            task.open_step()
            yield from task.write(64, roles.verify)
            task.close_step("written")


def test_a_strategy_may_refresh_the_last_tokens_alone(reasoner: Reasoner) -> None:
    for last in (3, 5):
        strategy = Patched(last=last)
        results = reasoner.generate([QUESTION] * 2, strategy=strategy, consistency="shared")
        assert [r.metrics.refreshed for r in results] == [last] * 2


def test_children_run_beside_each_other_and_come_back_in_order(reasoner: Reasoner) -> None:
    for children in (0, 1, 3, 7):
        result = reasoner.generate(QUESTION, strategy=Gathering(children=children))
        assert result.finish_reason == "stop"


def test_several_gathering_requests_share_the_slots(reasoner: Reasoner) -> None:
    results = reasoner.generate([QUESTION] * 5, strategy=Gathering(children=2, declared=2))
    assert [r.error for r in results] == [None] * 5


def test_a_failing_child_ends_its_request_alone(reasoner: Reasoner) -> None:
    with pytest.raises(ValueError, match="child 1 fails"):
        reasoner.generate(QUESTION, strategy=Gathering(failing=1))
    results = reasoner.generate([QUESTION] * 2, strategy=Gathering(failing=2))
    assert [r.error for r in results] == ["ValueError: child 2 fails"] * 2


def test_gathering_without_a_slot_left_is_an_error_and_not_a_standstill(reasoner: Reasoner) -> None:
    # Three children hold every slot, and each wants children of its own.
    with pytest.raises(CacheFull, match="use a larger max_batch"):
        reasoner.generate(QUESTION, strategy=Gathering(nested=True))


def test_a_stream_that_is_closed_stops_the_children(reasoner: Reasoner) -> None:
    stream = reasoner.stream(QUESTION, strategy=Explore(drafts=3, choose="beam"), seed=1)
    assert next(stream).kind == "step_committed"
    stream.close()
