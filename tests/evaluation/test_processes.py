"""Several processes, by accelerate and by Ray, give what one process gives."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

import cascade
from cascade.errors import EvaluationError
from cascade.evaluation import Evaluation, GymSource, Recipe
from cascade.strategies import Single, Stepwise
from tests.evaluation.test_evaluate import content

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
RECIPE = Recipe(model="nano", max_batch=4, max_length=256)
SOURCE = GymSource(task="chain_sum", size=16, seed=7)
RUNS = {"small": Single(slice="small"), "stepwise": Stepwise()}


@pytest.fixture(scope="module")
def alone() -> Evaluation:
    return cascade.evaluate(RECIPE, SOURCE, RUNS, baselines=False)


def accelerate(out: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Two processes; `--multi_gpu` is accelerate's name for its launcher of several."""
    command = [
        str(Path(sys.executable).parent / "accelerate"), "launch", "--multi_gpu",
        "--num_processes", "2", "--num_machines", "1", "--mixed_precision", "no",
        "--dynamo_backend", "no", "--main_process_port", "0",
        "-m", "cascade.evaluate", "--device", "cpu", "--batch", "4", "--max-length", "256",
        "--task", "chain_sum", "--size", "16", "--seed", "7", "--no-baselines", "--no-figures",
        "--strategy", "stepwise", "--out", str(out), *arguments,
    ]  # fmt: skip
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=240, check=False
    )


def test_two_accelerate_processes_share_the_problems(alone: Evaluation, tmp_path: Path) -> None:
    out = tmp_path / "run"
    done = accelerate(out)
    assert done.returncode == 0, done.stderr
    found = Evaluation.load(out)
    assert content_without_seed(found) == [
        item for item in content_without_seed(alone) if item["run"] == "stepwise"
    ]
    assert {r.worker for r in found.records} == {0, 1}
    assert not list(out.glob("*.part"))
    assert found.manifest.sessions[0]["workers"] == 2
    assert done.stdout.count("report:") == 1


def content_without_seed(found: Evaluation) -> list[dict[str, Any]]:
    """The command line samples under the problems' seed, the function under 0; both are greedy."""
    return [{k: v for k, v in item.items() if k != "seed"} for item in content(found.records)]


@pytest.fixture(scope="module")
def ray() -> Iterator[Any]:
    module = pytest.importorskip("ray", reason="ray is not installed: the extra `cluster`")
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    module.init(num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    yield module
    module.shutdown()


def test_two_ray_workers_of_which_one_is_killed(
    alone: Evaluation, ray: Any, tmp_path: Path
) -> None:
    killed: list[int] = []

    def grade(problem: Any, answer: str | None) -> float:
        if len(grade.seen) == 4:  # type: ignore[attr-defined]
            [victim, *_] = workers()
            os.kill(victim, signal.SIGKILL)
            killed.append(victim)
        grade.seen.append(problem.id)  # type: ignore[attr-defined]
        return float(problem.score(answer))

    grade.seen = []  # type: ignore[attr-defined]
    found = cascade.evaluate(
        RECIPE, SOURCE, RUNS, baselines=False, backend="ray", workers=2,
        grader=grade, out=tmp_path,
    )  # fmt: skip
    assert killed
    assert content(found.records) == content(alone.records)
    assert [(r.run, r.id) for r in found.records] == [(r.run, r.id) for r in alone.records]
    assert {r.worker for r in found.records} == {0, 1}
    assert found.manifest.sessions[0]["retries"] == {"worker died": 1}
    deadline = time.monotonic() + 20
    while workers():
        assert time.monotonic() < deadline, "workers outlive the evaluation"
        time.sleep(0.05)


def test_a_worker_that_keeps_dying_ends_the_evaluation(
    ray: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from cascade.evaluation.cluster import RayEngine
    from cascade.evaluation.engine import Request
    from cascade.evaluation.runs import run_of
    from cascade.sampling import SamplingParams

    monkeypatch.setattr("cascade.evaluation.cluster.DEATHS", 1)  # each costs a model's loading
    engine = RayEngine(RECIPE, workers=1)
    try:
        run = run_of({"name": "deadly", "strategy": Deadly()})
        with pytest.raises(EvaluationError, match=r"died 1 times.*--resume goes on"):
            list(engine.run(run, [Request(0, "1 + 1", SamplingParams(seed=1))]))
    finally:
        engine.close()


class Deadly(Single):
    """Takes its whole process with it."""

    def run(self, task: Any, roles: Any) -> Any:
        os.kill(os.getpid(), signal.SIGKILL)
        yield


def workers() -> list[int]:
    """Pids of Ray's processes that run an engine."""
    found = []
    for process in psutil.Process().children(recursive=True):
        try:
            if process.name().startswith("ray::_Worker"):
                found.append(process.pid)
        except psutil.NoSuchProcess:
            continue
    return found


def test_what_a_worker_refuses_is_this_librarys_error(ray: Any, tmp_path: Path) -> None:
    began = time.monotonic()
    with pytest.raises(cascade.CascadeError, match="no/such/model"):
        cascade.evaluate("/no/such/model", SOURCE, backend="ray", workers=1, out=tmp_path / "x")
    assert time.monotonic() - began < 60
    assert not (tmp_path / "x").exists()
