"""Runs from names, objects, mappings and files; baselines; what contradicts itself."""

import json
from pathlib import Path

import pytest

from cascade.errors import RequestError
from cascade.evaluation.runs import Run, plan, read_runs, run_of
from cascade.policies import Threshold, all_of, save
from cascade.sampling import SamplingParams
from cascade.strategies import Budget, Single, Stepwise


def names(*runs: object, baselines: bool = True) -> list[str]:
    return [r.name for r in plan(runs, small="small", large="large", baselines=baselines)]


def test_baselines_come_first_unless_they_are_refused() -> None:
    assert names("stepwise") == ["large-only", "small-only", "majority", "stepwise"]
    assert names("stepwise", baselines=False) == ["stepwise"]
    with pytest.raises(RequestError, match="no runs"):
        names(baselines=False)


def test_a_run_that_is_a_baseline_is_not_made_twice() -> None:
    planned = plan({"the large one": "single"}, small="small", large="large")
    assert [r.name for r in planned] == ["the large one", "small-only", "majority"]
    assert planned[0].baseline


def test_a_model_of_one_slice_has_one_baseline() -> None:
    planned = plan(["single", "explore"], small="only", large="only")
    assert [r.name for r in planned] == ["single", "explore"]


def test_a_run_is_named_by_what_is_not_the_default() -> None:
    assert names(Budget(budget=24), baselines=False) == ["budget (budget=24)"]
    assert names(Threshold(probability=0.9), baselines=False) == [
        "stepwise (threshold probability 0.9)"
    ]
    described = {"strategy": "single", "params": {"temperature": 0.5}}
    assert names(described, baselines=False) == ["single (temperature=0.5)"]


def test_a_run_survives_json() -> None:
    runs = [
        run_of(Stepwise(policy=all_of(Threshold(), Threshold(score="mean")))),
        run_of({"strategy": {"name": "budget", "budget": 8}, "policy": "always"}),
        run_of("single"),
    ]
    for run in runs:
        stored = json.loads(run.model_dump_json())
        again = Run.model_validate(stored)
        assert again.model_dump(mode="json") == stored
        assert type(again.strategy) is type(run.strategy)
        assert again.policy == run.policy


def test_parameters_of_a_run_go_before_those_of_the_evaluation() -> None:
    run = run_of({"strategy": "single", "params": {"temperature": 0.5}})
    params = run.sampling(SamplingParams(max_tokens=9, temperature=1.0))
    assert (params.max_tokens, params.temperature) == (9, 0.5)
    for wrong in ({"n": 2}, {"temprature": 1}):
        with pytest.raises(RequestError, match="run 'x'"):
            run_of({"name": "x", "params": wrong}).sampling(SamplingParams())


def test_a_file_of_runs(tmp_path: Path) -> None:
    save(Threshold(probability=0.25), tmp_path / "mine.json")
    path = tmp_path / "runs.yaml"
    path.write_text(
        f"""
        runs:
          - stepwise
          - {{name: strict, strategy: stepwise, policy: {{kind: threshold, probability: 0.99}}}}
          - {{name: mine, policy: {tmp_path / "mine.json"}}}
          - {{name: short, strategy: {{name: budget, think: small, budget: 8}}}}
        problems: {{kind: gym, task: chain_sum, size: 3, seed: 1}}
        baselines: false
        """
    )
    file = read_runs(path)
    planned = plan(file.runs, small="small", large="large", baselines=file.baselines)
    assert [r.name for r in planned] == ["stepwise", "strict", "mine", "short"]
    assert planned[1].policy == Threshold(probability=0.99)
    assert planned[2].policy == Threshold(probability=0.25)
    assert planned[3].strategy == Budget(think="small", budget=8)
    path = tmp_path / "runs.json"
    path.write_text('["single", "stepwise"]')
    assert read_runs(path).runs == ["single", "stepwise"]


@pytest.mark.parametrize(
    ("run", "message"),
    [
        ("stepwize", "did you mean 'stepwise'"),
        ({"strategy": {"name": "budget", "budgit": 3}}, "budgit"),
        ({"strategy": {"nam": "budget"}}, "unknown strategy None"),
        ({"polcy": "always"}, "did you mean 'policy'"),
        ({"policy": {"kind": "treshold"}}, "did you mean 'threshold'"),
        ({"policy": "/no/such/file.json"}, "/no/such/file.json"),
        ({"name": "", "strategy": "single"}, "name"),
        (3, "not 3"),
    ],
)
def test_a_wrong_run_is_named(run: object, message: str) -> None:
    with pytest.raises(RequestError, match=message):
        run_of(run)


def test_two_runs_of_one_name_are_refused() -> None:
    with pytest.raises(RequestError, match="two runs are named 'x'"):
        names({"name": "x", "strategy": Single()}, {"name": "x", "strategy": Stepwise()})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("runs: [", "neither JSON nor YAML"),
        ("3", "holds int"),
        ("rums: []", "did you mean 'runs'"),
        ("runs: stepwise", "runs"),
    ],
)
def test_a_wrong_file_is_named(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "runs.yaml"
    path.write_text(text)
    with pytest.raises(RequestError, match=message):
        read_runs(path)
    with pytest.raises(RequestError, match="there is no file"):
        read_runs(tmp_path / "none.yaml")
