"""Policies by name: every one of this package's, and the errors for those that are not there."""

import json

import pytest
from pydantic import ValidationError

from cascade.policies import Policy, Threshold, UnknownPolicy, build, find, known


@pytest.mark.parametrize("name", known())
def test_every_known_name_is_a_policy_that_says_its_name(name: str) -> None:
    found = find(name)
    assert issubclass(found, Policy)
    assert found.model_fields["kind"].default == name


def test_every_policy_of_the_package_is_known() -> None:
    def below(kind: type[Policy]) -> set[type[Policy]]:
        return {kind}.union(*map(below, kind.__subclasses__()))

    ours = {
        kind
        for kind in below(Policy)
        if kind.__module__.startswith("cascade.policies.") and not kind.__abstractmethods__
    }
    assert ours == {find(name) for name in known() if find(name) in ours}


def test_an_unknown_name_lists_the_known_ones_and_the_nearest() -> None:
    with pytest.raises(UnknownPolicy, match="did you mean 'threshold'") as error:
        find("treshold")
    assert all(name in str(error.value) for name in known())


def test_a_policy_is_built_from_its_name_or_its_settings() -> None:
    assert build("threshold") == Threshold()
    data = {"kind": "threshold", "probability": 0.25}
    assert build(data) == Threshold(probability=0.25)
    assert build(json.loads(Threshold(score="mean").model_dump_json())) == Threshold(score="mean")


@pytest.mark.parametrize("data", [{"probability": 0.5}, {"kind": 7}, {"kind": "nothing"}])
def test_settings_without_a_known_kind_are_refused(data: dict) -> None:
    with pytest.raises(UnknownPolicy, match="threshold"):
        build(data)


def test_wrong_settings_are_refused() -> None:
    with pytest.raises(ValidationError):
        build({"kind": "threshold", "probability": 2})
    with pytest.raises(ValidationError):
        build({"kind": "all_of", "policies": [{"kind": "thresholt"}]})
