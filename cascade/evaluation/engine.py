"""Runs items on a Reasoner of this process, in the order in which they finish."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Generator, Iterator, Mapping
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from pydantic import BaseModel, ConfigDict

from cascade.errors import CascadeError, RequestError
from cascade.evaluation.manifest import Engine, checkpoint_digest
from cascade.evaluation.retries import Retries
from cascade.evaluation.runs import AnyPolicy, Run
from cascade.results import Result
from cascade.sampling import SamplingParams

if TYPE_CHECKING:
    from cascade.reasoner import Reasoner

DEFAULT_BATCH = 16
SMALL_MODEL = 256 * 2**20  # bytes of weights

# Memory is tried for with half the batch each time, soon: nobody else is waited for.
HALVING: dict[str, Any] = {"attempts": 16, "wait": 0.02}

_MEMORY = re.compile(r"OutOfMemoryError|MemoryError|CacheFull|out of memory|can't allocate memory")


class Recipe(BaseModel):
    """How to build the same Reasoner again, in another process or on another machine."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    model: str
    draft: str | None = None
    verify: str | None = None
    policy: AnyPolicy | None = None
    device: str = "auto"
    dtype: str = "auto"
    max_batch: int = DEFAULT_BATCH
    max_length: int | None = None
    consistency: Literal["exact", "shared", "refresh"] = "exact"

    @classmethod
    def of(cls, reasoner: Reasoner) -> Recipe:
        """The recipe of a Reasoner that was loaded from a directory. Raises RequestError."""
        model, roles = reasoner.model, reasoner.roles
        if model.directory is None:
            raise RequestError(
                f"model {model.name!r} was not loaded from a directory, so that other processes "
                "cannot load it too"
            )
        return cls(
            model=str(model.directory),
            draft=roles.draft,
            verify=roles.verify,
            policy=roles.policy,
            dtype=str(model.dtype).removeprefix("torch."),
            max_batch=reasoner.max_batch,
            max_length=reasoner.cache.max_length,
            consistency=reasoner.consistency,
        )

    def build(self, retries: Retries | None = None) -> Reasoner:
        """Load it, with half the batch as often as memory does not suffice."""
        import torch

        from cascade.reasoner import Reasoner

        options = self.model_dump(exclude={"policy"}) | {"policy": self.policy}
        retries = retries or Retries()

        def load() -> Reasoner:
            try:
                return Reasoner.from_pretrained(**options)
            except (torch.OutOfMemoryError, MemoryError):
                if options["max_batch"] > 1:
                    options["max_batch"] //= 2
                raise

        memory = (torch.OutOfMemoryError, MemoryError)
        reasoner = retries.call(
            load, "out of memory", lambda error: isinstance(error, memory), **HALVING
        )
        # Small matrices gain nothing from several threads, and lose much where cores are busy.
        if reasoner.model.device.type == "cpu" and reasoner.model.nbytes < SMALL_MODEL:
            torch.set_num_threads(1)
        return reasoner


@dataclass(frozen=True, slots=True)
class Request:
    """What an engine is given of an item: its number, prompt and parameters, seed included."""

    number: int
    prompt: str
    params: SamplingParams


@dataclass(frozen=True, slots=True)
class Finished:
    """What an engine yields: the item's number, and its result or why it could not be started.

    kept: of steps that a slice began and another one ended, by index: how long the text of the
          first is
    """

    number: int
    result: Result | None
    error: str | None
    tries: int
    worker: int
    kept: Mapping[int, int]


class OutOfMemory(CascadeError):
    """A request ran out of memory; the engine goes on with half as many at a time."""

    def __init__(self, request: Request, result: Result, alone: bool) -> None:
        super().__init__(result.error)
        self.request, self.result, self.alone = request, result, alone


class LocalEngine:
    """A Reasoner, fed until every request has an outcome."""

    workers = 1

    def __init__(
        self, reasoner: Reasoner, *, worker: int = 0, retries: Retries | None = None
    ) -> None:
        self.reasoner, self.worker = reasoner, worker
        self.retries = retries or Retries()

    @property
    def batch(self) -> int:
        return self.reasoner.max_batch

    @property
    def device(self) -> str:
        return str(self.reasoner.model.device)

    @property
    def path(self) -> str:
        return str(self.reasoner.model.directory or "")

    def describe(self) -> Engine:
        """What the manifest says about the model."""
        return describe(self.reasoner)

    def check(self, run: Run, params: SamplingParams) -> None:
        """Raise RequestError or SliceError for a run that this model cannot make."""
        self._check({"prompt_token_ids": [0]}, params, run)

    def run(self, run: Run, requests: Seq[Request]) -> Iterator[Finished]:
        """Outcomes as they come. Closing the iterator stops the work."""
        tries: Counter[int] = Counter()

        def finished(request: Request, result: Result | None, error: str | None) -> Finished:
            tried, kept = 1 + tries[request.number], self._kept(result)
            return Finished(request.number, result, error, tried, self.worker, kept)

        ready: list[Request] = []
        for request in requests:
            try:
                self._check(request.prompt, request.params, run)
                ready.append(request)
            except RequestError as error:
                yield finished(request, None, f"{type(error).__name__}: {error}")
        feed = _Feed(self.reasoner, run, ready)
        try:
            while feed.left:
                try:
                    outcome = self.retries.call(
                        feed.next, "out of memory", _is_out_of_memory, **HALVING
                    )
                except OutOfMemory as error:  # even alone
                    outcome = feed.give_up(error)
                tries.update(feed.exhausted)
                feed.exhausted.clear()
                yield finished(*outcome, None)
        finally:
            feed.close()

    def close(self) -> None:
        """Nothing is held."""

    def _kept(self, result: Result | None) -> dict[int, int]:
        codec = self.reasoner.codec
        if result is None or codec.tokenizer is None:
            return {}
        return {
            step.index: len(codec.decode(step.token_ids[: step.drafted_tokens]) or "")
            for step in result.steps
            if 0 < step.drafted_tokens < step.tokens
        }

    def _check(self, prompt: Any, params: SamplingParams, run: Run) -> None:
        self.reasoner.check(prompt, params, strategy=run.strategy, policy=run.policy)


class _Feed:
    """Requests that have no outcome yet, and the stream of those that run."""

    def __init__(self, reasoner: Reasoner, run: Run, requests: Seq[Request]) -> None:
        self.reasoner, self.strategy, self.policy = reasoner, run.strategy, run.policy
        self.left = {request.number: request for request in requests}
        self.batch = reasoner.max_batch
        self.exhausted: list[int] = []
        self._order: list[Request] = []
        self._stream: Generator[tuple[int, Result], None, None] | None = None

    def next(self) -> tuple[Request, Result]:
        """The next outcome. Raises OutOfMemory; the next call then runs half as many at a time."""
        if self._stream is None:
            self._order = list(self.left.values())
            self._stream = self.reasoner.as_completed(
                [request.prompt for request in self._order],
                [request.params for request in self._order],
                strategy=self.strategy,
                policy=self.policy,
                max_batch=self.batch,
            )
        place, result = next(self._stream)
        request = self._order[place]
        if result.error is not None and _MEMORY.search(result.error):
            alone = self.batch == 1
            self.close()
            self.batch = max(self.batch // 2, 1)
            if not alone:
                self.exhausted.append(request.number)
            raise OutOfMemory(request, result, alone)
        del self.left[request.number]
        return request, result

    def give_up(self, error: OutOfMemory) -> tuple[Request, Result]:
        del self.left[error.request.number]
        return error.request, error.result

    def close(self) -> None:
        if self._stream is not None:
            self._stream.close()
            self._stream = None


def _is_out_of_memory(error: BaseException) -> bool:
    return isinstance(error, OutOfMemory) and not error.alone


def describe(reasoner: Reasoner) -> Engine:
    model, roles = reasoner.model, reasoner.roles
    return Engine(
        model=model.name,
        digest=checkpoint_digest(model.directory),
        dtype=str(model.dtype).removeprefix("torch."),
        slices={name: spec.parameters for name, spec in model.slices.items() if spec.trained},
        draft=roles.draft,
        verify=roles.verify,
        policy=roles.policy.model_dump(mode="json"),
        consistency=reasoner.consistency,
        max_length=reasoner.cache.max_length,
    )
