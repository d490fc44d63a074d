"""How fast nano runs on a processor, batch 1, against the plain reference.

    python examples/bench_cpu.py [--rounds 8]

Both routes take turns on the same problems, greedily, on one thread; a problem's time is the
shortest of its runs, because other work on the machine can only lengthen it. Says first whether
both write the same tokens.
"""

from __future__ import annotations

import argparse
from collections import defaultdict

import torch

from cascade import Reasoner
from cascade.problems import nano_problems
from cascade.strategies import Single, Stepwise, Strategy

ROUTES = {"reference": "reference", "fast": "auto"}


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--rounds", type=int, default=8)
    arguments.add_argument("--problems", type=int, default=4)
    rounds, problems = vars(arguments.parse_args()).values()
    torch.set_num_threads(1)
    reasoners = {
        name: Reasoner.from_pretrained("nano", device="cpu", backend=backend, max_batch=1)
        for name, backend in ROUTES.items()
    }
    questions = [problem.question for problem in nano_problems(problems, seed=2605)]
    slices = list(reasoners["fast"].model.slices)
    runs: dict[str, Strategy] = {f"single {name}": Single(slice=name) for name in slices}
    runs["stepwise"] = Stepwise()
    print(f"tokens a second, torch {torch.__version__}, one thread, {rounds} rounds")
    print(f"{'run':16s} {'reference':>12s} {'fast':>12s} {'ratio':>7s}")
    for name, strategy in runs.items():
        best: dict[tuple[str, int], float] = defaultdict(lambda: float("inf"))
        written: dict[str, list[tuple[int, ...]]] = {}
        for _ in range(rounds):
            for route, reasoner in reasoners.items():
                results = [reasoner.generate(q, strategy=strategy) for q in questions]
                written[route] = [result.token_ids for result in results]
                for number, result in enumerate(results):
                    best[route, number] = min(best[route, number], result.metrics.seconds)
        if written["reference"] != written["fast"]:
            raise SystemExit(f"{name}: the two routes write different tokens")
        tokens = sum(map(len, written["fast"]))
        speed = {
            route: tokens / sum(best[route, number] for number in range(len(questions)))
            for route in ROUTES
        }
        ratio = speed["fast"] / speed["reference"]
        print(f"{name:16s} {speed['reference']:12.0f} {speed['fast']:12.0f} {ratio:6.2f}x")


if __name__ == "__main__":
    main()
