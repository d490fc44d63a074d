"""A policy with a guarantee: lose at most 10 % of the large slice's answers, with 95 % certainty.

    python examples/calibrate.py [--size 48] [--out policy.json]

Both slices write from the same states on problems like those to come; every threshold is replayed
on them and tested (learn then test). `cascade calibrate RUN_DIR` does this for an evaluation.
"""

import argparse
from pathlib import Path

from cascade import Reasoner
from cascade.policies import Target, Threshold, load, save
from cascade.problems import make


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", type=int, default=48, help="problems to calibrate on")
    parser.add_argument("--out", type=Path, default=Path("policy.json"))
    args = parser.parse_args()
    reasoner = Reasoner.from_pretrained("nano", max_batch=16)
    target = Target(lose=0.1, delta=0.05)
    policy = reasoner.calibrate(make("chain_sum", args.size, seed=11), Threshold(), target=target)
    for test in policy.tests:
        verdict = "holds" if test.p_value <= target.delta else "fails"
        print(f"probability {test.value:g}: loses {test.mean:.1%}, p={test.p_value:.3f}, {verdict}")

    save(policy, args.out)
    result = reasoner.generate("57 + 87 + 70", policy=load(args.out))
    print(f"{args.out}: {policy.policy!r}\n57 + 87 + 70 = {result.answer}")


if __name__ == "__main__":
    main()
