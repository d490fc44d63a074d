"""Train nano: three nested slices that solve problems and read each other's cache.

    python examples/train_nano.py --out DIR [--minutes 7] [--device cuda]

From seed to checkpoint in one command, on one GPU within ten minutes, or on a CPU with
`--preset tiny` and more patience. Stopped runs go on with the same command.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent))

from nano import checkpoint, network
from nano.documents import Rows, batches
from nano.muon import Optimizer
from nano.network import Nano, Sizes, Widths, pair_forward

PRESETS: dict[str, tuple[Sizes, dict[str, Widths]]] = {
    "nano": (Sizes(), {"small": (24, 8), "medium": (64, 16), "large": (320, 128)}),
    "tiny": (
        Sizes(
            pattern="ME*ME", hidden=64, ffn=32, shared=64, experts=4, heads=4, head_dim=16, state=16
        ),
        {"small": (24, 8), "medium": (40, 16), "large": (64, 32)},
    ),
}
MIX_FROM = 0.15  # share of the time after which rows have caches of mixed owners
MIXED_ROWS = 0.75
TAKEN_OVER = 10  # tokens after another slice's ones that count more in the loss: they are harder
TAKEN_OVER_WEIGHT = 3.0
COOL_FROM = 0.4  # share of the time after which the learning rate falls linearly to zero
WARM_STEPS = 100
END_SECONDS = 8  # to write the files
COMPILED = ("mamba_layer", "attention_layer", "moe_layer")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--preset", choices=PRESETS, default="nano")
    parser.add_argument("--minutes", type=float, default=7.0, help="of training, compiling aside")
    parser.add_argument("--within", type=float, help="minutes for everything; shortens training")
    parser.add_argument("--start-from", type=Path, help="a checkpoint to train further, gently")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seed", type=int, default=2605)
    parser.add_argument("--rows", type=int, default=None, help="rows of 224 tokens a batch")
    parser.add_argument("--workers", type=int, default=None, help="processes that make data")
    parser.add_argument("--no-compile", action="store_true")
    parser.add_argument(
        "--also", action="append", default=[], metavar="HIDDENxFFN", help="train this width besides"
    )
    args = parser.parse_args()
    began = time.perf_counter()
    on_gpu = args.device.startswith("cuda")
    rows = args.rows or (272 if on_gpu else 16)
    workers = args.workers if args.workers is not None else (14 if on_gpu else 1)
    torch.manual_seed(args.seed)
    torch.set_float32_matmul_precision("high")
    if on_gpu and not args.no_compile:
        compile_layers()
    sizes, slices = PRESETS[args.preset]
    trained = slices | {also: parse_width(also) for also in args.also}
    trainer = Trainer(Nano(sizes, args.seed).to(args.device), trained, args.device)
    args.out.mkdir(parents=True, exist_ok=True)
    if args.start_from:
        checkpoint.read(trainer.model, args.start_from)
        trainer.skipped = 0.75
    trainer.resume(args.out)
    source = batches(args.seed + trainer.step, rows, 224, workers)
    if on_gpu and not args.no_compile:
        with torch.cuda.stream(torch.cuda.Stream()):  # as a capture wants it
            warm_up(trainer, source)
            torch.cuda.synchronize()
        trainer.capture()
    seconds = args.minutes * 60
    if args.within:
        seconds = min(seconds, args.within * 60 - (time.perf_counter() - began) - END_SECONDS)
    train(trainer, source, seconds, args.out)
    checkpoint.write(trainer.model, slices, args.out)
    log = trainer.log | {
        "command": " ".join(["python", *sys.argv]),
        "seed": args.seed,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "device": torch.cuda.get_device_name() if on_gpu else platform.processor(),
    }
    (args.out / "training_log.json").write_text(json.dumps(log, indent=1) + "\n")
    print(f"wrote {args.out}", flush=True)
    source.close()  # type: ignore[attr-defined]


def parse_width(text: str) -> Widths:
    hidden, _, ffn = text.partition("x")
    return int(hidden), int(ffn)


def pairs(slices: Mapping[str, Widths]) -> list[tuple[str, str]]:
    """Which two slices run together, by turns: each with each, those with the largest twice.

    How well a slice does depends on its share of the steps more than on its width.
    """
    names = sorted(slices, key=lambda name: slices[name], reverse=True)
    every = list(combinations(names, 2))
    return [*every, *(pair for pair in every if names[0] in pair)]


def compile_layers() -> None:
    """Compile layer by layer: few graphs, each used for many layers."""
    torch._dynamo.config.cache_size_limit = 64
    for name in COMPILED:
        setattr(network, name, torch.compile(getattr(network, name), dynamic=False))


@dataclass
class Trainer:
    """Model, optimiser and progress of one run."""

    model: Nano
    slices: dict[str, Widths]
    device: str

    def __post_init__(self) -> None:
        self.optimizer = Optimizer(dict(self.model.named_parameters()))
        self.pairs = pairs(self.slices)
        self.step, self.elapsed, self.tokens = 0, 0.0, 0
        self.skipped = 0.0  # share of the schedule that lies behind a checkpoint started from
        # What a step reads and writes stays in place, so that a graph of it can be replayed.
        self.rows: list[Tensor] = []  # ids, document, reply, [B, T] each
        self.rate = torch.zeros((), device=self.device)
        self.mixed_rows = torch.zeros((), device=self.device)
        self.losses = {name: torch.zeros((), device=self.device) for name in self.slices}
        self.graphs: dict[tuple[str, str], torch.cuda.CUDAGraph] = {}
        self.under_way: list[torch.cuda.Event] = []  # of replays, the oldest first
        self.log: dict[str, object] = {"progress": []}

    def update(self, rows: Rows, share: float) -> None:
        """One step; `share` is the part of the time that has passed."""
        self._feed(rows)
        self.mixed_rows.fill_(MIXED_ROWS if share >= MIX_FROM else 0.0)
        rate = min(1.0, (self.step + 1) / WARM_STEPS)
        if share > COOL_FROM:
            rate *= max(0.0, (1 - share) / (1 - COOL_FROM))
        self.rate.fill_(rate)
        pair = self.pairs[self.step % len(self.pairs)]
        if pair in self.graphs:
            self.graphs[pair].replay()
            self._pace()
        else:
            self._step(*pair)
        self.step += 1
        self.tokens += int(rows.document.astype(bool).sum())

    def capture(self) -> None:
        """Keep each pair's step as a CUDA graph: a step has more launches than a host is quick."""
        pool = None
        for pair in dict.fromkeys(self.pairs):
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=pool):
                self._step(*pair)
            pool = graph.pool()
            self.graphs[pair] = graph

    def _step(self, first: str, second: str) -> None:
        ids, document, reply = self.rows[0].long(), self.rows[1].long(), self.rows[2]
        owner, mixed = owners(document, reply, self.mixed_rows)
        foreign = (mixed & (owner == 1), mixed & (owner == 0))
        logits = pair_forward(
            self.model, ids, document, (self.slices[first], self.slices[second]), foreign
        )
        loss, parts = pair_loss(logits[0], logits[1], ids, document, reply, foreign, mixed)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step(self.rate)
        self._balance(logits[2])
        for name, value in zip((first, second), parts, strict=True):
            self.losses[name].copy_(value)

    def _feed(self, rows: Rows) -> None:
        parts = [torch.from_numpy(part) for part in (rows.ids, rows.document, rows.reply)]
        if not self.rows:
            self.rows = [torch.empty_like(part, device=self.device) for part in parts]
        for held, part in zip(self.rows, parts, strict=True):
            held.copy_(part.pin_memory() if held.is_cuda else part, non_blocking=True)

    def _pace(self) -> None:
        """Let the host be one step ahead of the GPU, not more: the host watches the time."""
        self.under_way.append(torch.cuda.Event())
        self.under_way[-1].record()
        if len(self.under_way) > 1:
            self.under_way.pop(0).synchronize()

    @torch.no_grad()
    def _balance(self, loads: list[Tensor]) -> None:
        """Move each expert's choice bias against its load; one bias serves all slices."""
        layers = [i for i, kind in enumerate(self.model.sizes.pattern) if kind == "E"]
        for i, load in zip(layers, loads, strict=True):
            bias = self.model.get(f"layers.{i}.mixer.gate.e_score_correction_bias")
            bias += 1e-3 * self.rate * (load.mean() - load).sign()

    def save(self, directory: Path) -> None:
        save_file(
            {
                k: v.contiguous()
                for k, v in (checkpoint.state(self.model) | self.optimizer.state()).items()
            },
            directory / "resume.safetensors.part",
        )
        progress = {"step": self.step, "elapsed": self.elapsed, "tokens": self.tokens}
        (directory / "resume.json").write_text(json.dumps(progress))
        (directory / "resume.safetensors.part").replace(directory / "resume.safetensors")

    def resume(self, directory: Path) -> None:
        if not (directory / "resume.safetensors").exists():
            return
        saved = load_file(directory / "resume.safetensors", device=self.device)
        checkpoint.load_parameters(self.model, saved)
        self.optimizer.load(saved)
        progress = json.loads((directory / "resume.json").read_text())
        self.step, self.elapsed, self.tokens = (
            progress["step"], progress["elapsed"], progress["tokens"],
        )  # fmt: skip
        print(f"going on at step {self.step}, {self.elapsed:.0f} s", flush=True)


def warm_up(trainer: Trainer, source: Iterator[Rows]) -> None:
    """Compile every graph that training will use, and forget the steps that this took."""
    began = time.perf_counter()
    keep = {k: v.clone() for k, v in checkpoint.state(trainer.model).items()}
    optimizer = {k: v.clone() for k, v in trainer.optimizer.state().items()}
    step, tokens = trainer.step, trainer.tokens
    for _ in trainer.pairs:
        for attempt in range(3):
            try:
                trainer.update(next(source), 0.5)
                break
            except RuntimeError as error:  # a cold compile has been seen to fail once
                print(f"compiling again after: {error}", flush=True)
                if attempt == 2:
                    raise
    checkpoint.load_parameters(trainer.model, keep)
    trainer.optimizer.load(optimizer)
    trainer.step, trainer.tokens = step, tokens
    trainer.log["compile_seconds"] = round(time.perf_counter() - began, 1)
    print(f"compiled in {time.perf_counter() - began:.0f} s", flush=True)


def train(trainer: Trainer, source: Iterator[Rows], seconds: float, out: Path) -> None:
    """Train until the time is over, with a line of progress every ten seconds."""
    began, base = time.perf_counter(), trainer.elapsed
    shown = saved = began
    while trainer.elapsed < seconds:
        share = trainer.skipped + (1 - trainer.skipped) * trainer.elapsed / seconds
        trainer.update(next(source), share)
        now = time.perf_counter()
        trainer.elapsed = base + now - began
        if now - shown > 10:
            shown = now
            rate = trainer.tokens / max(trainer.elapsed, 1e-9)
            losses = {name: round(float(value), 4) for name, value in trainer.losses.items()}
            line = {"step": trainer.step, "seconds": round(trainer.elapsed), "loss": losses}
            trainer.log["progress"].append(line)  # type: ignore[attr-defined]
            print(f"{line} {rate / 1e3:.0f}k tokens/s", flush=True)
        if now - saved > 60:
            saved = now
            trainer.save(out)
    trainer.save(out)
    trainer.log |= {
        "steps": trainer.step,
        "seconds": round(trainer.elapsed, 1),
        "tokens": trainer.tokens,
        "parameters": sum(p.numel() for p in trainer.model.parameters()),
    }


def owners(document: Tensor, reply: Tensor, share: Tensor) -> tuple[Tensor, Tensor]:
    """Who of the pair owns each token's cache entry, [B, T] in {0, 1}, and which rows are mixed.

    Three in five rows hand each document over once, anywhere in its reply; the others switch
    anywhere, often or now and then. Most switches are inside a number: there the rest of it has to
    be found over what another slice had in mind.
    """
    rows, length = document.shape
    device = document.device
    pattern = torch.rand(rows, 1, device=device)
    chance = torch.rand(rows, length, device=device)
    switches = chance < torch.where(pattern < 0.2, 1 / 8, 1 / 24)
    start = torch.randint(0, 2, (rows, 1), device=device)
    often = (start + switches.long().cumsum(1)) % 2
    once = (start + handed_over(document, reply, chance).long()) % 2
    owner = torch.where(pattern < 0.4, often, once)
    mixed = torch.rand(rows, 1, device=device) < share
    return owner, mixed.expand(rows, length)


def handed_over(document: Tensor, reply: Tensor, chance: Tensor) -> Tensor:
    """Tokens [B, T] bool after one place of each document's reply, drawn evenly."""
    last = document.shape[1] + 1  # a document has a token at least
    drawn = torch.where(reply, chance, 0.0)
    top = torch.zeros(len(document), last, device=document.device)
    top = top.scatter_reduce(1, document, drawn, "amax")
    place = reply & (drawn == top.gather(1, document))  # one token of each document
    count = place.long().cumsum(1)
    before = (count - place.long()).masked_fill(document == F.pad(document[:, :-1], (1, 0)), 0)
    return count > before.cummax(1).values


def taken_over(foreign: Tensor) -> Tensor:
    """Weight [B, T] of each token's loss: more for the first that follow the other's tokens."""
    recent = F.max_pool1d(F.pad(foreign.float(), (TAKEN_OVER, 0))[:, None], TAKEN_OVER + 1, 1)
    return 1 + (TAKEN_OVER_WEIGHT - 1) * recent[:, 0]


def pair_loss(
    large: Tensor,
    small: Tensor,
    ids: Tensor,
    document: Tensor,
    reply: Tensor,
    foreign: tuple[Tensor, Tensor],
    mixed: Tensor,
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """Cross-entropy of each slice on its own tokens; unmixed rows also distil into the smaller."""
    target = ids[:, 1:]
    counted = reply[:, 1:] & (document[:, 1:] == document[:, :-1])
    large, small = large[:, :-1].float(), small[:, :-1].float()
    losses = []
    for logits, other in ((large, foreign[0]), (small, foreign[1])):
        mask = (counted & ~other[:, :-1]).float() * taken_over(other)[:, :-1]
        each = F.cross_entropy(logits.flatten(0, 1), target.flatten(), reduction="none")
        losses.append((each.view_as(mask) * mask, mask))
    plain = (counted & ~mixed[:, :-1]).float()
    teacher = large.detach().log_softmax(-1)
    divergence = (teacher.exp() * (teacher - small.log_softmax(-1))).sum(-1) * plain
    total = counted.float().sum().clamp(min=1)
    first = losses[0][0].sum() / total
    alone = losses[1][0]
    # On unmixed rows half cross-entropy, half distillation.
    second = (alone * (1 - 0.5 * plain)).sum() / total + 0.5 * divergence.sum() / total
    parts = tuple((loss.sum() / mask.sum().clamp(min=1)).detach() for loss, mask in losses)
    return first + second, (parts[0], parts[1])


if __name__ == "__main__":
    main()
