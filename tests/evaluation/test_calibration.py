"""`cascade calibrate`: a policy file with a guarantee, from a run directory."""

import json
from pathlib import Path

import pytest

import cascade
from cascade import Reasoner
from cascade.errors import CalibrationError, RequestError, RunDirectoryError
from cascade.evaluation import Evaluation, GymSource
from cascade.evaluation.calibration import LABELS, calibrate, parse_target
from cascade.policies import Always, Calibrated, Target, Threshold, load
from cascade.strategies import Stepwise
from tests.evaluation.test_commands import cascade as command

SIZE = 16


@pytest.fixture(scope="module")
def reasoner() -> Reasoner:
    return Reasoner.from_pretrained("nano", max_batch=16, max_length=256)


@pytest.fixture(scope="module")
def directory(reasoner: Reasoner, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An evaluation with two thresholds, one of them far too lenient."""
    out = tmp_path_factory.mktemp("run")
    runs = {f"at {p}": Threshold(probability=p) for p in (0.9, 0.001)}
    planned = [{"name": name, "policy": policy} for name, policy in runs.items()]
    source = GymSource(task="chain_sum", size=SIZE, seed=4242)
    cascade.evaluate(reasoner, source, [*planned, "single"], baselines=False, out=out)
    return out


def test_the_command_writes_a_policy_that_a_reasoner_loads(directory: Path) -> None:
    shown = command("calibrate", directory, "--target", "loss<=0.2,delta=0.1")
    assert "chosen" in shown and "policy.json" in shown
    policy = load(directory / "policy.json")
    assert isinstance(policy, Calibrated) and policy.source == "labels" and policy.runs == SIZE
    assert policy.tests[0].mean == 0
    answered = json.loads(
        command("run", "57 + 87 + 70", "--policy", directory / "policy.json", "--json")
    )
    assert answered["answer"] == "214"


def test_labels_are_kept_and_not_made_twice(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from cascade.evaluation import calibration

    calibrate(directory, Target(lose=0.2))
    kept = (directory / LABELS).read_bytes()
    assert kept.count(b"\n") == SIZE
    monkeypatch.setattr(calibration, "labelled_runs", None)  # would be called to make one
    assert calibrate(directory, Target(lose=0.2)).runs == SIZE
    monkeypatch.undo()
    lines = kept.splitlines(keepends=True)
    (directory / LABELS).write_bytes(b"".join(lines[3:]) + lines[0][:50])  # a kill, and a gap
    assert calibrate(directory, Target(lose=0.2)).runs == SIZE
    again = (directory / LABELS).read_bytes().splitlines(keepends=True)
    assert sorted(json.loads(x)["id"] for x in again) == sorted(json.loads(x)["id"] for x in lines)


def test_runs_that_are_there_can_be_compared(directory: Path) -> None:
    found = calibrate(directory, Target(lose=0.2), source="runs")
    assert found.source == "runs"
    assert [test.value for test in found.tests] == [0.9, 0.001]
    records = Evaluation.load(directory).runs
    lost = [
        max(a.score - b.score, 0) for a, b in zip(records["single"], records["at 0.9"], strict=True)
    ]
    assert found.tests[0].mean == pytest.approx(sum(lost) / SIZE)
    escalating = calibrate(directory, Target(escalate=0.5), source="runs")
    assert escalating.tests[0].value == 0.001  # from the lenient end


@pytest.mark.parametrize(
    ("text", "target"),
    [
        ("loss<=0.01,delta=0.05", Target(lose=0.01, delta=0.05)),
        (" escalate <= 2e-1 ", Target(escalate=0.2)),
    ],
)
def test_a_target_is_read(text: str, target: Target) -> None:
    assert parse_target(text) == target


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("loss<0.01", "'loss<0.01' is not loss<=X"),
        ("loss<=a", "is not loss<=X"),
        ("loss<=1.2.3", "is no number"),
        ("loss<=2", "less than 1"),
        ("delta=0.1", "one of lose and escalate"),
        ("loss<=0.1,escalate<=0.1", "one of lose and escalate"),
        ("", "is not loss<=X"),
    ],
)
def test_a_wrong_target_is_named(text: str, message: str) -> None:
    with pytest.raises(RequestError, match=message):
        parse_target(text)


def test_what_cannot_be_shown_is_said(directory: Path, reasoner: Reasoner, tmp_path: Path) -> None:
    with pytest.raises(CalibrationError, match="16 problems to test on are too few"):
        calibrate(directory, Target(lose=0.01, delta=0.05))
    with pytest.raises(CalibrationError, match="no stepwise run under a Always"):
        calibrate(directory, Target(lose=0.2), policy=Always(), source="runs")
    with pytest.raises(RunDirectoryError, match="holds no evaluation"):
        calibrate(tmp_path, Target(lose=0.2))
    problems = [{"question": "57 + 87 + 70", "answer": "214"}]
    cascade.evaluate(reasoner, problems, [Stepwise()], baselines=False, out=tmp_path / "own")
    with pytest.raises(CalibrationError, match="no run of the large slice alone"):
        calibrate(tmp_path / "own", Target(lose=0.2), source="runs")
    path = tmp_path / "own" / "manifest.json"
    data = json.loads(path.read_text())
    data["engine"]["digest"] = "sha256:0"
    path.write_text(json.dumps(data))
    with pytest.raises(RunDirectoryError, match="made with another checkpoint"):
        calibrate(tmp_path / "own", Target(lose=0.2))
    data["problems"] = "sha256:0"
    path.write_text(json.dumps(data))
    with pytest.raises(RunDirectoryError):
        calibrate(tmp_path / "own", Target(lose=0.2))
