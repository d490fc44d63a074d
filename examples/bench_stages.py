"""What each kernel of a decode step costs: the step once more, with that kernel left out.

    python examples/bench_stages.py [--shape 30b] [--context 512] 30b:1 12b:1 12b:8 30b:1x9

Each argument is SLICE:ROWS, or SLICE:ROWSxTOKENS for a pass of several tokens a row. A step's
kernels are captured into a CUDA graph and timed by events, median of 30 replays of the same
tokens; then once for each kernel without its launches. What that saves is more or less than the
kernel takes by itself, since each kernel starts while the one before ends: it is what the step
would gain if the kernel cost nothing. The outputs of such a step mean nothing, so experts are
chosen once: a kernel that does nothing but choose is left out of all other steps. Where the choice
is made on the way, for few tokens, other experts may be read: the last column counts them, and
where it is not the whole step's, times do not compare. Prints a table for each argument and ends
with one JSON line. Needs a GPU that holds the model.
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch

from cascade.bench.clock import Clock
from cascade.decode import Row
from cascade.graphs import Captured, Decoder
from cascade.kernels.compiler import Kernel
from cascade.model import ElasticModel
from cascade.shapes import random_model

REPLAYS = 30
CHOICE = "choose"  # the kernel that does nothing but choose experts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("passes", nargs="*", default=["30b:1", "12b:1", "12b:8"])
    parser.add_argument("--shape", default="30b")
    parser.add_argument("--context", type=int, default=512, help="tokens of each row before")
    args = parser.parse_args()
    model = random_model(args.shape, device="cuda")
    found = []
    for text in args.passes:
        name, _, size = text.partition(":")
        rows, _, length = size.partition("x")
        found.append(stages(model, name, int(rows), int(length or 1), args.context))
    device = torch.cuda.get_device_name()
    print(json.dumps({"bench": "stages", "device": device, "shape": args.shape, "passes": found}))


def stages(
    model: ElasticModel, name: str, rows: int, length: int, context: int
) -> dict[str, object]:
    """Time a pass whole and without each of its kernels, and print the table."""
    cache = model.cache(max_batch=rows, max_length=context + 64, max_draft=max(length, 8))
    sequences = [model.sequence(cache=cache) for _ in range(rows)]
    generator = torch.Generator().manual_seed(5)

    def draw(count: int) -> list[int]:
        return torch.randint(model.arch.vocab_size, (count,), generator=generator).tolist()

    for sequence in sequences:
        sequence.append(draw(context), name)
    writer = model.slice_index(name)
    decoder = model.runner.decoder(cache)
    if decoder is None:
        raise SystemExit(f"the kernels of short passes do not fit {name} on {cache.device}")
    slots = [sequence.slot for sequence in sequences]
    numbers = [(slot.index, slot.folded, slot.entries, draw(length)) for slot in slots]
    captured = decoder.run(writer, numbers)
    launches: Counter[str] = Counter()

    def count(kernel: str) -> bool:
        launches[kernel] += 1
        return True

    def timed(launched: Callable[[str], bool]) -> Stage:
        ms = replay_ms(decoder, captured, writer, numbers, launched)
        return Stage(ms, sum(int(plan.counts[1]) for plan in captured.plans))

    whole = timed(count)
    chosen = timed(lambda kernel: kernel != CHOICE) if launches[CHOICE] else whole
    print(f"\n{name}, {rows} rows of {length} tokens, {context} before: {whole.ms:.3f} ms")
    print(f"{'without':24}{'launches':>9}{'saves us':>10}{'a launch':>10}{'experts':>9}")
    print(f"{'':43}{whole.experts:9}")
    saved = {}
    for entry, times in launches.most_common():
        left, before = chosen, whole
        if entry != CHOICE:
            left, before = timed(lambda kernel, entry=entry: kernel not in (entry, CHOICE)), chosen
        saved[entry] = 1e3 * (before.ms - left.ms)
        each = saved[entry] / times
        print(f"{entry:24}{times:9}{saved[entry]:10.1f}{each:10.2f}{left.experts:9}", flush=True)
    for sequence in sequences:
        sequence.close()
    label = f"{name}:{rows}x{length}"
    return {"pass": label, "ms": whole.ms, "launches": launches, "saves_us": saved}


class Stage(NamedTuple):
    """A step, whole or not: its time, and the distinct experts of all its layers."""

    ms: float
    experts: int


def replay_ms(
    decoder: Decoder,
    captured: Captured,
    writer: int,
    rows: Sequence[Row],
    launched: Callable[[str], bool],
) -> float:
    """Milliseconds of the pass with those kernels alone whose entry point `launched` accepts."""
    graph = torch.cuda.CUDAGraph()
    with only(launched), torch.cuda.graph(graph):
        decoder._pass(captured, writer)
    clock = Clock(decoder.latest.device)
    # A step moves its table on: without this the journal would be full before the last one.
    return 1e3 * clock.median(graph.replay, REPLAYS, lambda: captured.table.fill(rows))


@contextmanager
def only(launched: Callable[[str], bool]) -> Iterator[None]:
    """Launch no kernel whose entry point is not accepted."""
    launch = Kernel.launch

    def choosing(self: Kernel, *args: object, **options: object) -> None:
        if launched(self.entry):
            launch(self, *args, **options)  # type: ignore[arg-type]

    Kernel.launch = choosing  # type: ignore[method-assign]
    try:
        yield
    finally:
        Kernel.launch = launch  # type: ignore[method-assign]


if __name__ == "__main__":
    main()
