"""Killed with SIGKILL at random moments, twenty times, an evaluation loses and repeats nothing."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from cascade.evaluation import Evaluation
from cascade.evaluation.store import RunDirectory
from tests.evaluation.test_evaluate import content

ROOT = Path(__file__).parents[2]
KILLS = 20
ITEMS = 24  # of an evaluation of `killable`


class Killable:
    """The process of `killable.py`."""

    def __init__(self) -> None:
        environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.evaluation.killable"],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment, cwd=ROOT,
        )  # fmt: skip
        assert self._process.stdout is not None
        assert self._process.stdout.readline() == "ready\n"

    def ask(self, line: object) -> int:
        assert self._process.stdin is not None and self._process.stdout is not None
        print(line, file=self._process.stdin, flush=True)
        return int(self._process.stdout.readline())

    def close(self) -> None:
        self._process.communicate()


@pytest.fixture
def killable() -> Iterator[Killable]:
    process = Killable()
    yield process
    process.close()


def lines(directory: Path) -> list[dict[str, Any]]:
    """Whole lines of the results, read without this library."""
    path = directory / "results.jsonl"
    if not path.exists():
        return []
    return [json.loads(x) for x in path.read_bytes().splitlines(True) if x.endswith(b"\n")]


def wait_for_lines(directory: Path, count: int, seconds: float) -> None:
    """Until the results have so many lines, or the time is over."""
    deadline, path = time.monotonic() + seconds, directory / "results.jsonl"
    while time.monotonic() < deadline:
        if path.exists() and path.read_bytes().count(b"\n") >= count:
            return
        time.sleep(0.001)


@pytest.mark.slow
def test_twenty_kills_lose_and_repeat_nothing(killable: Killable, tmp_path: Path) -> None:
    """Moments are drawn from all of a sitting: its start, between items, inside one, its end."""
    rng = random.Random(20)
    whole = tmp_path / "whole"
    assert killable.ask(killable.ask(whole)) == 0
    expected = content(Evaluation.load(whole).records)
    assert len(expected) == ITEMS

    kills = rounds = 0
    fresh: Counter[int] = Counter()  # sittings by the number of items that they finished
    while kills < KILLS:
        directory = tmp_path / f"round{rounds}"
        rounds += 1
        seen: dict[tuple[str, str], dict[str, Any]] = {}
        while True:
            pid = killable.ask(directory)
            if kills < KILLS:
                wait_for_lines(directory, len(seen) + rng.randint(0, 5), 20)
                time.sleep(rng.uniform(0, 0.1))
                os.kill(pid, signal.SIGKILL)
            ended = killable.ask(pid)
            kept = {(x["id"], x["run"]): x for x in lines(directory)}
            assert len(kept) == len(lines(directory)), "an item stands twice"
            assert seen.items() <= kept.items(), "a finished item was lost or made again"
            fresh[len(kept) - len(seen)] += 1
            seen = kept
            if ended == 0:
                break
            assert ended == -signal.SIGKILL
            kills += 1
        assert content(RunDirectory(directory).records()) == expected
    assert kills == KILLS and len(fresh) > 2
