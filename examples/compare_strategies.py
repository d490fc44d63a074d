"""Every strategy and policy on the same held-out problems: accuracy, time, tokens and passes.

    python examples/compare_strategies.py [--model nano] [--size 300] [--out comparison.json]

Ends with the table of BENCHMARKS.md. Stopped, it goes on with the same command. Policies that are
fitted or calibrated see other problems than those they are measured on.
"""

from __future__ import annotations

import argparse
import json
import time
from collections import Counter
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any, TypeAlias

import torch

from cascade import Reasoner
from cascade.calibration import VERIFIED_ONLY, labelled_runs
from cascade.policies import (
    Cues,
    Escalate,
    Gate,
    LabelledRun,
    Lead,
    Logistic,
    Policy,
    Rewrite,
    Target,
    Threshold,
    all_of,
    at_most,
)
from cascade.problems import Problem, nano_problems
from cascade.strategies import Budget, Explore, Single, Speculative, Stepwise, Strategy

SEED = 71993
BUDGETS = (8, 16, 24, 32, 48)
SLICES = ("small", "medium", "large")

Maker: TypeAlias = Callable[[], Strategy]


def runs(reasoner: Reasoner, size: int, seed: int) -> dict[str, Maker]:
    """Strategies by name, made when their turn comes: some gather labelled runs first."""

    @cache
    def labels() -> list[LabelledRun]:
        problems = nano_problems(size, seed + 1)
        return [run for _, run in labelled_runs(reasoner, problems, needs=VERIFIED_ONLY)]

    def calibrated(policy: Policy) -> Strategy:
        found = reasoner.calibrate([], policy, target=Target(lose=0.05), runs=labels())
        return Stepwise(policy=found)

    found: dict[str, Maker] = {f"{s} alone": lambda s=s: Single(slice=s) for s in reversed(SLICES)}  # type: ignore[misc]
    found["speculative"] = Speculative
    policies: dict[str, Policy] = {
        **{f"min >= {p}": Threshold(probability=p) for p in (0.1, 0.3, 0.5, 0.9)},
        **{f"mean >= {p}": Threshold(score="mean", probability=p) for p in (0.8, 0.9, 0.95)},
        "divergence, mean <= 0.1 nats": Threshold(score="divergence", probability=0.905),
        "divergence, worst <= 1 nat": Threshold(score="max_divergence", probability=0.368),
        "draft's min >= 0.8": Threshold(score="draft_min", probability=0.8),
        "draft's entropy, worst <= 0.5 nats": Threshold(score="max_entropy", probability=0.607),
        "draft's margin, worst >= 0.5": Threshold(score="min_margin"),
        "judge >= 0.5": Threshold(score="judge"),
        "min >= 0.5, whole step rewritten": Threshold(reject=Rewrite()),
        "min >= 0.5, else medium, then large": Threshold(reject=Escalate()),
        "min >= 0.5, else large leads 3 steps": Threshold(reject=Lead(steps=3)),
        "gate: draft's min >= 0.9 unverified": Gate(),
        "gate: draft's min >= 0.99 unverified": Gate(probability=0.99),
        "at most 3 % large": at_most(0.03, Threshold()),
        "cues and min >= 0.5": all_of(Cues(), Threshold()),
    }
    for name, policy in policies.items():
        found[f"stepwise, {name}"] = lambda policy=policy: Stepwise(policy=policy)  # type: ignore[misc]
    found["stepwise, medium scores first"] = lambda: Stepwise(
        policy=Threshold(reject=Escalate(by="score")), middle_scores=True
    )
    found["stepwise, logistic"] = lambda: Stepwise(policy=Logistic().fitted(labels()))
    found["stepwise, min calibrated to lose <= 5 %"] = lambda: calibrated(Threshold())
    found["stepwise, mean calibrated to lose <= 5 %"] = lambda: calibrated(Threshold(score="mean"))
    for drafts in (8, 32):
        found[f"majority of {drafts} small"] = lambda n=drafts: Explore(choose="majority", drafts=n)  # type: ignore[misc]
    for name, explore in {
        "best of 8": Explore(choose="best"),
        "best of 8, no early stop": Explore(choose="best", enough=None),
        "best of 8, by mean": Explore(choose="best", score="mean", enough=None),
        "vote of 8": Explore(choose="vote"),
        "beam of 8": Explore(choose="beam"),
        "best of 8 after a first step by large": Explore(choose="best", plan_steps=1),
    }.items():
        found[f"explore, {name}"] = lambda explore=explore: explore  # type: ignore[misc]
    for budget in BUDGETS:
        for name, thinker, switch in (
            ("small -> large", "small", "exact"),
            ("small -> large, shared cache", "small", "shared"),
            ("large -> large", "large", "exact"),
            ("small -> small", "small", "exact"),
        ):
            answerer = name.split()[2].strip(",")
            found[f"budget {budget}, {name}"] = lambda t=thinker, a=answerer, b=budget, s=switch: (
                Budget(  # type: ignore[misc]
                    think=t, answer=a, budget=b, switch=s
                )
            )
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="nano")
    parser.add_argument("--size", type=int, default=300, help="held-out problems")
    parser.add_argument("--seed", type=int, default=SEED)
    parser.add_argument("--batch", type=int, default=36)
    parser.add_argument("--only", default="", help="runs whose name contains this")
    parser.add_argument("--out", type=Path, default=Path("comparison.json"))
    args = parser.parse_args()
    reasoner = Reasoner.from_pretrained(args.model, max_batch=args.batch, max_length=384)
    if reasoner.model.device.type == "cpu":
        torch.set_num_threads(1)
    problems = nano_problems(args.size, args.seed)
    head = {"model": args.model, "problems": args.size, "seed": args.seed}
    report: dict[str, Any] = json.loads(args.out.read_text()) if args.out.exists() else dict(head)
    if {k: report.get(k) for k in head} != head:
        raise SystemExit(f"{args.out} is the report of another comparison; give another --out")
    for name, make in runs(reasoner, args.size, args.seed).items():
        if name not in report and args.only in name:
            report[name] = measure(reasoner, problems, make(), args.seed)
            args.out.write_text(json.dumps(report, indent=1) + "\n")
            print(row(name, report[name]), flush=True)
    print("\n" + table({k: v for k, v in report.items() if k not in head}))


def measure(
    reasoner: Reasoner, problems: list[Problem], strategy: Strategy, seed: int
) -> dict[str, Any]:
    began = time.perf_counter()
    results = reasoner.generate([p.question for p in problems], strategy=strategy, seed=seed)
    seconds = time.perf_counter() - began
    failed = {result.error for result in results} - {None}
    if failed:
        raise SystemExit(f"{strategy!r}: {failed}")
    kept: Counter[str] = Counter()
    passes: Counter[str] = Counter()
    ran: Counter[str] = Counter()
    thought: Counter[str] = Counter()
    for result in results:
        kept.update(result.usage.by_slice)
        thought.update(result.usage.thinking_by_slice)
        passes.update(result.metrics.passes)
        ran.update(result.metrics.ran)
    return {
        "solved": sum(p.score(r.answer) == 1 for p, r in zip(problems, results, strict=True)),
        "problems": len(problems),
        "seconds": seconds,
        "threads": torch.get_num_threads(),
        "kept": kept,
        "passes": passes,
        "ran": ran,
        "thought": sum(thought.values()),
        "small_share": thought["small"] / max(sum(thought.values()), 1),
        "rewritten": sum(r.usage.rewritten for r in results),
        "unverified": sum(r.usage.unverified for r in results),
        "refreshed": sum(r.metrics.refreshed for r in results),
        "strategy": f"{strategy!r}",
    }


def row(name: str, run: Mapping[str, Any]) -> str:
    cells = [f"{100 * run['solved'] / run['problems']:.1f}", f"{run['seconds']:.1f}"]
    for part in ("kept", "passes", "ran"):
        cells.append(" / ".join(f"{run[part].get(s, 0):,}" for s in SLICES))
    cells += [f"{100 * run['small_share']:.1f}", f"{run['refreshed']:,}"]
    return f"| {name} | " + " | ".join(cells) + " |"


def table(report: Mapping[str, Any]) -> str:
    head = (
        "| run | solved % | seconds | tokens kept: small / medium / large | passes, by request "
        "| tokens run | thought by small % | run again |\n|---|--:|--:|--:|--:|--:|--:|--:|"
    )
    return "\n".join([head, *(row(name, run) for name, run in report.items())])


if __name__ == "__main__":
    main()
