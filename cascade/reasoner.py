"""Reasoner: load a nested checkpoint and generate with several of its slices at once."""

from __future__ import annotations

import asyncio
import secrets
import threading
from collections.abc import AsyncIterator, Iterator, Mapping
from collections.abc import Sequence as Seq
from dataclasses import replace
from pathlib import Path
from typing import Any, overload

import torch
from pydantic import ValidationError

from cascade import scheduler
from cascade.audit import AuditReport
from cascade.cache import DraftCache
from cascade.errors import CascadeError, PromptTooLong, RequestError
from cascade.events import Done, Event
from cascade.model import ElasticModel
from cascade.policies import Policy, Threshold
from cascade.results import Result
from cascade.sampling import Sampler, SamplingParams, derive_seed
from cascade.scheduler import Job
from cascade.sequence import Consistency, check_consistency
from cascade.strategies import Strategy, resolve
from cascade.strategies.base import Roles
from cascade.task import Task
from cascade.text import Codec, is_messages
from cascade.verbs import Run

DEFAULT_BATCH = 8


class Reasoner:
    """Thinks with a small slice and verifies with a large one.

    Build it with `from_pretrained`; then `generate`, `stream`, `agenerate`, `astream`. One call
    runs at a time; a list of prompts runs concurrently up to `max_batch`.
    """

    def __init__(
        self,
        model: ElasticModel,
        *,
        draft: str | None = None,
        verify: str | None = None,
        strategy: str | Strategy = "stepwise",
        policy: Policy | None = None,
        max_batch: int = DEFAULT_BATCH,
        max_length: int | None = None,
        consistency: Consistency = "exact",
        draft_cache: DraftCache = "shared",
    ) -> None:
        check_consistency(consistency)
        self.model = model
        self.roles = Roles(draft or model.smallest, verify or model.largest, policy or Threshold())
        self.strategy = resolve(strategy)
        self.consistency: Consistency = consistency
        self.draft_cache: DraftCache = draft_cache
        self.max_batch = max_batch
        small, large = (model.slice_spec(n) for n in (self.roles.draft, self.roles.verify))
        if small.parameters > large.parameters:
            raise RequestError(
                f"draft={small.name!r} is larger than verify={large.name!r}; swap them"
            )
        if max_batch < 1:
            raise RequestError(f"max_batch={max_batch} must be at least 1")
        self.codec = Codec.from_directory(model.directory, model.config)
        self.cache = model.cache(
            max_batch=max_batch, max_length=max_length, draft_cache=draft_cache
        )
        self._lock = threading.Lock()

    @classmethod
    def from_pretrained(
        cls,
        model: str | Path | ElasticModel,
        *,
        draft: str | None = None,
        verify: str | None = None,
        strategy: str | Strategy = "stepwise",
        policy: Policy | None = None,
        device: str | torch.device = "auto",
        dtype: str | torch.dtype = "auto",
        max_batch: int = DEFAULT_BATCH,
        max_length: int | None = None,
        consistency: Consistency = "exact",
        draft_cache: DraftCache = "shared",
        **load: Any,
    ) -> Reasoner:
        """Load `"nano"` (ships with cascade), a directory, or a Hub id.

        draft, verify: slice names; the smallest and the largest unless given
        strategy:      `"stepwise"`, `"budget"`, `"explore"`, `"single"`, or a `Strategy`
        policy:        when to keep a drafted step; `Threshold()` unless given
        max_batch, max_length: sequences at once, and tokens (prompt included) of each
        consistency:   what the cache promises while slices take turns: `"exact"`, `"shared"` or
                       `"refresh"` (see `Sequence`)
        draft_cache:   `"own"` for checkpoints whose slices cannot read each other's cache
                       (`handoff_report` measures it): twice the cache, see `Sequence`
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
        )

    @overload
    def generate(
        self,
        prompt: str | Mapping[str, Any],
        params: SamplingParams | None = None,
        *,
        strategy: str | Strategy | None = None,
        policy: Policy | None = None,
        **overrides: Any,
    ) -> Result: ...
    @overload
    def generate(
        self,
        prompt: Seq[Any],
        params: SamplingParams | Seq[SamplingParams] | None = None,
        *,
        strategy: str | Strategy | None = None,
        policy: Policy | None = None,
        **overrides: Any,
    ) -> Any: ...
    def generate(
        self,
        prompt: Any,
        params: SamplingParams | Seq[SamplingParams] | None = None,
        *,
        strategy: str | Strategy | None = None,
        policy: Policy | None = None,
        **overrides: Any,
    ) -> Any:
        """Generate for one prompt, or for a list of prompts in the same order.

        prompt:    a string, a list of chat messages, `{"prompt_token_ids": [...]}`, or a list of
                   these
        params:    `SamplingParams`, or one for each prompt of a list
        overrides: fields of `SamplingParams` by name, `temperature=0.7` for example; and
                   `consistency`, in place of the Reasoner's own

        One prompt returns a `Result` and raises what went wrong. A list returns a list; a request
        that fails while it runs has `finish_reason="error"` and its `error`, the others go on.
        """
        many = isinstance(prompt, (list, tuple)) and not is_messages(prompt)
        results: dict[int, Result] = {}
        with self._lock:
            jobs, samples = self._jobs(
                list(prompt) if many else [prompt], params, strategy, policy, overrides
            )
            for outcome in scheduler.run(jobs, self.max_batch):
                if isinstance(outcome.event, Done):
                    if outcome.error is not None and not many:
                        raise outcome.error
                    results[outcome.number] = outcome.event.result
        grouped = _group([results[job.number] for job in jobs], samples)
        return grouped if many else grouped[0]

    def stream(
        self,
        prompt: Any,
        params: SamplingParams | None = None,
        *,
        strategy: str | Strategy | None = None,
        policy: Policy | None = None,
        **overrides: Any,
    ) -> Iterator[Event]:
        """Events of one prompt as they happen; the last is `Done`. Closing it stops the work."""
        with self._lock:
            jobs, samples = self._jobs([prompt], params, strategy, policy, overrides)
            if samples != 1:
                raise RequestError("stream gives one sample; leave n at 1")
            for outcome in scheduler.run(jobs, 1):
                if outcome.error is not None:
                    raise outcome.error
                yield outcome.event

    def stream_text(
        self, prompt: Any, params: SamplingParams | None = None, **kw: Any
    ) -> Iterator[str]:
        """Committed text only, step by step: nothing that is yielded is ever taken back."""
        for event in self.stream(prompt, params, **kw):
            if event.kind == "step_committed" and event.step.text:
                yield event.step.text

    async def agenerate(
        self, prompt: Any, params: SamplingParams | None = None, **kw: Any
    ) -> Result:
        """`generate` for one prompt without blocking the event loop. Cancelling stops the work."""
        async for event in self.astream(prompt, params, **kw):
            if isinstance(event, Done):
                return event.result
        raise CascadeError("the stream ended without a result")  # cannot happen

    async def astream(
        self, prompt: Any, params: SamplingParams | None = None, **kw: Any
    ) -> AsyncIterator[Event]:
        """`stream` without blocking the event loop. Cancelling stops the work within one step."""
        loop = asyncio.get_running_loop()
        events: asyncio.Queue[Event | BaseException | None] = asyncio.Queue()
        stop = threading.Event()

        def work() -> None:
            try:
                for event in self.stream(prompt, params, **kw):
                    loop.call_soon_threadsafe(events.put_nowait, event)
                    if stop.is_set():
                        return
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
            await asyncio.shield(worker)

    def audit(
        self,
        prompt: Any,
        params: SamplingParams | None = None,
        *,
        tolerance: float | None = None,
        **kw: Any,
    ) -> AuditReport:
        """Run one prompt and compare its cache with a prefill by the verifying slice alone."""
        reports: list[AuditReport] = []
        with self._lock:
            jobs, _ = self._jobs([prompt], params, None, None, kw)
            done = scheduler.run(
                jobs[:1],
                1,
                lambda task: reports.append(
                    task.sequence.audit(self.roles.verify, tolerance=tolerance)
                ),
            )
            for outcome in done:
                if outcome.error is not None:
                    raise outcome.error
        return reports[0]

    # ---- inside ----

    def _jobs(
        self,
        prompts: list[Any],
        params: SamplingParams | Seq[SamplingParams] | None,
        strategy: str | Strategy | None,
        policy: Policy | None,
        overrides: Mapping[str, Any],
    ) -> tuple[list[Job], int]:
        """Check everything before any work; one job a sample. Also the samples per prompt."""
        if not prompts:
            return [], 1
        overrides = dict(overrides)
        consistency: Consistency = overrides.pop("consistency", self.consistency)
        check_consistency(consistency)
        chosen = self.strategy if strategy is None else resolve(strategy)
        roles = self.roles if policy is None else replace(self.roles, policy=policy)
        for name in ("slice", "draft", "verify", "think", "answer"):
            if (slice := getattr(chosen, name, None)) is not None:
                self.model.slice_index(slice)
        if chosen.slots > 1 and self.max_batch < 2:
            raise RequestError(
                f"{type(chosen).__name__} runs drafts in slots of their own; "
                f"max_batch={self.max_batch} leaves none for them"
            )
        each = _params_for(len(prompts), params, overrides)
        samples = each[0].n
        if any(p.n != samples for p in each):
            raise RequestError("all prompts of one call need the same n")
        jobs: list[Job] = []
        for number, (prompt, settings) in enumerate(zip(prompts, each, strict=True)):
            text, ids = self.codec.encode_prompt(prompt)
            self._check(ids, settings)
            shared_seed = not isinstance(params, (list, tuple)) and number > 0
            for sample in range(samples):
                seed = settings.seed
                if seed is None:
                    seed = secrets.randbits(62)
                elif sample or shared_seed:
                    seed = derive_seed(seed, number if shared_seed else 0, sample)
                sampler = Sampler(settings, seed, len(ids), self._ends(settings))
                start = self._starter(chosen, roles, sampler, text, ids, consistency)
                jobs.append(Job(len(jobs), start, chosen.slots))
        return jobs, samples

    def _starter(
        self,
        strategy: Strategy,
        roles: Roles,
        sampler: Sampler,
        text: str | None,
        ids: list[int],
        consistency: Consistency,
    ) -> Any:
        def start() -> tuple[Task, Run]:
            sequence = self.model.sequence(
                cache=self.cache, consistency=consistency, draft_cache=self.draft_cache
            )
            task = Task(sequence, self.codec, sampler, text, ids)
            return task, strategy.run(task, roles)

        return start

    def _ends(self, params: SamplingParams) -> frozenset[int]:
        """Ids that `min_tokens`, or `ignore_eos`, keeps from being drawn."""
        return self.codec.end_ids | frozenset(params.stop_token_ids)

    def _check(self, ids: list[int], params: SamplingParams) -> None:
        vocab = self.model.arch.vocab_size
        outside = [i for i in ids if not 0 <= i < vocab]
        if outside:
            raise RequestError(f"prompt token id {outside[0]} is not in [0, {vocab})")
        if len(ids) >= self.cache.max_length:
            raise PromptTooLong(
                f"the prompt has {len(ids)} tokens; max_length={self.cache.max_length} must leave "
                "room for at least one more. Give Reasoner a larger max_length"
            )
        if params.stop and self.codec.tokenizer is None:
            raise RequestError("stop strings need a tokenizer; use stop_token_ids")
        for token in (*params.stop_token_ids, *params.logit_bias):
            if not 0 <= token < vocab:
                raise RequestError(
                    f"token id {token} in stop_token_ids or logit_bias is not in [0, {vocab})"
                )
        budget = params.thinking_token_budget
        if budget is not None and params.max_tokens is not None and budget > params.max_tokens:
            raise RequestError(
                f"thinking_token_budget={budget} is beyond max_tokens={params.max_tokens}"
            )


def _params_for(
    count: int, params: SamplingParams | Seq[SamplingParams] | None, overrides: Mapping[str, Any]
) -> list[SamplingParams]:
    if isinstance(params, (list, tuple)):
        if len(params) != count:
            raise RequestError(f"{count} prompts, but {len(params)} SamplingParams")
        each = list(params)
    else:
        each = [params or SamplingParams()] * count
    for one in each:
        if not isinstance(one, SamplingParams):
            raise RequestError(f"params must be SamplingParams, got {type(one).__name__}")
    if not overrides:
        return each
    try:
        changes = SamplingParams.model_validate(dict(overrides)).model_dump(exclude_unset=True)
        merged = [
            SamplingParams.model_validate(p.model_dump(exclude_unset=True) | changes) for p in each
        ]
    except ValidationError as error:
        raise RequestError(_explain(error)) from None
    return merged


def _explain(error: ValidationError) -> str:
    """pydantic's findings in one sentence, unknown names with the known ones."""
    from cascade.errors import unknown

    parts = []
    for item in error.errors():
        name = ".".join(str(part) for part in item["loc"])
        if item["type"] == "extra_forbidden":
            parts.append(unknown("sampling parameter", name, SamplingParams.model_fields))
        else:
            parts.append(f"{name}={item['input']!r}: {item['msg']}" if name else str(item["msg"]))
    return "; ".join(parts)


def _group(results: list[Result], samples: int) -> list[Result]:
    """One result a prompt; with several samples, the first one holding them all."""
    if samples == 1:
        return results
    groups = [results[i : i + samples] for i in range(0, len(results), samples)]
    return [replace(group[0], samples=tuple(group)) for group in groups]
