"""What a run directory was made with, and whether it may be gone on with."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import time
from collections.abc import Iterable, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from cascade.errors import RunDirectoryError
from cascade.problems import Problem

FORMAT = 1
PACKAGES = ("cascade-reasoning", "torch", "transformers", "numpy", "reasoning-gym", "math-verify")

WHOLE = 2**30  # bytes of a weights file below which every one is hashed
BLOCKS, BLOCK = 64, 2**20  # of a larger file: evenly spaced blocks


class Engine(BaseModel):
    """The model and how it is run; all of it shapes the results.

    digest: of the checkpoint's files
    slices: name -> parameters; draft, verify: the roles
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    model: str
    digest: str
    dtype: str
    slices: Mapping[str, int]
    draft: str
    verify: str
    policy: Any
    consistency: Literal["exact", "shared", "refresh"]
    max_length: int


class Manifest(BaseModel):
    """Everything that a resumed evaluation must agree with, and what it was made on.

    runs:     by name, as `Run.model_dump` has them
    source:   where the problems came from; problems: their digest; size: their number
    sessions: one entry a sitting: when, on what, with which versions
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    format: int = FORMAT
    created: str
    engine: Engine
    source: Mapping[str, Any]
    size: int
    problems: str
    grader: str
    seed: int
    params: Mapping[str, Any]
    runs: Mapping[str, Any]
    sessions: tuple[Mapping[str, Any], ...] = ()

    def differences(self, other: Manifest) -> list[str]:
        """What keeps two evaluations from being one. More runs, or fewer, do not."""
        mine, theirs = (_comparable(m) for m in (self, other))
        if self.problems != other.problems and self.source != other.source:
            mine, theirs = dict(self.source), dict(other.source)  # says more than their digests
        found = [
            f"{name} was {_brief(mine.get(name))}, now {_brief(theirs.get(name))}"
            for name in sorted(mine.keys() | theirs.keys())
            if mine.get(name) != theirs.get(name)
        ]
        for name in self.runs.keys() & other.runs.keys():
            if self.runs[name] != other.runs[name]:
                before, now = self.runs[name], other.runs[name]
                keys = [k for k in before | now if before.get(k) != now.get(k)]
                found += [
                    f"run {name!r}: {k} was {_brief(before.get(k))}, now {_brief(now.get(k))}"
                    for k in keys
                ]
        return found


def _comparable(manifest: Manifest) -> dict[str, Any]:
    data = manifest.model_dump(mode="json", exclude={"created", "source", "runs", "sessions"})
    engine = data.pop("engine")
    return data | {f"engine.{name}": value for name, value in engine.items()}


def session(workers: int, batch: int, device: str, path: str = "") -> dict[str, Any]:
    """What this sitting runs on; `path` is where its checkpoint is."""
    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            continue
    return {
        "began": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "host": platform.node(),
        "platform": platform.platform(),
        "python": platform.python_version(),
        "versions": versions,
        "device": device,
        "path": path,
        "workers": workers,
        "batch": batch,
    }


def checkpoint_digest(directory: Path | None) -> str:
    """A digest of config, slices, tokenizer and weights.

    Weights files up to 1 GiB are read whole; of larger ones the length, the header and 64 blocks
    of 1 MiB, evenly spaced, so that a large checkpoint costs seconds. `none` without a directory.
    """
    if directory is None:
        return "none"
    total = hashlib.sha256()
    for path in sorted(directory.iterdir()):
        if path.suffix in (".json", ".safetensors", ".jinja") and path.is_file():
            total.update(f"{path.name}:{path.stat().st_size}:".encode())
            _hash_file(path, total)
    return f"sha256:{total.hexdigest()}"


def _hash_file(path: Path, total: Any) -> None:
    size = path.stat().st_size
    with path.open("rb") as file:
        if size <= WHOLE:
            total.update(hashlib.file_digest(file, "sha256").digest())
            return
        for i in range(BLOCKS):
            file.seek(i * (size - BLOCK) // (BLOCKS - 1))
            total.update(file.read(BLOCK))


def problems_digest(problems: Iterable[Problem]) -> str:
    """A digest of what is asked, what is right, and in which order."""
    total = hashlib.sha256()
    for problem in problems:
        total.update(json.dumps([problem.id, problem.prompt, problem.answer]).encode())
    return f"sha256:{total.hexdigest()}"


def read_manifest(path: Path) -> Manifest | None:
    """The manifest in a file; None where there is no file. Raises RunDirectoryError."""
    try:
        return Manifest.model_validate_json(path.read_text("utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, UnicodeDecodeError, ValidationError) as error:
        first = str(error).splitlines()[0]
        raise RunDirectoryError(f"{path} is not the manifest of an evaluation: {first}") from error


def write_atomically(path: Path, data: bytes) -> None:
    """Replace a file as a whole: a reader sees the old content or the new. Raises OSError."""
    beside = path.with_name(path.name + ".new")
    try:
        with beside.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
    except OSError:
        beside.unlink(missing_ok=True)
        raise


def _brief(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 70 else text[:67] + "..."
