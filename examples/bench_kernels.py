"""Correctness, then speed, of the cache kernels at the full 30b shape on one GPU.

    python examples/bench_kernels.py

Prints no speed if any kernel disagrees with the reference. Every figure is a median over many
calls that rotate over several sets of random buffers, larger together than the L2 cache:
`graph` is device time a call inside a CUDA graph, `host` the host's time to launch one call.
The floor is the bytes that must move over the copy bandwidth measured in the same run.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from types import ModuleType

import torch
from torch import Tensor

from cascade.kernels import load, reference

LAYERS, HEADS, HEAD_DIM, STATE, GROUPS, TAPS = 23, 64, 64, 128, 8, 3
SCANNED = HEADS * HEAD_DIM + GROUPS * STATE  # x and B
CHANNELS = SCANNED + GROUPS * STATE  # and C: what the convolution sees
ATTENTION, KV_HEADS, DIM, VOCABULARY = 6, 2, 128, 131072
DRAFTED, ENTRIES = 8, 17
L2_BYTES = 300e6  # what the rotated buffers exceed together

kernels = load("cuda", "cuda")


@dataclass(frozen=True)
class Case:
    """One measurement: `build` makes a fresh set of buffers and a call on it."""

    name: str
    build: Callable[[], Callable[[], object]]
    bytes: float  # that one call must move
    launches: int = 1


def randn(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, device="cuda", dtype=dtype)


def full(number: int, value: int) -> Tensor:
    return torch.full((number,), value, device="cuda")


class Slots:
    """A cache of `rows` slots and a journal that holds DRAFTED entries of each."""

    def __init__(self, rows: int, positions: int, state_dtype: torch.dtype, layers: int) -> None:
        bf16 = torch.bfloat16
        self.state = randn(layers, rows, HEADS, HEAD_DIM, STATE, dtype=state_dtype)
        self.window = randn(layers, rows, TAPS, CHANNELS, dtype=bf16)
        kv = (ATTENTION, rows, positions, KV_HEADS, DIM)
        self.keys, self.values = randn(*kv, dtype=bf16), randn(*kv, dtype=bf16)
        self.provenance = torch.zeros(rows, positions, device="cuda", dtype=torch.int8)
        self.inputs = randn(layers, rows, ENTRIES, CHANNELS, dtype=bf16)
        self.scanned = randn(layers, rows, ENTRIES, SCANNED, dtype=bf16)
        self.dt = torch.rand(layers, rows, ENTRIES, HEADS, device="cuda") * 0.1
        self.decay = -torch.rand(layers, HEADS, device="cuda") * 8
        self.rows, self.counts = torch.arange(rows, device="cuda"), full(rows, DRAFTED)
        self.starts, self.after = full(rows, 64), full(rows, DRAFTED + 1)
        self.writers = full(rows, 1)

    def ssm(self, k: ModuleType = kernels) -> None:
        rows, counts = self.rows, self.counts
        k.ssm_commit(self.state, self.scanned, self.dt, self.decay, rows, rows, counts)

    def conv(self, k: ModuleType = kernels) -> None:
        k.conv_commit(self.window, self.inputs, self.rows, self.rows, self.counts)

    def keep(self, k: ModuleType = kernels) -> None:
        parts = self.inputs, self.scanned, self.dt
        k.journal_keep(parts, parts, self.rows, self.rows, self.counts)

    def stamp(self, k: ModuleType = kernels) -> None:
        k.provenance_stamp(self.provenance, self.rows, self.starts, self.after, self.writers)

    def commit(self, k: ModuleType = kernels) -> None:
        """Everything that one commit of DRAFTED tokens launches."""
        self.ssm(k)
        self.conv(k)
        self.stamp(k)
        self.keep(k)

    def parts(self) -> list[Tensor]:
        names = ("state", "window", "keys", "values", "provenance", "inputs", "scanned", "dt")
        return [getattr(self, name) for name in names]


# ---- correctness -------------------------------------------------------------------------------


def check() -> list[str]:
    """What disagrees with the reference at the full shape."""
    wrong = []
    for dtype, tolerance in ((torch.float32, 1e-6), (torch.bfloat16, 4e-3)):
        slots = Slots(3, 512, dtype, LAYERS)
        slots.counts = torch.tensor([DRAFTED, 0, 3], device="cuda")
        saved = [part.clone() for part in slots.parts()]
        slots.commit()
        got = [part.clone() for part in slots.parts()]
        for part, old in zip(slots.parts(), saved, strict=True):
            part.copy_(old)
        slots.commit(reference)
        error = (got[0].float() - slots.state.float()).norm() / slots.state.float().norm()
        if not float(error) < tolerance:
            wrong.append(f"ssm_commit {dtype}: relative error {float(error):.1e}")
        for name, a, b in zip(("window", "keys", "values", "provenance", "inputs", "scanned", "dt"),
                              got[1:], slots.parts()[1:], strict=True):  # fmt: skip
            if not torch.equal(a, b):
                wrong.append(f"commit: {name} differs")
        kept = torch.tensor([[0, 2, 3, 7, 9, -1], [1, 4, 5, 6, -1, -1], [-1] * 6], device="cuda")
        forks = torch.tensor([2, 1], device="cuda")
        lengths = torch.tensor([500, 0, 64], device="cuda")
        outcomes = []
        for k in (kernels, reference):
            for part, old in zip(slots.parts(), saved, strict=True):
                part.copy_(old)
            k.kv_compact(slots.keys, slots.values, slots.rows, slots.starts, kept)
            k.fork_copy(slots.keys, slots.values, slots.window, slots.state, 0, forks, 333)
            digest = k.cache_digest(
                slots.keys, slots.values, slots.window, slots.state, slots.rows, lengths
            )
            outcomes.append([*digest, *(part.clone() for part in slots.parts())])
        if not all(torch.equal(a, b) for a, b in zip(*outcomes, strict=True)):
            wrong.append("kv_compact, fork_copy or cache_digest differs")
    arguments = drafts(16)
    for a, b in zip(kernels.accept_resample(*arguments), reference.accept_resample(*arguments),
                    strict=True):  # fmt: skip
        if not torch.equal(a, b):
            wrong.append("accept_resample differs")
    weights, seeds = torch.rand(16, VOCABULARY, device="cuda"), torch.arange(16, device="cuda")
    if not torch.equal(
        kernels.race_sample(weights, seeds, seeds), reference.race_sample(weights, seeds, seeds)
    ):
        wrong.append("race_sample differs")
    return wrong


def drafts(rows: int) -> tuple[Tensor, ...]:
    """Arguments of accept_resample: DRAFTED ids a row, about 0.7 accepted each."""
    logits = 2 * randn(rows, DRAFTED + 1, VOCABULARY)
    target = logits.softmax(-1)
    draft = (logits[:, :DRAFTED] + 0.5 * randn(rows, DRAFTED, VOCABULARY)).softmax(-1)
    ids = draft.log().add_(torch.rand_like(draft).log_().neg_().log_().neg_()).argmax(-1)
    seeds = torch.arange(rows, device="cuda")
    return target, draft, ids, full(rows, DRAFTED), seeds, seeds


# ---- what is measured --------------------------------------------------------------------------

STATE_BYTES = LAYERS * HEADS * HEAD_DIM * STATE * 4
WINDOW_BYTES = LAYERS * TAPS * CHANNELS * 2
TOKEN_BYTES = ATTENTION * 2 * KV_HEADS * DIM * 2
REPLAY_BYTES = LAYERS * DRAFTED * (SCANNED * 2 + HEADS * 4)
KEEP_BYTES = 2 * LAYERS * (CHANNELS * 2 + SCANNED * 2 + HEADS * 4)
FORK_LENGTH, FORKS = 4096, 8


def commit_case(rows: int, verb: str, bytes: float, launches: int = 1, half: bool = False) -> Case:
    dtype = torch.bfloat16 if half else torch.float32
    name = f"{verb}{' bf16 state' if half else ''}, batch {rows}"
    return Case(name, lambda: getattr(Slots(rows, 128, dtype, LAYERS), verb), bytes, launches)


def replay_case(rows: int, entries: int, half: bool) -> Case:
    """ssm_commit of more or fewer entries: what it computes beside the bytes that it moves."""

    def build() -> Callable[[], object]:
        slots = Slots(rows, 128, torch.bfloat16 if half else torch.float32, LAYERS)
        slots.counts = full(rows, entries)
        return slots.ssm

    moved = rows * (STATE_BYTES * (1 if half else 2) + REPLAY_BYTES * entries // DRAFTED)
    state = " bf16 state" if half else ""
    return Case(f"ssm{state}, {entries} entries, batch {rows}", build, moved)


def fork() -> Callable[[], object]:
    slots = Slots(FORKS + 1, FORK_LENGTH, torch.float32, LAYERS)
    targets = torch.arange(1, FORKS + 1, device="cuda")
    parts = slots.keys, slots.values, slots.window, slots.state
    return lambda: kernels.fork_copy(*parts, 0, targets, FORK_LENGTH)


def compact(rows: int, drafted: int) -> Callable[[], object]:
    slots = Slots(rows, 1024, torch.bfloat16, 1)
    kept = torch.full((rows, drafted), -1, device="cuda")
    kept[:, : drafted // 2] = torch.arange(1, drafted, 2, device="cuda")  # every second one
    return lambda: kernels.kv_compact(slots.keys, slots.values, slots.rows, slots.starts, kept)


def digest() -> Callable[[], object]:
    slots = Slots(1, FORK_LENGTH, torch.float32, LAYERS)
    parts = slots.keys, slots.values, slots.window, slots.state
    lengths = full(1, FORK_LENGTH)
    return lambda: kernels.cache_digest(*parts, slots.rows, lengths)


def race(rows: int) -> Callable[[], object]:
    weights, seeds = randn(rows, VOCABULARY).softmax(-1), torch.arange(rows, device="cuda")
    return lambda: kernels.race_sample(weights, seeds, seeds)


def accept(rows: int) -> Callable[[], object]:
    arguments = drafts(rows)
    return lambda: kernels.accept_resample(*arguments)


def cases() -> list[Case]:
    found = []
    for rows in (1, 64):
        ssm = rows * (2 * STATE_BYTES + REPLAY_BYTES)
        conv = rows * 2 * WINDOW_BYTES
        keep = rows * KEEP_BYTES
        found += [
            commit_case(rows, "ssm", ssm),
            commit_case(rows, "ssm", rows * (STATE_BYTES + REPLAY_BYTES), half=True),
            commit_case(rows, "conv", conv),
            commit_case(rows, "keep", keep, launches=3),
            commit_case(rows, "stamp", rows * (DRAFTED + 1)),
            commit_case(rows, "commit", ssm + conv + keep + rows * (DRAFTED + 1), launches=6),
        ]
    found += [replay_case(64, n, half) for half in (False, True) for n in (1, 16)]
    copied = STATE_BYTES + WINDOW_BYTES + FORK_LENGTH * TOKEN_BYTES
    found.append(Case(f"fork 1 -> {FORKS} at {FORK_LENGTH}", fork, copied * (1 + FORKS)))
    for rows, drafted in ((1, 16), (64, 64)):
        moved = rows * drafted // 2 * TOKEN_BYTES * 2
        found.append(
            Case(
                f"compact {drafted // 2} of {drafted}, batch {rows}",
                partial(compact, rows, drafted),
                moved,
            )
        )
    found.append(Case(f"digest of {FORK_LENGTH} tokens", digest, copied, launches=2))
    for rows in (1, 64):
        bytes = rows * VOCABULARY * 4
        found.append(Case(f"race_sample, batch {rows}", partial(race, rows), bytes, 2))
        found.append(Case(f"accept_resample, batch {rows}", partial(accept, rows), 2 * bytes, 2))
    return found


# ---- timing ------------------------------------------------------------------------------------


def device_time(work: Callable[[], object], repeats: int) -> float:
    """Median microseconds of one `work()` by CUDA events."""
    times: list[float] = []
    for _ in range(repeats):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        work()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) * 1e3)
    return statistics.median(times)


def copy_bandwidth() -> float:
    """Bytes a second of a device-to-device copy, read and written bytes counted."""
    source, target = (torch.randint(255, (1 << 32,), device="cuda", dtype=torch.uint8)
                      for _ in range(2))  # fmt: skip
    target.copy_(source)
    return 2 * source.nbytes / (device_time(lambda: target.copy_(source), 15) / 1e6)


def measure(case: Case, bandwidth: float) -> dict[str, object]:
    before = torch.cuda.memory_allocated()
    calls = [case.build()]
    held = torch.cuda.memory_allocated() - before
    calls += [case.build() for _ in range(min(8, int(L2_BYTES // held) + 1))]
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        for call in calls:
            call()
    torch.cuda.synchronize()

    floor = case.bytes / bandwidth * 1e6
    heavy = floor > 200
    graph = torch.cuda.CUDAGraph()
    rounds = 1 if heavy else -(-32 // len(calls))
    with torch.cuda.graph(graph):
        for _ in range(rounds):
            for call in calls:
                call()
    graph.replay()
    in_graph = device_time(graph.replay, 20 if heavy else 40) / (rounds * len(calls))

    launching, latency = [], []
    for turn in range(30 if heavy else 500):
        call = calls[turn % len(calls)]
        start = time.perf_counter()
        call()
        launched = time.perf_counter()
        torch.cuda.synchronize()
        latency.append((time.perf_counter() - start) * 1e6)
        launching.append((launched - start) * 1e6)
    return {
        "name": case.name,
        "bytes": case.bytes,
        "launches": case.launches,
        "floor_us": round(floor, 2),
        "graph_us": round(in_graph, 2),
        "share": round(floor / in_graph, 3),
        "host_us": round(statistics.median(launching), 1),
        "call_to_done_us": round(statistics.median(latency), 1),
    }


def main() -> None:
    torch.manual_seed(0)
    wrong = check()
    if wrong:
        raise SystemExit("no speed on a red test:\n  " + "\n  ".join(wrong))
    print("all kernels agree with the reference at the full shape")
    bandwidth = copy_bandwidth()
    print(f"{torch.cuda.get_device_name()}, copy bandwidth {bandwidth / 1e12:.2f} TB/s\n")
    print(f"{'kernel':32}{'MB':>9}{'floor us':>10}{'graph us':>10}{'share':>8}"
          f"{'host us':>9}{'done us':>9}")  # fmt: skip
    results = []
    for case in cases():
        torch.cuda.empty_cache()
        row = measure(case, bandwidth)
        results.append(row)
        print(
            f"{row['name']:32}{case.bytes / 1e6:9.2f}{row['floor_us']:10.2f}{row['graph_us']:10.2f}"
            f"{row['share']:8.1%}{row['host_us']:9.1f}{row['call_to_done_us']:9.1f}"
        )
    print(json.dumps({"bench": "kernels", "device": torch.cuda.get_device_name(),
                      "copy_bandwidth": bandwidth, "results": results}))  # fmt: skip


if __name__ == "__main__":
    main()
