"""Greedy drafting that never waits: each step is launched before the one before it was read.

The likeliest id stays on the device and feeds the next step; the host reads it one step later, to see
where a row ends. A row that has ended by then has run its last id once too often: that pass is
kept, and the row's next draft begins with its outcome.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from cascade.decode import FROM_DEVICE, Row
from cascade.errors import NumericalError

if TYPE_CHECKING:
    from cascade.graphs import Decoder
    from cascade.sequence import Sequence


@dataclass(slots=True)
class _Line:
    """One row while it is drafted: how many ids are still to be picked, and whether it has ended."""

    sequence: Sequence
    left: int
    ended: bool = False


@dataclass(slots=True)
class _Picked:
    """Ids that were picked on the device and are on their way to the host."""

    lines: list[_Line]
    ids: Tensor
    arrived: torch.cuda.Event | None = field(default=None)

    def read(self) -> list[int]:
        if self.arrived is not None:
            self.arrived.synchronize()
        ids: list[int] = self.ids.tolist()
        return ids


@torch.no_grad()
def draft_greedily(
    sequences: Seq[Sequence],
    wanted: Seq[int],
    writer: int,
    decoder: Decoder,
    stops: frozenset[int],
) -> None:
    """Draft wanted[r] >= 1 ids of row r, up to and with one of `stops`.

    Every row must have at most one id that `writer` has not run. The caller must be ready to restore
    the sequences. Raises NumericalError where logits are not finite.
    """
    lines = [_Line(s, count) for s, count in zip(sequences, wanted, strict=True)]
    pending: list[_Picked] = _first(lines, writer, decoder)
    while pending:
        live = [line for line in lines if line.left and not line.ended]
        following = [_step(live, writer, decoder, FROM_DEVICE)] if live else []
        for picked in pending:
            _take(picked, writer, stops)
        pending = following


def _first(lines: list[_Line], writer: int, decoder: Decoder) -> list[_Picked]:
    """The first id of every line: from logits that are known, or by a pass over the id before it."""
    known, fresh = [], []
    for line in lines:
        sequence = line.sequence
        if sequence.slot.entry_slice != writer:
            sequence._rows = []
        (fresh if len(sequence._rows) <= len(sequence._drafted) else known).append(line)
    found = []
    if known:
        rows = torch.stack([x.sequence._rows[len(x.sequence._drafted)] for x in known])
        slots = torch.tensor([x.sequence.slot.index for x in known], device=rows.device)
        ids = torch.empty_like(slots)
        decoder.pick(rows, ids, slots)
        found.append(_picked(known, ids))
    if fresh:
        found.append(_step(fresh, writer, decoder, None))
    return found


def _step(lines: list[_Line], writer: int, decoder: Decoder, token: int | None) -> _Picked:
    """One pass over the last id of each line; `token` stands for ids that are on the device."""
    rows: list[Row] = []
    for line in lines:
        sequence = line.sequence
        slot = sequence.slot
        entry = slot.usable(writer)
        last = (
            [*sequence._tokens[slot.folded :], *sequence._drafted][-1] if token is None else token
        )
        rows.append((slot.index, slot.folded + entry, entry, [last]))
    captured = decoder.run(writer, rows)
    logits = captured.logits[: len(rows), 0].clone()
    for line, row, (_, _, entry, _) in zip(lines, logits.unbind(), rows, strict=True):
        sequence = line.sequence
        sequence._rows[entry:] = [row]
        sequence.slot.entries, sequence.slot.entry_slice = entry + 1, writer
        sequence.meter.count(writer, 1)
    return _picked(lines, captured.picked[: len(rows)])


def _picked(lines: list[_Line], ids: Tensor) -> _Picked:
    for line in lines:
        line.left -= 1
    if not ids.is_cuda:
        return _Picked(lines, ids.clone())
    host = torch.empty(ids.shape, dtype=ids.dtype, pin_memory=True)
    host.copy_(ids, non_blocking=True)
    arrived = torch.cuda.Event()
    arrived.record()
    return _Picked(lines, host, arrived)


def _take(picked: _Picked, writer: int, stops: frozenset[int]) -> None:
    for line, token in zip(picked.lines, picked.read(), strict=True):
        if line.ended:
            continue
        sequence = line.sequence
        if token < 0:
            name = list(sequence.model.slices)[writer]
            raise NumericalError(
                f"slice {name!r} gave logits that are not finite; the sequence is unchanged"
            )
        sequence._drafted.append(token)
        sequence._proposals.append(None)
        line.ended = token in stops
