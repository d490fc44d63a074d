"""Which policy is worth its passes? Several on the same problems, beside the baselines.

    python examples/evaluate_policies.py [--size 60] [--out evaluation]

Stopped at any moment, the same command goes on. `cascade eval --help` has the same as a command.
"""

import argparse

from rich.console import Console

import cascade
from cascade.evaluation import GymSource, Run
from cascade.policies import Threshold, at_most
from cascade.strategies import Stepwise


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", type=int, default=60)
    parser.add_argument("--out", default="evaluation")
    args = parser.parse_args()
    console = Console()
    found = cascade.evaluate(
        cascade.Reasoner.from_pretrained("nano", max_batch=16),
        GymSource(task="chain_sum", size=args.size, seed=4242),
        [
            Run(name="strict", strategy=Stepwise(), policy=Threshold(probability=0.9)),
            Run(name="frugal", strategy=Stepwise(), policy=at_most(0.05, Threshold())),
        ],
        out=args.out,
        resume=True,
        console=console,
    )
    console.print(found.table())
    console.print(f"report: {found.report()}")


if __name__ == "__main__":
    main()
