"""Every example of the evaluation's side runs as it stands and shows what it promises."""

import json
import runpy
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from cascade import Reasoner
from cascade.evaluation import Evaluation

EXAMPLES = Path(__file__).parents[2] / "examples"
Example = Callable[..., list[str]]


@pytest.fixture
def example(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Example:
    """Runs a script as `python examples/NAME.py ARGUMENTS` would; the lines it printed."""

    def run(name: str, *arguments: object) -> list[str]:
        monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
        runpy.run_path(str(EXAMPLES / name), run_name="__main__")
        return capsys.readouterr().out.splitlines()

    return run


def test_first_steps(example: Example) -> None:
    lines = example("first_steps.py")
    assert "25 * 48 = 1200" in "\n".join(lines)
    assert any(line.startswith("answer 1200, tokens by slice") for line in lines)
    assert "57 + 87 + 70 -> 214" in lines
    assert lines[-1] == "</think>3396"


def test_a_policy_of_ones_own(example: Example) -> None:
    own, other = example("own_policy.py")
    assert own.startswith("long_numbers: 3396") and other.startswith("threshold: 3396")


def test_elastic_budget(example: Example) -> None:
    head, *rows = [line.split() for line in example("elastic_budget.py")]
    assert head[0] == "budget" and len(rows) == 4
    exact = [row for row in rows if row[1] == "exact"]
    assert int(exact[0][2]) < int(exact[-1][2])  # a longer thought solves more
    assert all(int(row[4]) > 0 for row in exact)
    assert all(row[4] == "0" for row in rows if row[1] == "shared")


def test_explore(example: Example) -> None:
    lines = example("explore.py")
    heads = [line for line in lines if not line.startswith(" ")]
    assert [line.split(":")[0] for line in heads] == ["best", "majority", "vote"]
    assert sum(line.startswith("  *") for line in lines) == 3


def test_calibrate(example: Example, tmp_path: Path) -> None:
    lines = example("calibrate.py", "--size", 30, "--out", tmp_path / "policy.json")
    assert lines[0].startswith("probability 0.99: loses 0.0%") and lines[0].endswith("holds")
    assert lines[-1] == "57 + 87 + 70 = 214"
    assert json.loads((tmp_path / "policy.json").read_text())["kind"] == "calibrated"


def test_evaluate_policies(example: Example, tmp_path: Path) -> None:
    lines = example("evaluate_policies.py", "--size", 3, "--out", tmp_path)
    assert any(line.startswith("frugal") for line in lines)
    assert Evaluation.load(tmp_path).finished
    assert (tmp_path / "report.html").exists()


@pytest.fixture
def server() -> Iterator[tuple[str, Reasoner]]:
    """The example's app behind a real server on a free port of this machine."""
    uvicorn = pytest.importorskip("uvicorn", reason="uvicorn is not installed: the extra `serve`")
    pytest.importorskip("fastapi", reason="fastapi is not installed: the extra `serve`")
    app = runpy.run_path(str(EXAMPLES / "serve.py"))["create_app"]
    reasoner = Reasoner.from_pretrained("nano", max_batch=1, max_length=512)
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        config = uvicorn.Config(app(reasoner), log_level="error", lifespan="off")
        running = uvicorn.Server(config)
        thread = threading.Thread(target=running.run, args=([listening],))
        thread.start()
        deadline = time.monotonic() + 20
        while not running.started:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        yield f"http://127.0.0.1:{listening.getsockname()[1]}/reason", reasoner
        running.should_exit = True
        thread.join()


def test_serve(server: tuple[str, Reasoner]) -> None:
    import httpx

    url, reasoner = server
    long = {"question": "State the final answer: " + " + ".join(["7826"] * 12) + " ="}

    def events(question: dict[str, Any]) -> Iterator[dict[str, Any]]:
        with httpx.stream("POST", url, json=question, timeout=30) as reply:
            assert reply.status_code == 200
            for line in reply.iter_lines():
                yield json.loads(line)

    came = list(events({"question": "57 + 87 + 70"}))
    kinds = [event["kind"] for event in came]
    assert kinds[0] == "draft_delta" and "step_committed" in kinds and kinds[-1] == "done"
    assert came[-1]["result"]["answer"] == "214"
    # A client that goes away after the first event leaves the slot for the next one at once.
    stream = events(long)
    assert next(stream)["kind"] == "draft_delta"
    stream.close()
    assert list(events({"question": "1 + 1"}))[-1]["kind"] == "done"
    assert reasoner.cache.free_slots == 1
    refused = httpx.post(url, json={"question": " "})
    assert refused.status_code == 422 and refused.json()["detail"] == "the prompt is empty"
    wrong = httpx.post(url, json={"question": "1 + 1", "params": {"top_p": 7}})
    assert wrong.status_code == 422
