"""The command line as a person or a script meets it: output, exit codes, errors."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from cascade.cli import app, main
from cascade.policies import Always, Rewrite, save

runner = CliRunner()


def cascade(*arguments: str) -> str:
    result = runner.invoke(app, list(arguments))
    assert result.exit_code == 0, result.output
    return result.output


def failure(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, *arguments: str) -> str:
    """What stands on standard error when the command fails with the library's exit code."""
    monkeypatch.setattr(sys, "argv", ["cascade", *arguments])
    with pytest.raises(SystemExit) as stop:
        main()
    assert stop.value.code == 2
    captured = capsys.readouterr()
    assert "Traceback" not in captured.err + captured.out
    return captured.err


def test_run_shows_steps_and_a_summary() -> None:
    output = cascade("run", "57 + 87 + 70")
    assert "57 + 87 + 70 = 214" in output
    assert "answer '214'" in output
    assert "\x1b[" not in output  # plain when not a terminal


def test_run_as_json_is_one_object() -> None:
    data = json.loads(cascade("run", "57 + 87 + 70", "--json"))
    assert data["answer"] == "214"
    assert data["usage"]["prompt"] == len(data["prompt_token_ids"])


def test_run_reads_a_prompt_from_standard_input() -> None:
    result = runner.invoke(app, ["run", "-", "--json"], input="57 + 87 + 70")
    assert json.loads(result.output)["answer"] == "214"


@pytest.mark.parametrize("strategy", ["single", "speculative", "stepwise", "budget", "explore"])
def test_run_takes_every_strategy(strategy: str) -> None:
    data = json.loads(cascade("run", "57 + 87 + 70", "--strategy", strategy, "--json"))
    assert data["answer"] == "214"


def test_run_takes_a_policy_by_name_or_from_a_file(tmp_path: Path) -> None:
    gate = json.loads(cascade("run", "57 + 87 + 70", "--policy", "gate", "--json"))
    assert gate["usage"]["unverified"] > 0
    for name in ("always.yaml", "always.json"):
        file = tmp_path / name
        save(Always(decision=Rewrite()), file)
        data = json.loads(cascade("run", "57 + 87 + 70", "--policy", str(file), "--json"))
        assert {step["decision"] for step in data["steps"]} == {"rewrite"}


def test_inspect_lists_layers_slices_and_cache_bytes() -> None:
    output = cascade("inspect", "nano")
    for word in ("mamba", "attention", "moe", "small", "medium", "large", "per token"):
        assert word in output


def test_inspect_as_json() -> None:
    data = json.loads(cascade("inspect", "nano", "--json"))
    assert set(data["slices"]) == {"small", "medium", "large"}
    assert data["slices"]["large"]["parameters"] * 2 <= data["weight_bytes"] * 1.1
    sequence = data["sequence_bytes"]
    assert sequence["own"] == 2 * sequence["shared"]
    per_token = data["cache_bytes_per_token"] + 1
    assert sequence["shared"] > sequence["tokens"] * per_token + data["state_bytes_per_sequence"]


def test_export_writes_a_checkpoint_that_cascade_runs(tmp_path: Path) -> None:
    cascade("export", "small", str(tmp_path / "small"))
    data = json.loads(cascade("inspect", str(tmp_path / "small"), "--json"))
    assert list(data["slices"]) == ["small"]
    answer = json.loads(
        cascade(
            "run",
            "57 + 87 + 70",
            "--model",
            str(tmp_path / "small"),
            "--strategy",
            "single",
            "--json",
        )
    )
    assert answer["finish_reason"] == "stop"


def test_audit_says_that_the_cache_is_consistent() -> None:
    output = cascade("audit", "57 + 87 + 70")
    assert "consistent" in output and "ssm" in output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["run", "1 + 1", "--model", "/no/such/model"], "/no/such/model"),
        (["run", "1 + 1", "--draft", "smal"], "did you mean 'small'"),
        (["run", "1 + 1", "--strategy", "stepwize"], "did you mean 'stepwise'"),
        (["run", ""], "empty"),
        (["run", "1 + 1", "--threshold", "3"], "between 0 and 1"),
        (["run", "1 + 1", "--threshold", "0.5", "--policy", "gate"], "give one of them"),
        (["run", "1 + 1", "--policy", "gats"], "did you mean 'gate'"),
        (["run", "1 + 1", "--policy", "/no/such/file.json"], "/no/such/file.json"),
        (["run", "1 + 1", "--top-p", "7"], "top_p"),
        (["export", "huge", "/tmp/never"], "Known"),
    ],
)
def test_bad_input_is_one_line_on_standard_error(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
    arguments: list[str],
    message: str,
) -> None:
    error = failure(monkeypatch, capsys, *arguments)
    assert error.startswith("error: ") and message in error


def test_help_starts_without_loading_torch() -> None:
    code = (
        "import sys; from cascade.cli import app; "
        "assert 'torch' not in sys.modules and 'transformers' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
