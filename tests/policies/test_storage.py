"""Policies as files: any of them comes back as it was, and what is broken says where."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cascade.policies import Accept, Policy, StepScores, all_of, dumps, load, loads, save
from tests.policies.steps import policies


@given(policies, st.booleans())
def test_every_policy_comes_back_from_json_and_yaml(policy: Policy, yaml: bool) -> None:
    assert loads(dumps(policy, yaml=yaml), yaml=yaml) == policy


@pytest.mark.parametrize("name", ["p.json", "p.yaml", "p.yml"])
def test_a_file_is_written_and_read_by_its_ending(tmp_path: Path, name: str) -> None:
    policy = loads('{"kind": "gate", "policy": {"kind": "threshold", "probability": 0.3}}')
    path = save(policy, tmp_path / name)
    assert load(path) == policy == load(str(path))
    assert path.read_text().startswith("{" if name.endswith("json") else "kind: gate")


class Nameless(Policy):
    def decide(self, scores: StepScores) -> Accept:
        return Accept()


@pytest.mark.parametrize("policy", [Nameless(), all_of(Nameless())])
def test_a_policy_that_could_not_be_read_back_is_not_written(
    tmp_path: Path, policy: Policy
) -> None:
    with pytest.raises(ValueError, match="cannot be stored"):
        save(policy, tmp_path / "p.json")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("p.json", "{", "p.json"),
        ("p.json", "[1]", "mapping with a 'kind'"),
        ("p.json", '{"kind": "treshold"}', "did you mean 'threshold'"),
        ("p.json", '{"kind": "threshold", "probability": 2}', "probability"),
        ("p.yaml", "kind: [", "not YAML"),
        ("p.yaml", "!!python/object:os.system {}", "not YAML"),
        ("p.toml", "", r"\.yaml"),
    ],
)
def test_a_broken_file_says_what_is_wrong(
    tmp_path: Path, name: str, text: str, message: str
) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=message):
        load(tmp_path / name)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"nowhere\.json"):
        load(tmp_path / "nowhere.json")
