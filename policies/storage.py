"""Policies as files: JSON, or YAML by the name's ending."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from .base import Policy
from .registry import build

YAML = (".yaml", ".yml")
SUFFIXES = (".json", *YAML)


def save(policy: Policy, path: str | Path) -> Path:
    """Write a policy. Raises ValueError for one that could not be read back."""
    path = Path(path)
    text = dumps(policy, yaml=_is_yaml(path))
    path.write_text(text, "utf-8")
    return path


def load(path: str | Path) -> Policy:
    """The policy in a file. Raises ValueError where there is none, or it holds something else."""
    path = Path(path)
    try:
        return loads(path.read_text("utf-8"), yaml=_is_yaml(path))
    except (OSError, ValueError) as error:
        raise ValueError(f"no policy could be read from {path}: {_brief(error)}") from error


def dumps(policy: Policy, *, yaml: bool = False) -> str:
    """A policy as text. Raises ValueError for one that could not be read back."""
    data = policy.model_dump(mode="json")
    try:
        same = build(data) == policy
    except ValueError as error:
        raise ValueError(f"{policy!r} cannot be stored: {_brief(error)}") from error
    if not same:
        raise ValueError(f"{policy!r} cannot be stored: read back, it would be {build(data)!r}")
    if yaml:
        return str(_yaml().safe_dump(data, sort_keys=False))
    return json.dumps(data, indent=2, allow_nan=False) + "\n"


def loads(text: str, *, yaml: bool = False) -> Policy:
    """The policy that `dumps` wrote. Raises ValueError for anything else."""
    if yaml:
        library = _yaml()
        try:
            data = library.safe_load(text)
        except library.YAMLError as error:
            raise ValueError(f"not YAML: {error}") from error
    else:
        data = json.loads(text)
    policy = build(data)
    if not isinstance(policy, Policy):
        raise ValueError(f"a policy is a mapping with a 'kind', not {data!r}")
    return policy


def _is_yaml(path: Path) -> bool:
    if path.suffix not in SUFFIXES:
        raise ValueError(f"{path} must end in one of {', '.join(SUFFIXES)}")
    return path.suffix in YAML


def _yaml() -> Any:
    try:
        import yaml
    except ImportError as error:
        raise ValueError(
            f"YAML needs PyYAML ({error}): pip install pyyaml, or use .json"
        ) from error
    return yaml


def _brief(error: Exception) -> str:
    """pydantic's findings in one line; other messages as they are."""
    if not isinstance(error, ValidationError):
        return str(error)
    return "; ".join(
        f"{'.'.join(map(str, e['loc'])) or 'policy'}: {e['msg']}" for e in error.errors()
    )
