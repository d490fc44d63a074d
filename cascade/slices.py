"""Which nested models a checkpoint holds: their names, widths and sizes.

A slice is named by two widths, `hidden_size` and `moe_intermediate_size`. They come from an
argument, from the checkpoint, or from a preset; sizes are counted from the config alone.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeAlias

from pydantic import BaseModel, ConfigDict, Field, StrictBool, StrictInt, ValidationError

from cascade.errors import CheckpointError, RequestError, SliceError
from cascade.tensors import EMBEDDINGS, ROUTED, ROUTER_BIAS, tensor_shapes

if TYPE_CHECKING:
    import torch

SLICE_MULTIPLE = 8
"""Widths of a slice are multiples of this: 16 bytes of bf16, one vector load of a kernel."""

PARENT = "parent"

Width = Annotated[StrictInt, Field(gt=0)]
_STRICT = ConfigDict(frozen=True, extra="forbid")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_WIDTHS = re.compile(r"\s*(\d+)\s*[xX]\s*(\d+)\s*")


class SliceSpec(BaseModel):
    """One nested model: its name, widths and size.

    trained:    whether the checkpoint was trained at these widths
    parameters: all of them, embeddings and head included; the router's correction biases, which
                transformers holds as buffers, are not counted
    active:     parameters that one token reads: everything but the routed experts it does not
                reach, and one row of the embeddings (the head is read whole)
    """

    model_config = _STRICT

    name: str
    hidden_size: Width
    moe_intermediate_size: Width
    trained: bool
    parameters: Annotated[int, Field(gt=0)]
    active: Annotated[int, Field(gt=0)]

    @property
    def widths(self) -> tuple[int, int]:
        """Residual width and routed expert width."""
        return self.hidden_size, self.moe_intermediate_size

    def bytes(self, dtype: torch.dtype) -> int:
        """Bytes of the weights alone in `dtype`, if this slice were exported."""
        return self.parameters * dtype.itemsize

    def __str__(self) -> str:
        mark = "" if self.trained else ", not trained"
        return (
            f"{self.name}: {self.hidden_size} x {self.moe_intermediate_size}, "
            f"{format_count(self.parameters)} parameters, {format_count(self.active)} active{mark}"
        )

    def __repr__(self) -> str:
        return f"SliceSpec({self})"


class Declaration(BaseModel):
    """One slice as an argument or a checkpoint declares it. The parent counts as trained."""

    model_config = _STRICT

    hidden_size: Width
    moe_intermediate_size: Width
    trained: StrictBool | None = None


class ElasticSection(BaseModel):
    """The `elastic` section of config.json, or the whole of elastic.json."""

    model_config = _STRICT

    slices: dict[str, Declaration]
    trained_for_shared_cache: StrictBool = False


SliceLike: TypeAlias = SliceSpec | Declaration | Mapping[str, Any] | tuple[int, int]
"""How a caller may declare a slice: a spec, a mapping of widths, or (hidden, expert width)."""


class Preset(BaseModel):
    """Slices of a parent that is known by its shape."""

    model_config = _STRICT

    title: str
    parent: str
    hidden_size: Width
    moe_intermediate_size: Width
    layers: Width
    vocab_size: Width
    slices: dict[str, Declaration]

    def matches(self, config: Any) -> bool:
        return (
            config.hidden_size == self.hidden_size
            and config.moe_intermediate_size == self.moe_intermediate_size
            and len(config.layers_block_type) == self.layers
            and config.vocab_size == self.vocab_size
        )


PRESETS = (
    # Widths: Megatron-LM, examples/flextron, commit fa17762eae. Those of 23b are not public; a
    # checkpoint that holds them declares them.
    Preset(
        title="NVIDIA Nemotron Nano v3",
        parent="30b",
        hidden_size=2688,
        moe_intermediate_size=1856,
        layers=52,
        vocab_size=131072,
        slices={"12b": Declaration(hidden_size=1920, moe_intermediate_size=960, trained=True)},
    ),
)


def resolve_slices(
    config: Any,
    argument: Mapping[str, SliceLike] | None = None,
    directory: Path | None = None,
) -> dict[str, SliceSpec]:
    """The slices of a checkpoint by name, from the smallest to the parent.

    argument:  slices by name; `{}` runs the parent alone. Left out, they come from the `elastic`
               section of the config, from `elastic.json` in `directory`, or from a preset that
               the config's shape matches, the first that there is.

    The parent is always among them. Where no slice has its widths it is added, as "parent" or
    as the preset calls it.

    Raises SliceError where nothing declares slices, or widths do not fit; CheckpointError where
    the checkpoint's declaration cannot be read.
    """
    preset = next((preset for preset in PRESETS if preset.matches(config)), None)
    if argument is not None:
        where = "the slices argument"
        declared = {name: _declaration(name, value) for name, value in argument.items()}
    elif (section := elastic_section(config, directory)) is not None:
        where = "the checkpoint's declaration"
        declared = section.slices
    elif preset is not None:
        where, declared = preset.title, preset.slices
    else:
        raise SliceError(_nothing_known(config, directory))

    full = (config.hidden_size, config.moe_intermediate_size)
    by_widths: dict[tuple[int, int], str] = {}
    specs: list[SliceSpec] = []
    for name, slice in declared.items():
        widths = (slice.hidden_size, slice.moe_intermediate_size)
        _check_name(name, widths, where)
        _check_widths(config, widths, f"slice {name!r}")
        if widths in by_widths:
            raise SliceError(
                f"{where} names {widths[0]}x{widths[1]} twice: {by_widths[widths]!r} and {name!r}"
            )
        by_widths[widths] = name
        trained = widths == full if slice.trained is None else slice.trained
        specs.append(_spec(config, name, widths, trained))
    if full not in by_widths:
        name = preset.parent if preset else PARENT
        if name in declared:
            raise SliceError(
                f"{where} gives the name {name!r} to {declared[name].hidden_size}x"
                f"{declared[name].moe_intermediate_size}, but it is the parent's name and the "
                f"parent is {full[0]}x{full[1]}; name the slice otherwise"
            )
        specs.append(_spec(config, name, full, True))
    specs.sort(key=lambda spec: (spec.parameters, spec.widths))
    return {spec.name: spec for spec in specs}


def elastic_section(config: Any, directory: Path | None = None) -> ElasticSection | None:
    """What a checkpoint itself declares: `elastic` in its config, else its `elastic.json`.

    Raises CheckpointError naming the file and the field that is wrong.
    """
    raw = getattr(config, "elastic", None)
    where = f"the 'elastic' section of {directory / 'config.json' if directory else 'config.json'}"
    if raw is None:
        path = directory / "elastic.json" if directory else None
        if path is None or not path.exists():
            return None
        where = str(path)
        try:
            raw = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{path} is not readable as JSON: {error}") from error
    try:
        return ElasticSection.model_validate(raw)
    except ValidationError as error:
        raise CheckpointError(f"{where} is not valid: {_first_problem(error)}") from error


def custom_slice(
    config: Any, widths: str | tuple[int, int] | Mapping[str, Any] | SliceSpec | Declaration
) -> SliceSpec:
    """A slice of any widths: `"1920x960"`, `(1920, 960)` or a mapping. It counts as not trained.

    Raises SliceError for widths that are not positive, wider than the parent, or not a multiple
    of `SLICE_MULTIPLE` (the parent's own widths always are allowed).
    """
    if isinstance(widths, str):
        match = _WIDTHS.fullmatch(widths)
        if match is None:
            raise SliceError(
                f"{widths!r} does not name widths; write hidden_size x moe_intermediate_size, "
                "for example '1920x960'"
            )
        pair = int(match[1]), int(match[2])
    else:
        declared = _declaration(None, widths)
        pair = declared.hidden_size, declared.moe_intermediate_size
    name = f"{pair[0]}x{pair[1]}"
    _check_widths(config, pair, f"slice {name!r}")
    return _spec(config, name, pair, False)


def slice_for(
    slices: Mapping[str, SliceSpec],
    *,
    params: int | str | None = None,
    memory: int | str | None = None,
    bytes_per_parameter: int = 2,
    cache_bytes: int = 0,
) -> SliceSpec:
    """The largest trained slice within every limit that is given.

    params: parameters in all, `12_500_000_000` or `"12.5B"`
    memory: bytes, or `"24GB"` or `"24GiB"`, of the slice's weights alone and `cache_bytes`

    Raises RequestError for no limit or an unreadable one, SliceError where no slice fits.
    """
    # A limit is what was asked, the most that is allowed, what a slice needs, and its unit. A
    # floor of measured speed would be one more entry.
    limits: list[tuple[str, int, Callable[[SliceSpec], int], Callable[[int], str]]] = []
    if params is not None:
        limits.append(
            (f"params={params!r}", parse_count(params), lambda s: s.parameters, format_count)
        )
    if memory is not None:
        limits.append(
            (
                f"memory={memory!r}",
                parse_bytes(memory),
                lambda s: s.parameters * bytes_per_parameter + cache_bytes,
                format_bytes,
            )
        )
    if not limits:
        raise RequestError("slice_for needs a limit: params=, memory=, or both")
    trained = sorted((s for s in slices.values() if s.trained), key=lambda s: s.parameters)
    if not trained:
        raise SliceError(f"no trained slice among {', '.join(slices) or 'none'}")
    fitting = [s for s in trained if all(need(s) <= most for _, most, need, _ in limits)]
    if fitting:
        return fitting[-1]
    smallest = trained[0]
    needs = " and ".join(
        f"{write(need(smallest))} for {asked}"
        for asked, most, need, write in limits
        if need(smallest) > most
    )
    raise SliceError(f"no slice fits: the smallest, {smallest.name!r}, needs {needs}")


def parse_count(value: int | str) -> int:
    """A number of parameters: 500, `"500M"`, `"12.5B"`. Raises RequestError."""
    return _parse(value, {"": 0, "K": 3, "M": 6, "B": 9, "T": 12}, "parameters", "'12.5B'")


def parse_bytes(value: int | str) -> int:
    """A number of bytes: 500, `"24GB"` (10^9), `"24GiB"` (2^30). Raises RequestError."""
    binary = {f"{unit}IB": 1024**power for power, unit in enumerate("KMGT", start=1)}
    return _parse(
        value, {"": 0, "B": 0, "KB": 3, "MB": 6, "GB": 9, "TB": 12}, "bytes", "'24GB'", binary
    )


def format_count(count: int) -> str:
    """>>> format_count(31_577_940_288)
    '31.58B'
    """
    for unit, size in (("B", 10**9), ("M", 10**6), ("K", 10**3)):
        if count >= size:
            return f"{count / size:.2f}{unit}"
    return str(count)


def format_bytes(count: int) -> str:
    """>>> format_bytes(24_860_000_000)
    '24.86 GB'
    """
    for unit, size in (("GB", 10**9), ("MB", 10**6), ("KB", 10**3)):
        if count >= size:
            return f"{count / size:.2f} {unit}"
    return f"{count} B"


def count_parameters(config: Any, hidden: int, ffn: int) -> tuple[int, int]:
    """All and active parameters of a slice (see `SliceSpec`), from the config alone."""
    total = skipped = 0
    for name, shape in tensor_shapes(config, hidden, ffn).items():
        if name.endswith(ROUTER_BIAS):
            continue
        count = math.prod(shape)
        total += count
        if name.endswith(ROUTED):
            skipped += count // shape[0] * (shape[0] - config.num_experts_per_tok)
        elif name == EMBEDDINGS and not config.tie_word_embeddings:
            skipped += count - hidden
    return total, total - skipped


def _spec(config: Any, name: str, widths: tuple[int, int], trained: bool) -> SliceSpec:
    parameters, active = count_parameters(config, *widths)
    return SliceSpec(
        name=name,
        hidden_size=widths[0],
        moe_intermediate_size=widths[1],
        trained=trained,
        parameters=parameters,
        active=active,
    )


def _declaration(name: str | None, value: Any) -> Declaration:
    if isinstance(value, Declaration):
        return value
    if isinstance(value, SliceSpec):
        value = value.model_dump(include={"hidden_size", "moe_intermediate_size", "trained"})
    elif isinstance(value, (tuple, list)) and len(value) == 2:
        value = {"hidden_size": value[0], "moe_intermediate_size": value[1]}
    what = "a slice" if name is None else f"slice {name!r}"
    if not isinstance(value, Mapping):
        raise SliceError(
            f"{what} is declared by {{'hidden_size': ..., 'moe_intermediate_size': ...}} or a "
            f"pair of widths, not by {value!r}"
        )
    try:
        return Declaration.model_validate(dict(value))
    except ValidationError as error:
        raise SliceError(f"{what} is not valid: {_first_problem(error)}") from error


def _check_name(name: Any, widths: tuple[int, int], where: str) -> None:
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise SliceError(
            f"{where} has a slice named {name!r}; a name has letters, digits, '.', '_' and '-'"
        )
    match = _WIDTHS.fullmatch(name)
    if match and (int(match[1]), int(match[2])) != widths:
        raise SliceError(
            f"{where} names a slice {name!r}, but its widths are {widths[0]}x{widths[1]}"
        )


def _check_widths(config: Any, widths: tuple[int, int], what: str) -> None:
    for field, width in zip(("hidden_size", "moe_intermediate_size"), widths, strict=True):
        parent = getattr(config, field)
        if width <= 0:
            raise SliceError(f"{what}: {field}={width} is not a positive number")
        if width > parent:
            raise SliceError(f"{what}: {field}={width} is wider than its parent's {parent}")
        if width % SLICE_MULTIPLE and width != parent:
            near = max(width // SLICE_MULTIPLE, 1) * SLICE_MULTIPLE
            raise SliceError(
                f"{what}: {field}={width} is not a multiple of {SLICE_MULTIPLE}, which the "
                f"kernels need; the nearest below is {near}"
                if width > SLICE_MULTIPLE
                else f"{what}: {field}={width} is not a multiple of {SLICE_MULTIPLE}, which the "
                "kernels need"
            )


def _nothing_known(config: Any, directory: Path | None) -> str:
    presets = "; ".join(
        f"{p.title} ({p.hidden_size} x {p.moe_intermediate_size}, {p.layers} layers, vocabulary "
        f"{p.vocab_size}: {', '.join([*p.slices, p.parent])})"
        for p in PRESETS
    )
    looked = f" in {directory}" if directory else ""
    return (
        f"no slices are known for this {config.hidden_size} x {config.moe_intermediate_size} "
        f"parent of {len(config.layers_block_type)} layers: there is neither an 'elastic' section "
        f"in config.json nor an elastic.json{looked}, and it is none of the presets: {presets}. "
        'Declare them in elastic.json as {"slices": {"small": {"hidden_size": 256, '
        '"moe_intermediate_size": 96, "trained": true}}} or by the argument '
        "slices={'small': (256, 96)}; slices={} runs the parent alone"
    )


def _first_problem(error: ValidationError) -> str:
    problem = error.errors()[0]
    field = ".".join(str(part) for part in problem["loc"]) or "the whole"
    value = "" if problem["type"] == "missing" else f" (got {problem['input']!r})"
    return f"{field}: {problem['msg']}{value}"


def _parse(
    value: int | str,
    decimal: Mapping[str, int],
    what: str,
    example: str,
    binary: Mapping[str, int] | None = None,
) -> int:
    factors = {unit: 10**power for unit, power in decimal.items()} | dict(binary or {})
    if isinstance(value, str):
        match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", value.replace("_", ""))
        if match and match[2].upper() in factors:
            from fractions import Fraction

            return int(Fraction(match[1]) * factors[match[2].upper()])
    elif isinstance(value, int) and not isinstance(value, bool) and value >= 0:
        return value
    raise RequestError(
        f"{value!r} is no number of {what}; write an integer or text such as {example}"
    )
