"""What stands on disk in a checkpoint directory, checked before any weight is read.

Only JSON and the headers of safetensors files are opened here. Pickles never are.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from cascade.errors import CheckpointError, UnsupportedModel
from cascade.tensors import ROUTED, Shape, is_ignored, stored_names, tensor_shapes

MODEL_TYPE = "nemotron_h"
CONFIG = "config.json"
SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"

_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")
_FLOATS = {"F32", "F16", "BF16"}


@dataclass(frozen=True, slots=True)
class Stored:
    """One tensor of a safetensors file, as its header describes it."""

    file: Path
    shape: Shape
    dtype: str  # safetensors' name: "BF16", "F32", ...


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object. Raises CheckpointError where it is missing or not one."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        beside = ", ".join(sorted(p.name for p in path.parent.iterdir())[:8]) or "nothing"
        raise CheckpointError(f"{path.parent} has no {path.name}; it holds {beside}") from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} is not readable as JSON: {error}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} holds a {type(value).__name__}; a JSON object was expected")
    return value


def check_model_type(raw: Mapping[str, Any], path: Path) -> None:
    """Raises UnsupportedModel for another architecture."""
    found = raw.get("model_type")
    if found != MODEL_TYPE:
        what = "has no model_type" if found is None else f"is of model_type {found!r}"
        raise UnsupportedModel(f"{path} {what}; cascade runs {MODEL_TYPE!r} only")


def stored_tensors(directory: Path) -> dict[str, Stored]:
    """Every tensor of the directory's safetensors files by its stored name.

    Raises CheckpointError for missing weights, pickles alone, a missing shard, a shard outside
    the directory, a file that is cut short or corrupt; UnsupportedModel for quantized tensors.
    """
    if (directory / SINGLE).is_file():
        return _header(directory / SINGLE)
    if not (directory / INDEX).is_file():
        raise CheckpointError(_no_weights(directory))
    shards = _shards(directory)
    stored: dict[str, Stored] = {}
    for file, listed in shards.items():
        header = _header(directory / file)
        if absent := sorted(listed - header.keys()):
            raise CheckpointError(
                f"{INDEX} places {some(absent)} in {file}, which does not hold "
                f"{'it' if len(absent) == 1 else 'them'}"
            )
        if twice := sorted(stored.keys() & header.keys()):
            raise CheckpointError(
                f"{some(twice)} stands twice: in {stored[twice[0]].file.name} and in {file}"
            )
        stored |= header
    return stored


def check_tensors(config: Any, stored: Mapping[str, Stored]) -> None:
    """Compare stored tensors with what a `NemotronHConfig` needs.

    Raises CheckpointError naming tensors that are missing, unexpected or of another shape.
    """
    found = {_model(name): tensor for name, tensor in stored.items() if not is_ignored(name)}
    needed: dict[str, Shape] = {}
    for name, shape in tensor_shapes(config).items():
        if name in found or not name.endswith(ROUTED):
            needed[name] = shape
        else:
            needed |= dict.fromkeys(map(_model, stored_names(name, shape[0])), shape[1:])
    if missing := [name for name in needed if name not in found]:
        raise CheckpointError(f"the weights lack {some(missing)}, which config.json asks for")
    if unexpected := sorted(found.keys() - needed.keys()):
        raise CheckpointError(f"the weights hold {some(unexpected)}, unknown to config.json")
    wrong = [
        f"{name} {list(found[name].shape)} instead of {list(shape)}"
        for name, shape in needed.items()
        if found[name].shape != shape
    ]
    if wrong:
        raise CheckpointError(f"shapes differ from what config.json asks for: {some(wrong)}")


def some(names: Sequence[str], limit: int = 4) -> str:
    """>>> some(["a", "b", "c"], 2)
    'a, b and 1 more'
    """
    rest = len(names) - limit
    return ", ".join(names[:limit]) + (f" and {rest} more" if rest > 0 else "")


def _model(name: str) -> str:
    """A stored name under transformers' prefix, experts kept single."""
    return "model." + name.removeprefix("backbone.") if name.startswith("backbone.") else name


def _shards(directory: Path) -> dict[str, set[str]]:
    """File name -> tensors that the index places in it."""
    path = directory / INDEX
    places = read_json(path).get("weight_map")
    if not isinstance(places, dict) or not places:
        raise CheckpointError(f"{path} has no weight_map from tensor names to files")
    shards: dict[str, set[str]] = {}
    for name, file in places.items():
        if not isinstance(file, str) or _leaves(file):
            raise CheckpointError(
                f"{path} places {name} in {file!r}; only safetensors files inside the directory "
                "are read"
            )
        shards.setdefault(file, set()).add(name)
    if absent := sorted(file for file in shards if not (directory / file).is_file()):
        raise CheckpointError(
            f"{path} names {some(absent)}, of which {directory} holds nothing; "
            "the download may be incomplete"
        )
    return shards


def _leaves(file: str) -> bool:
    """Whether a shard's name is no plain path to a safetensors file below its directory."""
    # By name alone: in the Hub's cache each file is a link to a blob elsewhere.
    posix, windows = PurePosixPath(file), PureWindowsPath(file)
    rooted = posix.is_absolute() or windows.is_absolute() or windows.drive or windows.root
    return bool(rooted) or ".." in windows.parts or posix.suffix != ".safetensors"


def _header(path: Path) -> dict[str, Stored]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            views = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
            header = {
                name: Stored(path, tuple(view.get_shape()), view.get_dtype())
                for name, view in views.items()
            }
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f"{path} ({path.stat().st_size:,} bytes) is cut short or corrupt: {error}"
        ) from error
    for name, tensor in header.items():
        if tensor.dtype not in _FLOATS:
            raise UnsupportedModel(
                f"{path} holds {name} as {tensor.dtype}; cascade reads {', '.join(sorted(_FLOATS))}"
            )
    return header


def _no_weights(directory: Path) -> str:
    looked = f"{directory} has neither {SINGLE} nor {INDEX}"
    pickles = sorted(p.name for pattern in _PICKLES for p in directory.glob(pattern))
    others = sorted(p.name for p in directory.glob("*.safetensors"))
    if others:
        return f"{looked}; it holds {some(others)} without an index"
    if pickles:
        return (
            f"{looked}, only pickles ({some(pickles)}), which can run code when loaded and are "
            "never read; convert them to safetensors"
        )
    return f"{looked}: no weights"
