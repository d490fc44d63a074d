"""Evaluations that a test can kill: a process that has loaded nano and forks one on demand.

    python -m tests.evaluation.killable

Each line on standard input is a run directory; a child evaluates into it with resume, and its pid
is printed. A line with a pid waits for that child, and how it ended is printed.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch

import cascade
from cascade.evaluation import GymSource
from cascade.evaluation.sources import load
from cascade.strategies import Single

RUNS = [Single(slice="small"), "stepwise"]


def main() -> None:
    torch.set_num_threads(1)
    reasoner = cascade.Reasoner.from_pretrained("nano", max_batch=3, max_length=256)
    problems, _ = load(GymSource(task="chain_sum", size=12, seed=11))
    cascade.evaluate(reasoner, problems[:1], RUNS, baselines=False)  # so that children only work
    print("ready", flush=True)
    for line in sys.stdin:
        word = line.strip()
        if word.isdigit():
            _, status = os.waitpid(int(word), 0)
            print(os.waitstatus_to_exitcode(status), flush=True)
            continue
        pid = os.fork()
        if pid == 0:
            try:
                cascade.evaluate(
                    reasoner, problems, RUNS, baselines=False, out=Path(word), resume=True
                )
            except BaseException as error:
                print(repr(error), file=sys.stderr, flush=True)
                os._exit(1)
            os._exit(0)
        print(pid, flush=True)


if __name__ == "__main__":
    main()
