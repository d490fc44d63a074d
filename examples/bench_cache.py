"""What keeping one cache consistent costs, at the full 30b shape with random weights.

    python examples/bench_cache.py [--shape 30b] [--device cuda] [--batch 64]

Prints a table (bytes that must move, the floor at this machine's copy bandwidth, the distance from
it) and ends with one JSON line. Refuses to report anything while an audit is red. Needs 70 GB of
device memory at the 30b shape, of which 63.2 are weights.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass

import torch

from cascade.batch import Batch
from cascade.cache import Fold
from cascade.model import ElasticModel
from cascade.shapes import random_model


@dataclass(frozen=True)
class Figure:
    """One measurement in `unit` (us, or x), the bytes that must move, and the bar to meet."""

    name: str
    measured: float
    unit: str
    moved: int
    bar: str
    met: bool

    def facts(self, bandwidth: float) -> dict[str, object]:
        """As a row of the JSON line; `share` is the floor over what was measured."""
        floor = self.moved / bandwidth * 1e6
        share = round(floor / self.measured, 3) if self.moved else None
        return {**asdict(self), "floor_us": round(floor, 2), "share_of_copy": share}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", default="30b")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--context", type=int, default=4096)
    args = parser.parse_args()
    torch.set_grad_enabled(False)
    started = time.perf_counter()
    timer = Timer(torch.device(args.device))
    bandwidth = timer.copy_bandwidth()
    print(f"device {timer.name}, copy bandwidth {bandwidth / 1e12:.2f} TB/s", flush=True)

    check(args.shape, args.device)
    before = timer.allocated()
    began = time.perf_counter()
    model = random_model(args.shape, device=args.device)
    print(f"{model!r} in {time.perf_counter() - began:.0f} s", flush=True)

    figures = [
        resident(model, timer.allocated() - before),
        switch(model, timer),
        alternate(model, timer),
        commit(model, timer, bandwidth, 1),
        commit_verb(model, timer),
        commit(model, timer, bandwidth, args.batch),
        fork(model, timer, bandwidth, args.context),
        refresh(model, timer),
    ]
    report(figures, bandwidth)
    results = {
        "bench": "cache",
        "device": timer.name,
        "shape": args.shape,
        "copy_bandwidth": bandwidth,
        "peak_bytes": timer.peak(),
        "seconds": round(time.perf_counter() - started, 1),
        "figures": [figure.facts(bandwidth) for figure in figures],
    }
    print(json.dumps(results))


class Timer:
    """Medians of wall time around work that is finished on the device when the clock stops."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"

    def synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def host_and_device(
        self,
        work: Callable[[], object],
        before: Callable[[], object] = lambda: None,
        runs: int = 30,
    ) -> float:
        """Median microseconds from the call to the end of its device work."""
        times = []
        for _ in range(runs + 3):
            before()
            self.synchronize()
            began = time.perf_counter()
            work()
            self.synchronize()
            times.append((time.perf_counter() - began) * 1e6)
        return statistics.median(times[3:])

    def device_only(self, work: Callable[[], object], runs: int = 30) -> float:
        """Median microseconds on the device, by events."""
        if self.device.type != "cuda":
            return self.host_and_device(work, runs=runs)
        times = []
        for _ in range(runs + 3):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            self.synchronize()
            # Enough queued work that launches never wait for the host.
            torch.cuda._sleep(2_000_000)
            start.record()
            work()
            end.record()
            self.synchronize()
            times.append(start.elapsed_time(end) * 1e3)
        return statistics.median(times[3:])

    def allocated(self) -> int:
        """Bytes of tensors on the device; 0 without one."""
        gc.collect()
        if self.device.type != "cuda":
            return 0
        torch.cuda.empty_cache()
        return torch.cuda.memory_allocated(self.device)

    def peak(self) -> int:
        return torch.cuda.max_memory_allocated(self.device) if self.device.type == "cuda" else 0

    def copy_bandwidth(self) -> float:
        """Bytes read and written per second by a large device-to-device copy."""
        size = 2**31 if self.device.type == "cuda" else 2**26
        source = torch.empty(size, dtype=torch.uint8, device=self.device).random_()
        target = torch.empty_like(source)
        return 2 * size / (self.device_only(lambda: target.copy_(source)) * 1e-6)


def prompt(model: ElasticModel, length: int, seed: int) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, model.arch.vocab_size, (length,), generator=generator).tolist()


def check(shape: str, device: str) -> None:
    """No figures on a red test: the cache after draft, verify, commit must survive an audit.

    In fp32, with a few layers of the full widths: in bf16 a rounding that differs sends tokens of
    a deep random model to other experts, and nothing can be compared.
    """
    model = random_model(shape, device=device, dtype=torch.float32, pattern="MEM*EM")
    small, large = model.smallest, model.largest
    cache = model.cache(max_batch=2, max_length=256, max_draft=16, draft_cache="own")
    reports = []
    for draft_cache in ("shared", "own"):
        with model.sequence(cache=cache, draft_cache=draft_cache) as sequence:
            sequence.append(prompt(model, 100, 1), large)
            for kept in (8, 3, 0):
                sequence.draft(8, small)
                sequence.verify(large)
                sequence.commit(kept)
            reports.append(sequence.audit(large, tolerance=1e-4))
            if sequence.companion is not None:
                reports.append(sequence.companion.audit(small, tolerance=1e-4))
    worst = max(report.max_relative_error for report in reports)
    print(f"audits, fp32: largest relative deviation {worst:.2g}", flush=True)
    if not all(report.ok for report in reports):
        sys.exit("the cache is not consistent; no figures")


def resident(model: ElasticModel, allocated: int) -> Figure:
    """Bytes on the device with every slice live over what the parent alone takes."""
    parent = model.slice_spec(model.largest).parameters * model.dtype.itemsize
    for name in model.slices:
        model.weights(name)
    held = allocated or model.nbytes
    ratio = held / parent
    name = f"weights resident with all slices live: {held / 1e9:.2f} GB, x parent's own"
    return Figure(name, ratio, "x", 0, "<= 1.01", ratio <= 1.01)


def switch(model: ElasticModel, timer: Timer) -> Figure:
    """What changes when the active slice does: a lookup of views, and nothing on the device."""
    names = [model.smallest, model.largest]
    storages = {t.untyped_storage().data_ptr() for _, t in model.weights(names[1]).named_tensors()}
    copied = sum(
        t.nbytes
        for _, t in model.weights(names[0]).named_tensors()
        if t.untyped_storage().data_ptr() not in storages
    )
    if copied:
        sys.exit(f"{copied} bytes of the small slice are not the parent's own")
    cache = model.cache(max_batch=1, max_length=256, max_draft=16)
    with model.sequence(cache=cache, consistency="shared") as sequence:
        sequence.append(prompt(model, 64, 2), names[1])
        turn = iter(range(10**9))

        def work() -> None:
            name = names[next(turn) % 2]
            model.weights(name)
            sequence.slot.usable(model.slice_index(name))

        time_us = timer.host_and_device(work)
    name = "switch the slice of a live sequence, 0 bytes of weights moved"
    return Figure(name, time_us, "us", 0, "<= 50 us", time_us <= 50)


def alternate(model: ElasticModel, timer: Timer, steps: int = 20) -> Figure:
    """The same as it shows: steps that alternate between slices against steps that do not."""
    names = [model.smallest, model.largest]
    cache = model.cache(max_batch=1, max_length=4096, max_draft=16)

    def step_us(turns: list[str]) -> float:
        with model.sequence(cache=cache, consistency="shared") as sequence:
            sequence.append(prompt(model, 64, 2), names[1])

            def work() -> None:
                for i in range(steps):
                    sequence.draft(1, turns[i % len(turns)])
                    sequence.commit(1)

            return timer.host_and_device(work, runs=7) / steps

    alone = [step_us([name]) for name in names]
    both = step_us(names)
    print(
        f"a step of {names[0]} {alone[0]:.0f} us, of {names[1]} {alone[1]:.0f} us, "
        f"in turns {both:.0f} us",
        flush=True,
    )
    extra = both - sum(alone) / 2
    name = "the same, in steps that take turns: more than their mean"
    return Figure(name, extra, "us", 0, "<= 50 us", extra <= 50)


def commit(model: ElasticModel, timer: Timer, bandwidth: float, rows: int) -> Figure:
    """Fold 8 of 8 verified tokens, all layers: every kernel that a commit launches."""
    arch, drafted = model.arch, 8
    cache = model.cache(max_batch=rows, max_length=512, max_draft=16)
    sequences = [model.sequence(cache=cache, consistency="shared") for _ in range(rows)]
    Batch(sequences).append([prompt(model, 24, i) for i in range(rows)], model.largest)
    for part in cache.journal.tensors():
        part.normal_().abs_().mul_(0.1)
    writer = model.slice_index(model.largest)

    def work() -> None:
        folds = [Fold(s.slot, s.slot.index, drafted, writer, True) for s in sequences]
        cache.fold(folds, cache.journal)
        for sequence in sequences:
            sequence.slot.folded -= drafted

    journal = arch.journal_bytes(drafted, model.dtype) - arch.num_mamba * drafted * (
        (arch.conv_channels if drafted > arch.conv_taps - 1 else 0) * model.dtype.itemsize
    )
    inputs = arch.num_mamba * (arch.conv_taps - 1) * arch.conv_channels * model.dtype.itemsize
    kept = 2 * arch.journal_bytes(1, model.dtype)
    moved = rows * (2 * arch.state_bytes() + journal + 2 * inputs + kept)
    if rows == 1:
        time_us = timer.host_and_device(work)
        bar, met = "<= 120 us", time_us <= 120
    else:
        time_us = timer.device_only(work)
        share = moved / bandwidth / (time_us * 1e-6)
        bar, met = ">= 60 % of copy bandwidth", share >= 0.6
    for sequence in sequences:
        sequence.close()
    name = f"commit after verifying {drafted} tokens, batch {rows}, all kernels"
    return Figure(name, time_us, "us", moved, bar, met)


def commit_verb(model: ElasticModel, timer: Timer, drafted: int = 8) -> Figure:
    """`Sequence.commit` of verified tokens, whole: with its checks and bookkeeping."""
    cache = model.cache(max_batch=1, max_length=512, max_draft=16)
    ids = prompt(model, drafted, 6)
    with model.sequence(cache=cache) as sequence:
        sequence.append(prompt(model, 64, 2), model.largest)

        def verify() -> None:
            sequence.propose(ids)
            sequence.verify(model.largest)

        time_us = timer.host_and_device(lambda: sequence.commit(drafted), verify)
    name = f"the same, batch 1, the whole verb `Sequence.commit({drafted})`"
    return Figure(name, time_us, "us", 0, "<= 120 us", time_us <= 120)


def fork(model: ElasticModel, timer: Timer, bandwidth: float, length: int) -> Figure:
    arch, copies = model.arch, 8
    cache = model.cache(max_batch=copies + 1, max_length=length + 8, max_draft=16)
    with model.sequence(cache=cache, consistency="shared") as sequence:
        sequence.append(prompt(model, length, 3), model.largest)
        targets = [cache.allocate() for _ in range(copies)]
        time_us = timer.device_only(lambda: cache.copy(sequence.slot, targets, length))
        for slot in targets:
            cache.release(slot)
    one = (
        length * arch.bytes_per_token(model.dtype)
        + arch.state_bytes()
        + arch.window_bytes(model.dtype)
    )
    moved = (copies + 1) * one  # read once, written to every copy
    share = moved / bandwidth / (time_us * 1e-6)
    name = f"fork 1 -> {copies} at {length} tokens"
    return Figure(name, time_us, "us", moved, ">= 60 % of copy bandwidth", share >= 0.6)


def refresh(model: ElasticModel, timer: Timer, stale: int = 512) -> Figure:
    """Exact refresh of a stale span against a plain prefill of as many tokens from there."""
    small, large = model.smallest, model.largest
    cache = model.cache(max_batch=2, max_length=2048, max_draft=16)
    head, tail = prompt(model, 513, 4), prompt(model, stale, 5)

    def prepare() -> None:
        sequence.rollback(0)
        sequence.append(head, large)
        sequence.append(tail, small)

    def prepare_plain() -> None:
        plain.rollback(0)
        plain.append(head, large)

    with (
        model.sequence(cache=cache, consistency="refresh") as sequence,
        model.sequence(cache=cache, consistency="shared") as plain,
    ):
        refreshed = timer.host_and_device(lambda: sequence.refresh(large), prepare, runs=5)
        prefilled = timer.host_and_device(lambda: plain.append(tail, large), prepare_plain, runs=5)
    ratio = refreshed / prefilled
    print(f"refresh {refreshed / 1e3:.1f} ms, prefill {prefilled / 1e3:.1f} ms", flush=True)
    name = f"exact refresh of {stale} stale tokens, x a plain prefill"
    return Figure(name, ratio, "x", 0, "<= 1.1", ratio <= 1.1)


def report(figures: list[Figure], bandwidth: float) -> None:
    print(f"\n{'what':<72}{'measured':>12}{'bytes':>12}{'floor us':>10}{'share':>8}  bar")
    for figure in figures:
        facts = figure.facts(bandwidth)
        moved, share = (
            f"{figure.moved / 1e6:.1f} MB" if figure.moved else "",
            facts["share_of_copy"],
        )
        print(
            f"{figure.name:<72}{figure.measured:>9.2f} {figure.unit:<2}{moved:>12}"
            f"{facts['floor_us'] if figure.moved else '':>10}{'' if share is None else share:>8}"
            f"  {figure.bar}: {'met' if figure.met else 'MISSED'}"
        )


if __name__ == "__main__":
    main()
