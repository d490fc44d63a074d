"""What speculative costs beside single: the same requests, both in turn, wall-clock.

    python examples/bench_speculative.py [--model nano | --shape 30b] [--batch 1] [--rounds 7]

Each row is one pair of slices. The output of both must be the same ids first, in fp32; at other
dtypes the share of equal outputs is printed. Shapes have random weights, so nothing is accepted:
the hard case of a drafter that is never right. Ends with the table of BENCHMARKS.md.
"""

from __future__ import annotations

import argparse
import statistics
import time
from typing import Any

import torch

from cascade import Reasoner
from cascade.problems import nano_problems
from cascade.shapes import random_model
from cascade.strategies import Single, Speculative, Strategy


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="nano")
    parser.add_argument("--shape", help="a random model of this shape instead")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--requests", type=int, default=24)
    parser.add_argument("--tokens", type=int, default=256, help="of each request of a random model")
    parser.add_argument("--rounds", type=int, default=7)
    args = parser.parse_args()
    if args.shape:
        model: Any = random_model(args.shape, device=args.device)
        prompts: list[Any] = [
            {"prompt_token_ids": torch.randint(10, 200, (64,)).tolist()}
            for _ in range(args.requests)
        ]
        options: dict[str, Any] = {"max_tokens": args.tokens, "ignore_eos": True}
    else:
        model, options = args.model, {}
        prompts = [p.question for p in nano_problems(args.requests, 71993)]
    reasoner = Reasoner.from_pretrained(
        model, device=args.device, max_batch=args.batch, max_length=64 + max(args.tokens, 320)
    )
    if reasoner.model.device.type == "cpu":
        torch.set_num_threads(1)
    small, large = reasoner.roles.draft, reasoner.roles.verify
    print(
        f"{args.shape or args.model} on {reasoner.model.device}, {reasoner.model.dtype}, batch "
        f"{args.batch}, {args.requests} requests, {args.rounds} rounds in turn\n\n"
        "| draft -> verify | same output | accepted | tokens drafted | single s | speculative s "
        "| ratio of minima | median of ratios |\n|---|--:|--:|--:|--:|--:|--:|--:|"
    )
    for draft in (small, large):
        print(row(reasoner, prompts, options, draft, large, args.rounds), flush=True)


def row(
    reasoner: Reasoner,
    prompts: list[Any],
    options: dict[str, Any],
    draft: str,
    verify: str,
    rounds: int,
) -> str:
    def run(strategy: Strategy) -> tuple[float, Any]:
        began = time.perf_counter()
        results = reasoner.generate(prompts, strategy=strategy, **options)
        return time.perf_counter() - began, results

    ways = Single(slice=verify), Speculative(draft=draft, verify=verify)
    (_, alone), (_, first) = map(run, ways)  # warm, and checked
    same = sum(a.token_ids == b.token_ids for a, b in zip(alone, first, strict=True)) / len(alone)
    if same < 1 and reasoner.model.dtype == torch.float32:
        raise SystemExit(f"{draft} -> {verify}: only {same:.1%} of the outputs are the same")
    pairs = [(run(ways[0])[0], run(ways[1])) for _ in range(rounds)]
    singles = [seconds for seconds, _ in pairs]
    speculative = [seconds for _, (seconds, _) in pairs]
    results = [result for _, (_, found) in pairs for result in found]
    drafted = sum(result.usage.drafted for result in results)
    accepted = sum(result.usage.accepted for result in results) / max(drafted, 1)
    ratios = [b / a for a, b in zip(singles, speculative, strict=True)]
    return (
        f"| {draft} -> {verify} | {same:.1%} | {accepted:.1%} | {drafted // rounds} "
        f"| {min(singles):.2f} | {min(speculative):.2f} | {min(speculative) / min(singles):.3f} "
        f"| {statistics.median(ratios):.3f} |"
    )


if __name__ == "__main__":
    main()
