"""Every strategy on the same held-out problems: accuracy, time, tokens and passes by slice.

    python examples/compare_strategies.py [--model nano] [--size 300] [--out comparison.json]

Ends with the table of BENCHMARKS.md. Stopped, it goes on with the same command.
"""

from __future__ import annotations

import argparse
import json
import time
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from cascade import Reasoner
from cascade.policies import Threshold
from cascade.problems import Problem, nano_problems
from cascade.strategies import Budget, Explore, Single, Stepwise, Strategy

SEED = 71993
BUDGETS = (8, 16, 24, 32, 48)


def runs() -> dict[str, Strategy]:
    """By name. A majority of eight costs what `explore` with eight drafts costs, less the judge."""
    found: dict[str, Strategy] = {
        "large alone": Single(slice="large"),
        "small alone": Single(slice="small"),
        "majority of 8 small": Explore(choose="majority"),
        "explore, best of 8": Explore(choose="best"),
        "explore, vote of 8": Explore(choose="vote"),
        "explore, beam of 8": Explore(choose="beam"),
    }
    for probability in (0.1, 0.5, 0.9):
        rule = Threshold(probability=probability)
        found[f"stepwise, min >= {probability}"] = Stepwise(policy=rule)
    found["stepwise, mean >= 0.9"] = Stepwise(policy=Threshold(score="mean", probability=0.9))
    for budget in BUDGETS:
        for thinker in ("small", "large"):
            found[f"budget {budget}, {thinker} -> large"] = Budget(think=thinker, budget=budget)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="nano")
    parser.add_argument("--size", type=int, default=300, help="held-out problems")
    parser.add_argument("--seed", type=int, default=SEED)
    parser.add_argument("--batch", type=int, default=36)
    parser.add_argument("--out", type=Path, default=Path("comparison.json"))
    args = parser.parse_args()
    reasoner = Reasoner.from_pretrained(args.model, max_batch=args.batch, max_length=384)
    problems = nano_problems(args.size, args.seed)
    head = {"model": args.model, "problems": args.size, "seed": args.seed}
    report: dict[str, Any] = json.loads(args.out.read_text()) if args.out.exists() else dict(head)
    if {k: report.get(k) for k in head} != head:
        raise SystemExit(f"{args.out} is the report of another comparison; give another --out")
    for name, strategy in runs().items():
        if name not in report:
            report[name] = measure(reasoner, problems, strategy, args.seed)
            args.out.write_text(json.dumps(report, indent=1) + "\n")
            print(row(name, report[name]), flush=True)
    print("\n" + table({k: v for k, v in report.items() if k not in head}))


def measure(
    reasoner: Reasoner, problems: list[Problem], strategy: Strategy, seed: int
) -> dict[str, Any]:
    began = time.perf_counter()
    results = reasoner.generate([p.question for p in problems], strategy=strategy, seed=seed)
    seconds = time.perf_counter() - began
    kept: Counter[str] = Counter()
    passes: Counter[str] = Counter()
    thought: Counter[str] = Counter()
    for result in results:
        kept.update(result.usage.by_slice)
        thought.update(result.usage.thinking_by_slice)
        passes.update(result.metrics.passes)
    return {
        "solved": sum(p.score(r.answer) == 1 for p, r in zip(problems, results, strict=True)),
        "problems": len(problems),
        "seconds": seconds,
        "threads": torch.get_num_threads(),
        "kept": kept,
        "passes": passes,
        "drafted": sum(r.usage.drafted for r in results),
        "small_share": thought["small"] / max(sum(thought.values()), 1),
        "refreshed": sum(r.metrics.refreshed for r in results),
    }


def row(name: str, run: Mapping[str, Any]) -> str:
    kept, passes = run["kept"], run["passes"]
    cells = [
        f"{100 * run['solved'] / run['problems']:.1f}",
        f"{run['seconds']:.1f}",
        *(f"{kept.get(s, 0)} / {passes.get(s, 0)}" for s in ("small", "medium", "large")),
        f"{100 * run['small_share']:.1f}",
        str(run["refreshed"]),
    ]
    return f"| {name} | " + " | ".join(cells) + " |"


def table(report: Mapping[str, Any]) -> str:
    head = (
        "| run | solved % | seconds | small: tokens kept / passes | medium | large "
        "| thought by small % | tokens refreshed |\n|---|--:|--:|--:|--:|--:|--:|--:|"
    )
    return "\n".join([head, *(row(name, run) for name, run in report.items())])


if __name__ == "__main__":
    main()
