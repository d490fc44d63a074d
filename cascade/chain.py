"""Drafting that never waits: each step is launched before the one before it was read.

The likeliest id, or the one that was drawn, stays on the device and feeds the next step; the host
reads it one step later, to see where a row ends. A row that has ended by then has run its last id
once too often: that pass is kept, and the row's next draft begins with its outcome.
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
    from cascade.sampling import Sampler
    from cascade.sequence import Sequence


@dataclass(slots=True)
class _Line:
    """One row while it is drafted.

    left: ids still to be picked; at: the position of the next one; ended: at a stop
    """

    sequence: Sequence
    sampler: Sampler
    left: int
    at: int
    ended: bool = False


@dataclass(slots=True)
class _Picked:
    """Ids that were picked on the device and are on their way to the host."""

    lines: list[_Line]
    ids: Tensor
    proposals: list[Tensor | None]
    arrived: torch.cuda.Event | None = field(default=None)

    def read(self) -> list[int]:
        if self.arrived is not None:
            self.arrived.synchronize()
        ids: list[int] = self.ids.tolist()
        return ids


@torch.no_grad()
def draft_ahead(
    sequences: Seq[Sequence],
    wanted: Seq[int],
    samplers: Seq[Sampler],
    writer: int,
    decoder: Decoder,
    stops: frozenset[int],
) -> None:
    """Draft wanted[r] >= 1 ids of row r, up to and with one of `stops`.

    Every row must have at most one id that `writer` has not run, and a sampler that needs nothing
    but the logits. The caller must be ready to restore the sequences. Raises NumericalError where
    logits are not finite.
    """
    lines = [
        _Line(s, sampler, count, len(s._tokens) + len(s._drafted))
        for s, sampler, count in zip(sequences, samplers, wanted, strict=True)
    ]
    pending: list[_Picked] = _first(lines, writer, decoder)
    while pending:
        live = [line for line in lines if line.left and not line.ended]
        following = [_step(live, writer, decoder, FROM_DEVICE)] if live else []
        for picked in pending:
            _take(picked, writer, stops)
        pending = following


def _first(lines: list[_Line], writer: int, decoder: Decoder) -> list[_Picked]:
    """The first id of every line: from logits that are known, or by a pass over the id before."""
    known: list[_Line] = []
    fresh: list[_Line] = []
    for line in lines:
        sequence = line.sequence
        slot = sequence.slot
        if slot.entry_slice != writer:
            sequence._rows = []
        # Rows outlive their entries where a verb has failed: the next step reads the entries.
        all_run = sequence.length - slot.folded + len(sequence._drafted) <= slot.usable(writer)
        (known if all_run else fresh).append(line)
    found = []
    if known:
        rows = torch.stack([x.sequence._rows[len(x.sequence._drafted)] for x in known])
        (slots,) = known[0].sequence.cache.index(*((x.sequence.slot.index,) for x in known))
        ids = torch.empty_like(slots)
        decoder.pick(rows, ids, slots)
        found.append(_picked(known, rows, ids, decoder))
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
        last = (sequence._drafted or sequence._tokens)[-1] if token is None else token
        rows.append((slot.index, slot.folded + entry, entry, [last]))
    captured = decoder.run(writer, rows)
    logits = captured.logits[: len(rows), 0].clone()
    for line, row, (_, _, entry, _) in zip(lines, logits.unbind(), rows, strict=True):
        sequence = line.sequence
        sequence._rows[entry:] = [row]
        sequence.slot.entries, sequence.slot.entry_slice = entry + 1, writer
        sequence.meter.count(writer, 1)
    return _picked(lines, logits, captured.picked[: len(rows)], decoder)


def _picked(lines: list[_Line], logits: Tensor, ids: Tensor, decoder: Decoder) -> _Picked:
    """Send the next id of each line to the host: the likeliest of logits [n, V], or a drawn one.

    ids: [n], the likeliest; the next pass may write there
    """
    proposals = _draw(lines, logits, ids, decoder)
    for line in lines:
        line.left, line.at = line.left - 1, line.at + 1
    if not ids.is_cuda:
        return _Picked(lines, ids.clone(), proposals)
    host = torch.empty(ids.shape, dtype=ids.dtype, pin_memory=True)
    host.copy_(ids, non_blocking=True)
    arrived = torch.cuda.Event()
    arrived.record()
    return _Picked(lines, host, proposals, arrived)


def _draw(lines: list[_Line], logits: Tensor, ids: Tensor, decoder: Decoder) -> list[Tensor | None]:
    """Put drawn ids where lines sample, for the next pass too; the distributions they are from."""
    proposals: list[Tensor | None] = [None] * len(lines)
    together: dict[tuple[float, ...], list[int]] = {}
    for i, line in enumerate(lines):
        if not line.sampler.params.greedy:
            together.setdefault(line.sampler.filters, []).append(i)
    for members in together.values():
        rows = ((lines[i], i) for i in members)
        seeds, positions, slots, places = lines[0].sequence.cache.index(
            *((line.sampler.seed, line.at, line.sequence.slot.index, i) for line, i in rows)
        )
        table = logits if len(members) == len(lines) else logits[places]
        probs = lines[members[0]].sampler.distributions(table, ())
        drawn = lines[0].sequence.model.kernels.race_sample(probs, seeds, positions)
        ids[places] = torch.where(table.sum(-1).isfinite(), drawn, -1)
        decoder.latest[slots] = drawn
        for i, proposal in zip(members, probs.unbind(), strict=True):
            proposals[i] = proposal
    return proposals


def _take(picked: _Picked, writer: int, stops: frozenset[int]) -> None:
    for line, token, proposal in zip(picked.lines, picked.read(), picked.proposals, strict=True):
        if line.ended:
            continue
        sequence = line.sequence
        if token < 0:
            name = list(sequence.model.slices)[writer]
            raise NumericalError(
                f"slice {name!r} gave logits that are not finite; the sequence is unchanged"
            )
        sequence._drafted.append(token)
        sequence._proposals.append(proposal)
        line.ended = token in stops
