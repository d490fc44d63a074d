"""One benchmark from start to end: check, measure, compare, predict."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Annotated, TypeAlias, TypeVar

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from cascade.bench.acceptance import measured
from cascade.bench.clock import Clock
from cascade.bench.measure import Bench
from cascade.bench.parity import agreement
from cascade.bench.peers import VllmJob, installed, transformers_peer, vllm_peer
from cascade.bench.predict import Times, assumed, predict
from cascade.bench.report import (
    Acceptance,
    Agreement,
    Decode,
    Machine,
    Peer,
    Prediction,
    Prefill,
    Report,
    Scoring,
    Switch,
)
from cascade.errors import NumericalError, RequestError, unknown
from cascade.model import ElasticModel
from cascade.placement import resolve_device, resolve_dtype
from cascade.shapes import SHAPES, random_model
from cascade.slices import format_bytes
from cascade.threads import suits_one_thread

SCORED = (8, 64)  # ids of a verification, and of a step that is scored
GPU_CONTEXT = 512
RESERVE = 2 * 2**30  # bytes of a GPU left for passes
Progress: TypeAlias = Callable[[str], None]  # told what is being done
T = TypeVar("T")
Positive = Annotated[int, Field(ge=1)]


class Settings(BaseModel):
    """What to measure. None is a default that fits the device.

    model, shape: a checkpoint, or a named shape with random weights in its place
    batches:      rows that are decoded at once; 1 is always among them
    context:      tokens of a row before the first timed one
    run:          drafted tokens a commit; repeats: timed runs a figure; prefill: tokens of a prompt
    peers:        whether engines that are installed run side by side
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    model: str = "nano"
    shape: str | None = None
    device: str = "auto"
    dtype: str = "auto"
    slices: tuple[str, ...] | None = None
    batches: tuple[Positive, ...] | None = None
    context: Positive | None = None
    run: Annotated[int, Field(ge=2, le=64)] = 16
    repeats: Positive = 9
    prefill: Positive | None = None
    peers: bool = True

    @classmethod
    def of(cls, **values: object) -> Settings:
        """Settings by name; raises RequestError where one is not valid."""
        try:
            return cls(**{k: v for k, v in values.items() if v is not None})  # type: ignore[arg-type]
        except ValidationError as error:
            first = error.errors()[0]
            field = ".".join(str(part) for part in first["loc"])
            raise RequestError(f"{field}={first['input']!r}: {first['msg']}") from None


def load(settings: Settings) -> ElasticModel:
    """The model to measure. Raises what `ElasticModel.from_pretrained` and `random_model` raise."""
    if settings.shape is None:
        return ElasticModel.from_pretrained(
            settings.model, device=settings.device, dtype=settings.dtype
        )
    if settings.shape not in SHAPES:
        raise RequestError(unknown("shape", settings.shape, SHAPES))
    device = resolve_device(settings.device)
    dtype = resolve_dtype(settings.dtype)
    if dtype is None:
        dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    return random_model(settings.shape, device=device, dtype=dtype)


def run(settings: Settings, progress: Progress = lambda what: None) -> Report:
    """Check, measure, compare and predict.

    Raises RequestError for bad settings, and NumericalError, before anything is timed, where the
    route to be timed does not agree with the plain reference.
    """
    began = time.perf_counter()
    progress(f"loading {settings.shape or settings.model}")
    model = load(settings)
    for name in settings.slices or ():
        model.slice_index(name)
    threads = torch.get_num_threads()
    if suits_one_thread(model.device, model.nbytes):
        torch.set_num_threads(1)
    try:
        report = _Run(model, settings, progress).report()
    finally:
        torch.set_num_threads(threads)
    peers = list(report.peers)
    if settings.peers and model.device.type == "cuda" and installed("vllm"):
        job = VllmJob.of(model, model.largest, settings.context or GPU_CONTEXT)
        del model  # vLLM needs the memory
        gc.collect()
        torch.cuda.empty_cache()
        progress("vllm, in a process of its own")
        peers.append(vllm_peer(job))
    peers = [replace(peer, ratio=_ratio(peer, report.decode)) for peer in peers]
    seconds = time.perf_counter() - began
    return replace(report, peers=tuple(peers), seconds=seconds)


def _ratio(peer: Peer, decode: Sequence[Decode]) -> float | None:
    """A peer's time over ours for the same slice at batch 1."""
    if peer.seconds is None:
        return None
    ours = {d.slice: d.cost.seconds for d in decode if d.batch == 1}
    return peer.seconds / ours[peer.slice]


class _Run:
    """What one model gives, as a list of named pieces of work."""

    def __init__(self, model: ElasticModel, settings: Settings, progress: Progress) -> None:
        self.model, self.settings, self.progress = model, settings, progress
        self.clock = Clock(model.device)
        on_gpu = self.clock.on_gpu
        self.slices = settings.slices or tuple(model.slices)
        self.context = settings.context or (GPU_CONTEXT if on_gpu else 64)
        longest = model.arch.max_positions - 1
        self.prefill = min(settings.prefill or (4096 if on_gpu else 256), longest)
        self.skipped: list[str] = []

    def report(self) -> Report:
        self.progress("copy bandwidth")
        bandwidth = self.clock.copy_bandwidth()
        bench = Bench(
            self.model,
            self.clock,
            bandwidth,
            self.context,
            self.settings.run,
            self.settings.repeats,
        )
        batches = self._batches(bench)
        self.progress("comparing with the plain reference")
        agreed = agreement(self.model, self.slices, batches)
        refuse_if_wrong(agreed)
        pieces: list[tuple[str, Callable[[], object]]] = []
        for name in self.slices:
            pieces += [(f"{name}, batch {b}", partial(bench.decode, name, b)) for b in batches]
            pieces += [(f"{name}, score {n}", partial(bench.score, name, n)) for n in SCORED]
            pieces.append((f"{name}, prefill", partial(bench.prefill, name, self.prefill)))
        small, large = self.slices[0], max(self.slices, key=self._parameters)
        if small != large:
            for pair in ((small, large), (large, small)):
                pieces.append((f"switch {pair[0]} -> {pair[1]}", partial(bench.switch, *pair)))
        if self.settings.peers:
            prompt = bench.random_ids(self.context)
            for name in self.slices:
                peer = partial(transformers_peer, self.model, self.clock, name, prompt)
                pieces.append((f"transformers, {name}", peer))
        found = []
        for number, (what, work) in enumerate(pieces, 1):
            self.progress(f"{number} of {len(pieces)}: {what}")
            found.append(work())
        decode, scoring = _kind(found, Decode), _kind(found, Scoring)
        predictions: Sequence[Prediction] = ()
        if small != large:
            times = Times.of(decode, scoring, small, large)
            self.progress("acceptance")
            rates = self._acceptance(small, large)
            predictions = [predict(times, rate, small, large) for rate in rates]
        return Report(
            model=self.model.name,
            machine=Machine(
                self.clock.name,
                torch.__version__,
                torch.get_num_threads(),
                str(self.model.dtype).removeprefix("torch."),
                bandwidth,
            ),
            agreement=tuple(agreed),
            decode=decode,
            scoring=scoring,
            prefill=_kind(found, Prefill),
            switches=_kind(found, Switch),
            memory=bench.memory(),
            peers=_kind(found, Peer),
            predictions=tuple(predictions),
            skipped=tuple(self.skipped),
        )

    def _batches(self, bench: Bench) -> list[int]:
        """The batch sizes that fit, 1 among them."""
        wanted = self.settings.batches or ((1, 8, 64) if self.clock.on_gpu else (1, 8))
        free = self.clock.free_bytes()
        kept = [1]
        for batch in sorted({*wanted} - {1}):
            needed = bench.cache_bytes(batch) + RESERVE
            if free is None or needed <= free:
                kept.append(batch)
            else:
                self.skipped.append(
                    f"batch {batch}: its cache and passes need {format_bytes(needed)}, "
                    f"{format_bytes(free)} are free"
                )
        return kept

    def _acceptance(self, small: str, large: str) -> list[Acceptance]:
        rate = None if self.settings.shape else measured(self.model, small, large)
        return assumed() if rate is None else [rate]

    def _parameters(self, name: str) -> int:
        return self.model.slice_spec(name).parameters


def _kind(found: Sequence[object], kind: type[T]) -> tuple[T, ...]:
    return tuple(one for one in found if isinstance(one, kind))


def refuse_if_wrong(agreed: Sequence[Agreement]) -> None:
    """No speed of a route that is wrong. Raises NumericalError."""
    wrong = [one for one in agreed if not one.ok]
    if wrong:
        worst = max(wrong, key=lambda one: one.error / one.allowed)
        raise NumericalError(
            f"no speed is reported: {len(wrong)} of {len(agreed)} comparisons with the plain "
            f"reference failed; the worst, {worst.of} of slice {worst.slice!r} at batch "
            f"{worst.batch}, is off by {worst.error:.2g} where {worst.allowed:.2g} is allowed"
        )
