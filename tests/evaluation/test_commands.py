"""`cascade eval` and `cascade report` as people and scripts meet them."""

import json
import os
import pty
import re
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from typer.testing import CliRunner

from cascade.cli import app, main

ROOT = Path(__file__).parents[2]
FEW = ("--task", "chain_sum", "--size", "4", "--seed", "4242", "--no-figures")


def cascade(*arguments: object) -> str:
    result = CliRunner().invoke(app, list(map(str, arguments)))
    assert result.exit_code == 0, result.output
    return result.output


def failure(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *arguments: object
) -> str:
    monkeypatch.setattr(sys, "argv", ["cascade", *map(str, arguments)])
    with pytest.raises(SystemExit) as stop:
        main()
    assert stop.value.code == 2
    captured = capsys.readouterr()
    assert "Traceback" not in captured.err + captured.out
    return captured.err


def test_eval_writes_a_line_an_item_and_shows_a_table(tmp_path: Path) -> None:
    out = tmp_path / "run"
    command = ("eval", "--model", "nano", *FEW, "--strategy", "stepwise", "--out", out, "--resume")
    output = cascade(*command)
    items = [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]
    mine = [item for item in items if item["run"] == "stepwise"]
    assert [item["id"] for item in mine] == [f"chain_sum-4242-{i}" for i in range(4)]
    assert all({"answer", "score"} <= item.keys() for item in items)
    assert len({(item["id"], item["run"]) for item in items}) == len(items) == 16
    for word in ("large-only", "small-only", "majority", "stepwise", "report.html"):
        assert word in output
    assert "\x1b[" not in output  # plain when not a terminal
    assert (out / "report.html").exists() and not (out / "figures").exists()
    before = (out / "results.jsonl").read_bytes()
    assert "stepwise" in cascade(*command)  # everything is there: nothing is made anew
    assert (out / "results.jsonl").read_bytes() == before


def test_eval_crosses_strategies_and_policies_and_reads_files(tmp_path: Path) -> None:
    data = tmp_path / "mine.jsonl"
    data.write_text('{"question": "57 + 87 + 70", "answer": "214", "id": "one"}\n')
    runs = tmp_path / "runs.yaml"
    runs.write_text("- {name: mine, strategy: {name: budget, budget: 8}}\n")
    out = tmp_path / "run"
    shown = json.loads(
        cascade(
            "eval", "--data", data, "--runs", runs, "--strategy", "stepwise", "--policy", "always",
            "--policy", "threshold", "--no-baselines", "--grader", "numeric", "--max-tokens", "64",
            "--out", out, "--no-figures", "--json",
        )
    )  # fmt: skip
    assert list(shown["runs"]) == ["mine", "stepwise (always)", "stepwise (threshold)"]
    assert shown["runs"]["mine"]["items"] == 1
    manifest = json.loads((out / "manifest.json").read_text())
    assert manifest["params"] == {"max_tokens": 64} and manifest["grader"] == "numeric"


def test_report_draws_figures(tmp_path: Path) -> None:
    out = tmp_path / "run"
    cascade("eval", *FEW, "--no-baselines", "--out", out)
    output = cascade("report", out, "--out", tmp_path / "page.html")
    assert (tmp_path / "page.html").read_text().startswith("<!doctype html>")
    assert "figures" in output
    names = {path.name for path in (out / "figures").iterdir()}
    assert {"frontier_latency.svg", "frontier_cost.png", "acceptance.svg", "tokens.png"} <= names
    assert b"<svg" in (out / "figures" / "calibration.svg").read_bytes()
    assert (out / "figures" / "calibration.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--task", "chain_sun"], "did you mean 'chain_sum'"),
        (["--task", "chain_sum:oops"], "not KEY=VALUE"),
        (["--data", "/no/such.jsonl"], "there is no file /no/such.jsonl"),
        (["--task", "gcd", "--data", "x"], "one of --task, --data and --dataset"),
        (["--dataset", "gsm8"], "did you mean 'gsm8k'"),
        (["--dataset-path", "x"], "give that too"),
        (["--runs", "/no/such.yaml"], "there is no file /no/such.yaml"),
        (["--strategy", "stepwize"], "did you mean 'stepwise'"),
        (["--policy", "treshold"], "did you mean 'threshold'"),
        (["--grader", "exakt"], "did you mean 'exact'"),
        (["--model", "/no/such/model"], "/no/such/model"),
        (["--consistency", "exactly"], "consistency"),
        (["--temperature", "-1"], "temperature"),
        (["--workers", "2"], "workers=2"),
        (["--out", "/dev/null/run"], "could not be made"),
    ],
)
def test_bad_input_is_one_line_on_standard_error(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path,
    arguments: list[str], message: str,
) -> None:  # fmt: skip
    where = [] if "--out" in arguments else ["--out", tmp_path / "run"]
    error = failure(monkeypatch, capsys, "eval", "--size", 2, *where, *arguments)
    assert error.startswith("error: ") and message in error
    assert not (tmp_path / "run").exists()


def test_report_of_a_directory_without_an_evaluation_is_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert "holds no evaluation" in failure(monkeypatch, capsys, "report", tmp_path)


@pytest.mark.slow
def test_ctrl_c_in_a_terminal_stops_cleanly_and_says_how_to_resume(tmp_path: Path) -> None:
    """A real terminal: the live bar is there, and the command that is printed goes on."""
    out = tmp_path / "run"
    command = [
        sys.executable, "-m", "cascade.evaluate", "--task", "chain_sum", "--size", "3000",
        "--strategy", "single", "--no-baselines", "--no-figures", "--out", str(out),
    ]  # fmt: skip
    ours, theirs = pty.openpty()
    environment = os.environ | {"PYTHONPATH": str(ROOT), "TERM": "xterm", "COLUMNS": "200"}
    environment |= {"OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        command, stdin=theirs, stdout=theirs, stderr=theirs, env=environment, cwd=ROOT,
        start_new_session=True,
    )  # fmt: skip
    os.close(theirs)
    screen, deadline, stopped = b"", time.monotonic() + 90, False
    while time.monotonic() < deadline:
        ready, _, _ = select.select([ours], [], [], 1)
        if ready:
            try:
                chunk = os.read(ours, 65536)
            except OSError:  # the other end is closed
                break
            screen += chunk
        if not stopped and re.search(rb"[1-9]\d*/3000", screen) and b"right" in screen:
            process.send_signal(signal.SIGINT)
            stopped = True
        if not ready and process.poll() is not None:
            break
    os.close(ours)
    text = screen.decode()
    assert process.wait(10) == 130, text
    assert "Traceback" not in text
    assert "/s · " in text and "% right" in text and "large 100%" in text
    done = len((out / "results.jsonl").read_text().splitlines())
    assert f"stopped; {done} finished items are kept" in text
    last = text.strip().splitlines()[-1]
    assert last.startswith("  python -m cascade.evaluate --task chain_sum")
    assert last.rstrip().endswith("--resume")
