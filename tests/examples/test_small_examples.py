"""The short examples run as they stand and print what they promise."""

import subprocess
import sys
from pathlib import Path

EXAMPLES = Path(__file__).parents[2] / "examples"


def output(name: str, *arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, "-W", "error", str(EXAMPLES / name), *arguments],
        capture_output=True,
        text=True,
        cwd=EXAMPLES.parent,
        env={"PYTHONPATH": ".", "PATH": "/usr/bin:/bin"},
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_strategy_of_ones_own_is_short_and_solves_a_problem() -> None:
    source = (EXAMPLES / "own_strategy.py").read_text()
    assert len(source.splitlines()) <= 35
    printed = output("own_strategy.py")
    assert "57 + 87 + 70 = 214" in printed and "</think>202" in printed
    assert "tokens by small" in printed


def test_both_routes_on_a_processor_write_the_same() -> None:
    printed = output("bench_cpu.py", "--rounds", "1", "--problems", "1")
    rows = [line.split() for line in printed.splitlines()[2:]]
    assert [row[:-3] for row in rows] == [
        ["single", "small"],
        ["single", "medium"],
        ["single", "large"],
        ["stepwise"],
    ]
    assert all(float(speed) > 0 for row in rows for speed in row[-3:-1])
