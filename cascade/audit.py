"""Audit: is the cache what one slice alone would hold? Recompute from scratch and compare."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

if TYPE_CHECKING:
    from cascade.sequence import Sequence

Part = Literal["key", "value", "conv", "ssm"]

# The relative deviation that rounding alone explains: passes of other lengths sum in other orders.
TOLERANCES = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}


@dataclass(frozen=True, slots=True)
class Deviation:
    """How far one part of one layer's cache is from the recomputed one.

    `relative` is max |cached - recomputed| / max |recomputed| over that part of the layer.
    """

    layer: int
    part: Part
    absolute: float
    relative: float


@dataclass(frozen=True, slots=True)
class AuditReport:
    """The outcome of `Sequence.audit`.

    tokens:             positions compared; the last committed token is not in the cache yet
    by_layer:           one `Deviation` per layer and part
    first_bad_position: first position whose K or V is off by more than `tolerance`; where only
                        windows or states are, the last position; None where nothing is
    """

    slice: str
    tokens: int
    tolerance: float
    by_layer: tuple[Deviation, ...]
    first_bad_position: int | None

    @property
    def max_relative_error(self) -> float:
        return max((d.relative for d in self.by_layer), default=0.0)

    @property
    def ok(self) -> bool:
        return self.first_bad_position is None


def audit(sequence: Sequence, slice: str, *, tolerance: float | None = None) -> AuditReport:
    """Prefill the committed tokens under `slice` into a slot of their own and compare.

    tolerance: 1e-4 for float32 unless given, 1e-2 for float16, 5e-2 for bfloat16

    Costs one prefill and one slot of memory; the sequence is not changed.
    """
    model, slot = sequence.model, sequence.slot
    if tolerance is None:
        tolerance = TOLERANCES.get(model.dtype, 1e-4)
    model.slice_index(slice)
    tokens = slot.folded
    if tokens == 0:
        return AuditReport(slice, 0, tolerance, (), None)
    fresh_cache = model.cache(
        max_batch=1, max_length=tokens + 1, max_draft=1, state_dtype=sequence.cache.state_dtype
    )
    with model.sequence(cache=fresh_cache, consistency="shared") as fresh:
        fresh.append(sequence._tokens[: tokens + 1], slice)
        return _compare(sequence, fresh, slice, tokens, tolerance)


def _compare(
    sequence: Sequence, fresh: Sequence, slice: str, tokens: int, tolerance: float
) -> AuditReport:
    deviations: list[Deviation] = []
    bad = torch.zeros(tokens, dtype=torch.bool, device=sequence.cache.device)
    state_is_bad = False
    layers = sequence.model.arch.kinds
    attention = [i for i, kind in enumerate(layers) if kind == "attention"]
    mamba = [i for i, kind in enumerate(layers) if kind == "mamba"]
    mine, its = sequence.slot.index, fresh.slot.index

    def compare(layer: int, part: Part, cached: Tensor, recomputed: Tensor) -> Tensor:
        """Record the deviation; returns it relative, by element."""
        difference = (cached.float() - recomputed.float()).abs()
        scale = recomputed.float().abs().max().clamp(min=1e-30)
        relative = (difference / scale).nan_to_num(nan=torch.inf)
        deviations.append(Deviation(layer, part, float(difference.max()), float(relative.max())))
        return relative

    for number, layer in enumerate(attention):
        for part, cached, recomputed in (
            ("key", sequence.cache.keys, fresh.cache.keys),
            ("value", sequence.cache.values, fresh.cache.values),
        ):
            relative = compare(
                layer,
                part,  # type: ignore[arg-type]
                cached[number, mine, :tokens],
                recomputed[number, its, :tokens],
            )
            bad |= relative.flatten(1).amax(1) > tolerance
    for number, layer in enumerate(mamba):
        for part, cached, recomputed in (
            ("conv", sequence.cache.window, fresh.cache.window),
            ("ssm", sequence.cache.state, fresh.cache.state),
        ):
            relative = compare(
                layer,
                part,  # type: ignore[arg-type]
                cached[number, mine],
                recomputed[number, its],
            )
            state_is_bad |= bool(relative.max() > tolerance)
    first = int(bad.nonzero()[0]) if bool(bad.any()) else tokens - 1 if state_is_bad else None
    deviations.sort(key=lambda d: d.layer)
    return AuditReport(slice, tokens, tolerance, tuple(deviations), first)
