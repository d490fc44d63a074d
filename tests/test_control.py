"""Stopping, waiting, listening: asyncio, threads, callbacks, logs and spans."""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
from pydantic import Field

from cascade import Reasoner
from cascade.errors import PolicyError, RequestError
from cascade.events import Event
from cascade.policies import AnyDecision, Policy, StepScores, Threshold
from cascade.results import Result
from cascade.strategies import Explore, Single, Speculative
from cascade.strategies.base import Roles, Strategy
from cascade.task import Task
from cascade.verbs import Run

QUESTION = "State the final answer to the following arithmetic problem: 57 + 87 + 70 ="


@pytest.fixture(scope="module")
def reasoner() -> Reasoner:
    return Reasoner.from_pretrained("nano", max_batch=5, max_length=384)


@pytest.fixture(autouse=True)
def every_slot_is_given_back(reasoner: Reasoner) -> Iterator[None]:
    yield
    assert reasoner.cache.free_slots == reasoner.max_batch


class Slow(Strategy):
    """The large slice writes one token a step, and each step is counted."""

    written: list[int] = Field(default_factory=list)

    def run(self, task: Task, roles: Roles) -> Run:
        yield from task.prefill(roles.verify)
        while not task.finished:
            task.open_step()
            yield from task.write(1, roles.verify)
            task.close_step("written")
            self.written.append(1)
            time.sleep(0.01)


async def cancel_after(reasoner: Reasoner, steps: int, strategy: Slow, **more: Any) -> float:
    """Cancel once so many steps were written; the seconds until the call has returned."""
    task = asyncio.ensure_future(reasoner.agenerate(strategy=strategy, **more))
    while len(strategy.written) < steps:
        await asyncio.sleep(0.001)
    began = time.perf_counter()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    return time.perf_counter() - began


def test_cancelling_stops_the_work_within_one_step(reasoner: Reasoner) -> None:
    for prompt in (QUESTION, [QUESTION] * 3):
        strategy = Slow()
        asyncio.run(cancel_after(reasoner, 4, strategy, prompt=prompt))
        rows = 1 if isinstance(prompt, str) else len(prompt)
        assert 4 <= len(strategy.written) <= 4 + 2 * rows
        after = len(strategy.written)
        time.sleep(0.05)
        assert len(strategy.written) == after


def test_cancelling_stops_drafts_that_run_beside_each_other(reasoner: Reasoner) -> None:
    """They send no events on the way; the work still ends at once."""

    async def stopped_after() -> float:
        strategy = Explore(drafts=64, enough=None, temperature=2.0, choose="vote")
        task = asyncio.ensure_future(reasoner.agenerate(QUESTION, strategy=strategy, seed=1))
        await asyncio.sleep(0.1)
        began = time.perf_counter()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        return time.perf_counter() - began

    whole = time.perf_counter()
    reasoner.generate(
        QUESTION, strategy=Explore(drafts=64, enough=None, temperature=2.0, choose="vote"), seed=1
    )
    whole = time.perf_counter() - whole
    assert asyncio.run(stopped_after()) < 0.3 * whole


def test_leaving_a_stream_stops_the_work(reasoner: Reasoner) -> None:
    async def first_event(strategy: Slow) -> Event:
        events = reasoner.astream(QUESTION, strategy=strategy)
        async for event in events:
            await events.aclose()
            return event
        raise AssertionError

    strategy = Slow()
    assert asyncio.run(first_event(strategy)).kind == "step_committed"
    assert len(strategy.written) <= 3


def test_a_call_that_waits_for_its_turn_can_be_cancelled(reasoner: Reasoner) -> None:
    async def both() -> tuple[float, Result]:
        strategy = Slow()
        running = asyncio.ensure_future(reasoner.agenerate(QUESTION, strategy=strategy))
        while not strategy.written:
            await asyncio.sleep(0.001)
        waiting = asyncio.ensure_future(reasoner.agenerate(QUESTION))
        await asyncio.sleep(0.02)
        began = time.perf_counter()
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
        seconds = time.perf_counter() - began
        assert not running.done()
        return seconds, await running

    seconds, result = asyncio.run(both())
    assert seconds < 0.15
    assert result.answer == "214"


def test_asynchronous_calls_take_lists_samples_and_errors(reasoner: Reasoner) -> None:
    async def calls() -> tuple[Any, Any]:
        many = reasoner.agenerate([QUESTION] * 2)
        samples = reasoner.agenerate(QUESTION, n=2, temperature=1.0, seed=1)
        return await asyncio.gather(many, samples)

    many, samples = asyncio.run(calls())
    assert [result.answer for result in many] == ["214", "214"]
    assert len(samples.samples) == 2
    with pytest.raises(RequestError, match="empty"):
        asyncio.run(reasoner.agenerate(""))


def test_an_error_comes_out_of_an_asynchronous_stream(reasoner: Reasoner) -> None:
    class Broken(Policy):
        def decide(self, scores: StepScores) -> AnyDecision:
            raise ZeroDivisionError

    async def read() -> None:
        async for _ in reasoner.astream(QUESTION, policy=Broken()):
            pass

    with pytest.raises(PolicyError):
        asyncio.run(read())


def test_the_asynchronous_text_stream_is_the_text(reasoner: Reasoner) -> None:
    async def read() -> str:
        return "".join([text async for text in reasoner.astream_text(QUESTION)])

    assert asyncio.run(read()) == reasoner.generate(QUESTION).text


def test_calls_from_several_threads_wait_for_each_other(reasoner: Reasoner) -> None:
    answers: list[str | None] = []

    def ask() -> None:
        answers.append(reasoner.generate(QUESTION).answer)

    threads = [threading.Thread(target=ask) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert answers == ["214"] * 4


def test_a_call_inside_an_open_stream_is_refused_and_not_a_deadlock(reasoner: Reasoner) -> None:
    stream = reasoner.stream(QUESTION)
    next(stream)
    with pytest.raises(RequestError, match="still open"):
        reasoner.generate(QUESTION)
    stream.close()  # type: ignore[attr-defined]
    assert reasoner.generate(QUESTION).answer == "214"
    with pytest.raises(RequestError, match="still open"):
        reasoner.generate(QUESTION, on_event=lambda number, event: reasoner.generate(QUESTION))


# ---- callbacks ----


def test_a_callback_hears_of_every_request(reasoner: Reasoner) -> None:
    heard: list[tuple[int, Event]] = []
    results = reasoner.generate(
        [QUESTION, QUESTION.replace("57", "31")],
        on_event=lambda number, event: heard.append((number, event)),
        n=2,
    )
    for number, result in enumerate(sample for r in results for sample in r.samples):
        events = [event for n, event in heard if n == number]
        assert events[-1].kind == "done" and events[-1].result.token_ids == result.token_ids
        assert [e.step for e in events if e.kind == "step_committed"] == list(result.steps)


def test_a_callback_that_raises_ends_the_call(reasoner: Reasoner) -> None:
    def hang_up(number: int, event: Event) -> None:
        raise KeyError("enough")

    with pytest.raises(KeyError, match="enough"):
        reasoner.generate([QUESTION] * 3, on_event=hang_up)


# ---- the text stream ----


@pytest.mark.parametrize("stop", ["\n5", "14\n</think>", "214", "4\n<", " = 144 ", "87\n"])
@pytest.mark.parametrize("strategy", ["single", "stepwise", Speculative(draft_tokens=4)], ids=str)
def test_nothing_that_a_stop_string_takes_back_was_ever_shown(
    reasoner: Reasoner, stop: str, strategy: Any
) -> None:
    """Stop strings that reach from one step into the next."""
    shown = "".join(reasoner.stream_text(QUESTION, strategy=strategy, stop=stop))
    result = reasoner.generate(QUESTION, strategy=strategy, stop=stop)
    whole = reasoner.generate(QUESTION, strategy=strategy).text
    assert whole is not None
    assert shown == result.text == whole.split(stop)[0]
    assert "".join(step.text or "" for step in result.steps) == result.text


# ---- logs and spans ----


def test_every_request_leaves_one_line_in_the_log(
    reasoner: Reasoner, caplog: pytest.LogCaptureFixture
) -> None:
    class Broken(Policy):
        def decide(self, scores: StepScores) -> AnyDecision:
            raise ZeroDivisionError("policy")

    with caplog.at_level(logging.INFO, logger="cascade"):
        reasoner.generate([QUESTION] * 2, strategy=Single())
        reasoner.generate([QUESTION], policy=Broken())
    lines = [(record.levelname, record.getMessage()) for record in caplog.records]
    assert [level for level, _ in lines] == ["INFO", "INFO", "WARNING"]
    assert lines[0][1].startswith("single: stop after 2")
    assert "ZeroDivisionError: policy" in lines[2][1]


def test_every_request_is_a_span_with_counts_and_no_text(reasoner: Reasoner) -> None:
    pytest.importorskip("opentelemetry.sdk")
    from opentelemetry import trace
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import SimpleSpanProcessor
    from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

    exporter = InMemorySpanExporter()
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    trace.set_tracer_provider(provider)

    result = reasoner.generate(QUESTION, policy=Threshold())
    [span] = exporter.get_finished_spans()
    assert span.name == "cascade.request"
    assert span.attributes is not None
    assert span.attributes["cascade.strategy"] == "stepwise"
    assert span.attributes["cascade.tokens.reasoning"] == result.usage.reasoning
    assert span.attributes["cascade.passes.large"] == result.metrics.passes["large"]
    assert (span.end_time - span.start_time) / 1e9 == pytest.approx(result.metrics.seconds, rel=0.1)
    assert not any("214" in str(value) for value in span.attributes.values())

    class Broken(Policy):
        def decide(self, scores: StepScores) -> AnyDecision:
            raise ZeroDivisionError

    with pytest.raises(PolicyError):
        reasoner.generate(QUESTION, policy=Broken())
    assert exporter.get_finished_spans()[-1].status.status_code.name == "ERROR"
