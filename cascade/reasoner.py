"""Reasoner: load a nested checkpoint and generate with several of its slices at once."""

from __future__ import annotations

import asyncio
import secrets
import threading
from collections.abc import AsyncIterator, Callable, Generator, Iterable, Iterator, Mapping
from collections.abc import Sequence as Seq
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias, overload

import torch

from cascade import scheduler, telemetry
from cascade.admission import check_request, params_for, resolve_policy
from cascade.audit import AuditReport
from cascade.cache import DraftCache
from cascade.errors import RequestError
from cascade.events import Done, Event
from cascade.model import ElasticModel
from cascade.policies import Calibrated, Policy, Target
from cascade.results import Result
from cascade.sampling import Sampler, SamplingParams, derive_seed
from cascade.scheduler import Job, Outcome
from cascade.sequence import Consistency, check_consistency
from cascade.strategies import Strategy, resolve
from cascade.strategies.base import Roles, Setting, check_sizes
from cascade.task import Task
from cascade.text import Codec, is_messages
from cascade.verbs import Run

if TYPE_CHECKING:
    from cascade.calibration import Scored

DEFAULT_BATCH = 8
PATIENCE = 0.05  # seconds between two looks at whether a waiting call was cancelled

# A policy itself, its name, or its stored settings.
PolicyLike: TypeAlias = Policy | str | Mapping[str, Any]


def _never() -> bool:
    return False


class Reasoner:
    """Thinks with a small slice and verifies with a large one.

    Build it with `from_pretrained`; then `generate`, `stream`, `agenerate`, `astream`. One call
    runs at a time, others wait; a list of prompts runs concurrently up to `max_batch`.
    """

    def __init__(
        self,
        model: ElasticModel,
        *,
        draft: str | None = None,
        verify: str | None = None,
        strategy: str | Strategy = "stepwise",
        policy: PolicyLike | None = None,
        max_batch: int = DEFAULT_BATCH,
        max_length: int | None = None,
        consistency: Consistency = "exact",
        draft_cache: DraftCache = "shared",
        think_tags: tuple[str, str] | None = None,
        chat_template: str | None = None,
        chat_options: Mapping[str, Any] | None = None,
    ) -> None:
        check_consistency(consistency)
        self.model = model
        self.roles = Roles(draft or model.smallest, verify or model.largest, resolve_policy(policy))
        self.strategy = resolve(strategy)
        self.consistency: Consistency = consistency
        self.draft_cache: DraftCache = draft_cache
        self.max_batch = max_batch
        check_sizes(model, self.roles.draft, self.roles.verify)
        if max_batch < 1:
            raise RequestError(f"max_batch={max_batch} must be at least 1")
        self.codec = Codec.from_directory(
            model.directory,
            model.config,
            think_tags=think_tags,
            chat_template=chat_template,
            chat_options=chat_options,
        )
        self.cache = model.cache(
            max_batch=max_batch, max_length=max_length, draft_cache=draft_cache
        )
        self._memory: dict[Any, Any] = {}
        self._lock = threading.Lock()
        self._runner: int | None = None  # the thread whose call runs

    @classmethod
    def from_pretrained(
        cls,
        model: str | Path | ElasticModel,
        *,
        draft: str | None = None,
        verify: str | None = None,
        strategy: str | Strategy = "stepwise",
        policy: PolicyLike | None = None,
        device: str | torch.device = "auto",
        dtype: str | torch.dtype = "auto",
        max_batch: int = DEFAULT_BATCH,
        max_length: int | None = None,
        consistency: Consistency = "exact",
        draft_cache: DraftCache = "shared",
        think_tags: tuple[str, str] | None = None,
        chat_template: str | None = None,
        chat_options: Mapping[str, Any] | None = None,
        **load: Any,
    ) -> Reasoner:
        """Load `"nano"` (ships with cascade), a directory, or a Hub id.

        draft, verify: slice names; the smallest and the largest unless given
        strategy:      `"stepwise"`, `"speculative"`, `"budget"`, `"explore"`, `"single"`, or a
                       `Strategy`
        policy:        when to keep a drafted step: a `Policy`, its name or its stored settings;
                       `Threshold()` unless given
        max_batch, max_length: sequences at once, and tokens (prompt included) of each
        consistency:   what the cache promises while slices take turns: `"exact"`, `"shared"` or
                       `"refresh"` (see `Sequence`)
        draft_cache:   `"own"` for checkpoints whose slices cannot read each other's cache
                       (`handoff_report` measures it): twice the cache, see `Sequence`
        think_tags, chat_template, chat_options: in place of the tokenizer's own; see `Codec`
        load:          further arguments of `ElasticModel.from_pretrained`
        """
        if not isinstance(model, ElasticModel):
            model = ElasticModel.from_pretrained(model, device=device, dtype=dtype, **load)
        return cls(
            model,
            draft=draft,
            verify=verify,
            strategy=strategy,
            policy=policy,
            max_batch=max_batch,
            max_length=max_length,
            consistency=consistency,
            draft_cache=draft_cache,
            think_tags=think_tags,
            chat_template=chat_template,
            chat_options=chat_options,
        )

    @overload
    def generate(
        self,
        prompt: str | Mapping[str, Any],
        params: SamplingParams | None = None,
        *,
        strategy: str | Strategy | None = None,
        policy: PolicyLike | None = None,
        on_event: Callable[[int, Event], None] | None = None,
        **overrides: Any,
    ) -> Result: ...
    @overload
    def generate(
        self,
        prompt: Seq[Any],
        params: SamplingParams | Seq[SamplingParams] | None = None,
        *,
        strategy: str | Strategy | None = None,
        policy: PolicyLike | None = None,
        on_event: Callable[[int, Event], None] | None = None,
        **overrides: Any,
    ) -> Any: ...
    def generate(
        self,
        prompt: Any,
        params: SamplingParams | Seq[SamplingParams] | None = None,
        *,
        strategy: str | Strategy | None = None,
        policy: PolicyLike | None = None,
        on_event: Callable[[int, Event], None] | None = None,
        **overrides: Any,
    ) -> Any:
        """Generate for one prompt, or for a list of prompts in the same order.

        prompt:    a string, a list of chat messages, `{"prompt_token_ids": [...]}`, or a list of
                   these
        params:    `SamplingParams`, or one for each prompt of a list
        on_event:  called as things happen, with the number of the sample (prompts in their order,
                   `n` samples of each) and the event; what it raises ends the call
        overrides: fields of `SamplingParams` by name, `temperature=0.7` for example; and
                   `consistency`, in place of the Reasoner's own

        One prompt returns a `Result` and raises what went wrong. A list returns a list; a request
        that fails while it runs has `finish_reason="error"` and its `error`, the others go on.
        """
        asked = _Asked(prompt, params, strategy, policy, overrides)
        return self._generate(asked, on_event, _never)

    def as_completed(
        self,
        prompts: Seq[Any],
        params: SamplingParams | Seq[SamplingParams] | None = None,
        *,
        strategy: str | Strategy | None = None,
        policy: PolicyLike | None = None,
        max_batch: int | None = None,
        **overrides: Any,
    ) -> Generator[tuple[int, Result], None, None]:
        """Results of a list of prompts as they finish, each with its prompt's place in the list.

        Like `generate` for a list: a finished request's slot goes to the next prompt at once, and
        a request that fails has its `error`. max_batch: run fewer at once than this Reasoner could.
        Closing the iterator stops the work.
        """
        asked, prompts = _Asked(prompts, params, strategy, policy, overrides), list(prompts)
        samples = next((p.n for p in params_for(len(prompts), params, overrides)), 1)
        waiting: dict[int, dict[int, Result]] = {}
        for outcome in self._run(asked, prompts, max_batch=max_batch):
            if not isinstance(outcome.event, Done):
                continue
            number, sample = divmod(outcome.number, samples)
            found = waiting.setdefault(number, {})
            found[sample] = outcome.event.result
            if len(found) == samples:
                del waiting[number]
                [result] = _group([found[i] for i in range(samples)], samples)
                yield number, result

    def check(
        self,
        prompt: Any,
        params: SamplingParams | None = None,
        *,
        strategy: str | Strategy | None = None,
        policy: PolicyLike | None = None,
        **overrides: Any,
    ) -> None:
        """Raise what `generate` would raise before any work; do nothing else."""
        chosen = self.strategy if strategy is None else resolve(strategy)
        self._jobs([prompt], chosen, _Asked(prompt, params, strategy, policy, overrides))

    def stream(
        self,
        prompt: Any,
        params: SamplingParams | None = None,
        *,
        strategy: str | Strategy | None = None,
        policy: PolicyLike | None = None,
        **overrides: Any,
    ) -> Iterator[Event]:
        """Events of one prompt as they happen; the last is `Done`. Closing it stops the work."""
        return self._stream(_Asked(prompt, params, strategy, policy, overrides), _never)

    def stream_text(
        self, prompt: Any, params: SamplingParams | None = None, **kw: Any
    ) -> Iterator[str]:
        """Committed text only, step by step: nothing that is yielded is ever taken back."""
        for event in self.stream(prompt, params, **kw):
            if event.kind == "step_committed" and event.step.text:
                yield event.step.text

    async def agenerate(
        self,
        prompt: Any,
        params: SamplingParams | Seq[SamplingParams] | None = None,
        *,
        strategy: str | Strategy | None = None,
        policy: PolicyLike | None = None,
        on_event: Callable[[int, Event], None] | None = None,
        **overrides: Any,
    ) -> Any:
        """`generate` without blocking the event loop; `on_event` is called in another thread.

        Cancelling stops the work within one step, and returns when it has stopped.
        """
        asked, stop = _Asked(prompt, params, strategy, policy, overrides), threading.Event()
        loop = asyncio.get_running_loop()
        worker = loop.run_in_executor(None, self._generate, asked, on_event, stop.is_set)
        try:
            return await asyncio.shield(worker)
        except asyncio.CancelledError:
            stop.set()
            await asyncio.wait([worker])
            worker.exception()  # it was told to stop: nobody asks why it did
            raise

    async def astream(
        self,
        prompt: Any,
        params: SamplingParams | None = None,
        *,
        strategy: str | Strategy | None = None,
        policy: PolicyLike | None = None,
        **overrides: Any,
    ) -> AsyncIterator[Event]:
        """`stream` without blocking the event loop. Cancelling stops the work within one step."""
        asked, stop = _Asked(prompt, params, strategy, policy, overrides), threading.Event()
        loop = asyncio.get_running_loop()
        events: asyncio.Queue[Event | BaseException | None] = asyncio.Queue()

        def work() -> None:
            try:
                for event in self._stream(asked, stop.is_set):
                    loop.call_soon_threadsafe(events.put_nowait, event)
                loop.call_soon_threadsafe(events.put_nowait, None)
            except BaseException as error:
                loop.call_soon_threadsafe(events.put_nowait, error)

        worker = loop.run_in_executor(None, work)
        try:
            while (event := await events.get()) is not None:
                if isinstance(event, BaseException):
                    raise event
                yield event
        finally:
            stop.set()
            await asyncio.wait([worker])

    async def astream_text(
        self, prompt: Any, params: SamplingParams | None = None, **kw: Any
    ) -> AsyncIterator[str]:
        """`stream_text` without blocking the event loop."""
        async for event in self.astream(prompt, params, **kw):
            if event.kind == "step_committed" and event.step.text:
                yield event.step.text

    def outcomes(
        self,
        prompts: Seq[Any],
        params: SamplingParams | Seq[SamplingParams] | None = None,
        *,
        strategy: str | Strategy | None = None,
        policy: PolicyLike | None = None,
        **overrides: Any,
    ) -> Iterator[Outcome]:
        """`generate` for a list, result by result as they end; what happens before comes too.

        Yields `Outcome`s: the sample's number, an event, its `Task`, and with the last event,
        `Done`, the error that ended it, if any. Closing the iterator stops the work.
        """
        return self._run(_Asked(prompts, params, strategy, policy, overrides), list(prompts))

    def audit(
        self,
        prompt: Any,
        params: SamplingParams | None = None,
        *,
        strategy: str | Strategy | None = None,
        policy: PolicyLike | None = None,
        tolerance: float | None = None,
        **overrides: Any,
    ) -> AuditReport:
        """Run one prompt and compare its cache with a prefill by the verifying slice alone."""
        reports: list[AuditReport] = []
        asked = _Asked(prompt, params, strategy, policy, overrides)

        def look(task: Task) -> None:
            reports.append(task.sequence.audit(self.roles.verify, tolerance=tolerance))

        for outcome in self._run(asked, [prompt], _never, look):
            if outcome.error is not None:
                raise outcome.error
        return reports[0]

    def calibrate(
        self,
        problems: Iterable[Scored],
        policy: PolicyLike,
        *,
        target: Target,
        **settings: Any,
    ) -> Calibrated:
        """A policy with the setting that holds a target on problems like these.

        See `cascade.calibration.calibrate`, which has the settings.
        """
        from cascade.calibration import calibrate

        return calibrate(self, problems, resolve_policy(policy), target=target, **settings)

    # ---- inside ----

    def _generate(
        self,
        asked: _Asked,
        on_event: Callable[[int, Event], None] | None,
        stopped: Callable[[], bool],
    ) -> Any:
        prompt = asked.prompt
        many = isinstance(prompt, (list, tuple)) and not is_messages(prompt)
        prompts = list(prompt) if many else [prompt]
        results: dict[int, Result] = {}
        for outcome in self._run(asked, prompts, stopped):
            if on_event is not None:
                on_event(outcome.number, outcome.event)
            if isinstance(outcome.event, Done):
                if outcome.error is not None and not many:
                    raise outcome.error
                results[outcome.number] = outcome.event.result
        if stopped():
            raise _Stopped
        samples = len(results) // max(len(prompts), 1)
        grouped = _group([results[i] for i in range(len(results))], samples)
        return grouped if many else grouped[0]

    def _stream(self, asked: _Asked, stopped: Callable[[], bool]) -> Iterator[Event]:
        for outcome in self._run(asked, [asked.prompt], stopped, one_sample=True):
            if outcome.error is not None:
                raise outcome.error
            yield outcome.event

    def _run(
        self,
        asked: _Asked,
        prompts: list[Any],
        stopped: Callable[[], bool] = _never,
        on_end: Callable[[Task], None] | None = None,
        *,
        one_sample: bool = False,
        max_batch: int | None = None,
    ) -> Iterator[Outcome]:
        """Outcomes of all samples of some prompts, once this call's turn has come."""
        strategy = self.strategy if asked.strategy is None else resolve(asked.strategy)
        with self._turn(stopped):
            jobs = self._jobs(prompts, strategy, asked)
            if one_sample and len(jobs) != 1:
                raise RequestError("a stream gives one sample; leave n at 1")
            rows = min(max_batch or self.max_batch, self.max_batch)
            for outcome in scheduler.run(jobs, rows, on_end, stopped):
                if isinstance(outcome.event, Done):
                    telemetry.record(outcome.event.result, type(strategy).__name__.lower())
                yield outcome

    @contextmanager
    def _turn(self, stopped: Callable[[], bool]) -> Iterator[None]:
        """Wait until no other call runs."""
        if self._runner == threading.get_ident():
            raise RequestError(
                "a stream of this Reasoner is still open in this thread: read it to its end or "
                "close() it, then call again"
            )
        while not self._lock.acquire(timeout=PATIENCE):
            if stopped():
                raise _Stopped
        self._runner = threading.get_ident()
        try:
            yield
        finally:
            self._runner = None
            self._lock.release()

    def _jobs(self, prompts: list[Any], strategy: Strategy, asked: _Asked) -> list[Job]:
        """Check everything before any work; one job a sample."""
        if not prompts:
            return []
        roles = self.roles
        if asked.policy is not None:
            roles = replace(roles, policy=resolve_policy(asked.policy))
        overrides = dict(asked.overrides)
        consistency: Consistency = overrides.pop("consistency", self.consistency)
        check_consistency(consistency)
        each = params_for(len(prompts), asked.params, overrides)
        if any(params.n != each[0].n for params in each):
            raise RequestError("all prompts of one call need the same n")
        for params in {id(params): params for params in each}.values():
            strategy.check(Setting(self.model, self.codec, self.cache, roles, params))
        jobs: list[Job] = []
        for number, (prompt, params) in enumerate(zip(prompts, each, strict=True)):
            text, ids = self.codec.encode_prompt(prompt)
            check_request(ids, params, self.model, self.cache, self.codec)
            shared_seed = not isinstance(asked.params, (list, tuple)) and number > 0
            for sample in range(params.n):
                seed = params.seed
                if seed is None:
                    seed = secrets.randbits(62)
                elif sample or shared_seed:
                    seed = derive_seed(seed, number if shared_seed else 0, sample)
                ends = self.codec.end_ids | frozenset(params.stop_token_ids)
                sampler = Sampler(params, seed, len(ids), ends)
                start = self._starter(strategy, roles, sampler, text, ids, consistency)
                jobs.append(Job(len(jobs), start, strategy.slots))
        return jobs

    def _starter(
        self,
        strategy: Strategy,
        roles: Roles,
        sampler: Sampler,
        text: str | None,
        ids: list[int],
        consistency: Consistency,
    ) -> Callable[[], tuple[Task, Run]]:
        def start() -> tuple[Task, Run]:
            sequence = self.model.sequence(
                cache=self.cache, consistency=consistency, draft_cache=self.draft_cache
            )
            task = Task(sequence, self.codec, sampler, text, ids, strategy.delimiter, self._memory)
            return task, strategy.run(task, roles)

        return start


@dataclass(frozen=True, slots=True)
class _Asked:
    """The arguments of one call, as they came."""

    prompt: Any
    params: object
    strategy: str | Strategy | None
    policy: PolicyLike | None
    overrides: Mapping[str, Any]


class _Stopped(Exception):
    """The call was told to stop."""


def _group(results: list[Result], samples: int) -> list[Result]:
    """One result a prompt; with several samples, the first one holding them all."""
    if samples <= 1:
        return results
    groups = [results[i : i + samples] for i in range(0, len(results), samples)]
    return [replace(group[0], samples=tuple(group)) for group in groups]
