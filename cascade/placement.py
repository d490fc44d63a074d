"""Where weights go and in which dtype: one device, one of three dtypes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from cascade.errors import RequestError, UnsupportedModel, unknown
from cascade.files import Stored
from cascade.tensors import EMBEDDINGS, canonical

DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}
_SPREADING = ("auto", "balanced", "balanced_low_0", "sequential")
_STORED_DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}


def resolve_device(device: str | torch.device = "auto", device_map: Any = None) -> torch.device:
    """The one device that weights go to. Raises RequestError."""
    wanted = [] if device == "auto" else [_device(device)]
    wanted += _devices(device_map)
    if len(set(wanted)) > 1:
        raise RequestError(
            f"device={str(device)!r} and device_map={device_map!r} name more than one device: "
            f"{', '.join(sorted(map(str, set(wanted))))}. Slices are views of one copy of the "
            "weights, which needs one device: device='cuda:0'"
        )
    if wanted:
        return wanted[0]
    return _device("cuda" if torch.cuda.is_available() else "cpu")


def resolve_dtype(dtype: str | torch.dtype) -> torch.dtype | None:
    """`"bfloat16"` or `torch.bfloat16`; None for `"auto"` and `"checkpoint"`, where the checkpoint
    has a say (`own_dtype`). Raises RequestError.
    """
    name = str(dtype).removeprefix("torch.")
    if name in ("auto", "checkpoint"):
        return None
    if name not in DTYPES:
        raise RequestError(unknown("dtype", name, ["auto", "checkpoint", *DTYPES]))
    return DTYPES[name]


def own_dtype(config: Any, stored: Mapping[str, Stored]) -> torch.dtype:
    """The config's dtype; where it names none, the embeddings' as stored.

    Raises UnsupportedModel for one that cascade does not run.
    """
    if config.dtype is not None:
        name = str(config.dtype).removeprefix("torch.")
        if name not in DTYPES:
            raise UnsupportedModel(
                f"config.json asks for dtype {name!r}; cascade runs {', '.join(DTYPES)}"
            )
        return DTYPES[name]
    where = {canonical(name)[0]: tensor for name, tensor in stored.items()}
    return _STORED_DTYPES[where[EMBEDDINGS].dtype]


def _devices(device_map: Any) -> list[torch.device]:
    """The devices that a device map names; none where it leaves the choice of one."""
    count = torch.cuda.device_count()
    if device_map is None or (device_map in _SPREADING and count <= 1):
        return []
    if device_map in _SPREADING:
        return [torch.device("cuda", index) for index in range(count)]
    places = device_map.values() if isinstance(device_map, Mapping) else [device_map]
    return [_device(place) for place in places]


def _device(place: Any) -> torch.device:
    """`"cuda"`, `"cuda:1"`, 1 or a torch.device, with its index. Raises RequestError."""
    try:
        found = torch.device("cuda", place) if isinstance(place, int) else torch.device(place)
    except (RuntimeError, TypeError) as error:
        raise RequestError(f"{place!r} is no device; write auto, cpu, cuda or cuda:1") from error
    if found.type not in ("cpu", "cuda"):
        raise RequestError(f"device {str(found)!r}: cascade runs on cpu and cuda")
    if found.type == "cpu":
        return torch.device("cpu")
    count = torch.cuda.device_count()
    if (found.index or 0) >= count:
        raise RequestError(f"device {str(found)!r}: this machine has {count} CUDA devices")
    return torch.device("cuda", torch.cuda.current_device() if found.index is None else found.index)
