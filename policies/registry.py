"""Policies by name: this package's, and those of entry points in the group `cascade.policies`.

A distribution offers a policy with, in its pyproject.toml,

    [project.entry-points."cascade.policies"]
    patient = "its_module:Patient"

where `Patient` derives from `Policy` and has the field `kind: Literal["patient"] = "patient"`.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from importlib import import_module
from importlib.metadata import entry_points
from typing import Annotated, Any, TypeAlias

from pydantic import BeforeValidator, SerializeAsAny

from .base import Policy

GROUP = "cascade.policies"
_HERE: Mapping[str, str] = {
    "threshold": "threshold:Threshold",
    "always": "always:Always",
    "gate": "gate:Gate",
    "cues": "cues:Cues",
    "cost_aware": "cost:CostAware",
    "logistic": "logistic:Logistic",
    "calibrated": "calibrated:Calibrated",
    "all_of": "combinators:AllOf",
    "any_of": "combinators:AnyOf",
    "first_n_steps": "combinators:FirstSteps",
    "at_most": "budget:AtMost",
    "within_budget": "budget:WithinBudget",
}


class UnknownPolicy(ValueError):
    """No policy has this name, or what has it is none."""


def known() -> list[str]:
    """The names that `find` knows, sorted."""
    return sorted({*_HERE, *entry_points(group=GROUP).names})


def find(name: str) -> type[Policy]:
    """The class of a policy by name. Raises UnknownPolicy with the known names and the nearest."""
    if name in _HERE:
        module, _, attribute = _HERE[name].partition(":")
        found = getattr(import_module(f".{module}", __package__), attribute)
    else:
        entries = entry_points(group=GROUP, name=name)
        if not entries:
            nearest = difflib.get_close_matches(name, known(), n=1)
            hint = f"; did you mean {nearest[0]!r}?" if nearest else "."
            raise UnknownPolicy(f"unknown policy {name!r}{hint} Known: {', '.join(known())}")
        entry = next(iter(entries))
        try:
            found = entry.load()
        except Exception as error:  # whatever somebody else's module raises
            raise UnknownPolicy(
                f"policy {name!r} ({entry.value}) could not be loaded: "
                f"{type(error).__name__}: {error}"
            ) from error
    if not (isinstance(found, type) and issubclass(found, Policy)):
        raise UnknownPolicy(f"{found!r}, which is offered as policy {name!r}, is not a Policy")
    return found


def build(data: Any) -> Any:
    """A policy from its name or from a mapping with its `kind` and settings.

    Anything else is returned as it is. Raises UnknownPolicy, or pydantic's ValidationError.
    """
    if isinstance(data, str):
        return find(data)()
    if not isinstance(data, Mapping):
        return data
    kind = data.get("kind")
    if not isinstance(kind, str):
        raise UnknownPolicy(f"a stored policy needs its name under 'kind'. Known: {known()}")
    found = find(kind)
    settings = (
        dict(data) if "kind" in found.model_fields else {k: data[k] for k in data if k != "kind"}
    )
    return found.model_validate(settings)


# A field that holds any policy, which is stored with its own settings and read back by its kind.
AnyPolicy: TypeAlias = Annotated[SerializeAsAny[Policy], BeforeValidator(build)]
