"""Can a slice read another slice's cache? Measured, because it is a property of the checkpoint.

For every ordered pair of slices, a text is begun by one slice (the writer) and goes on under
another (the reader): once over the writer's cache, once over the reader's own, recomputed. The
difference of the two is what a handoff costs.
"""

from __future__ import annotations

from collections.abc import Iterable
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from cascade.errors import RequestError

if TYPE_CHECKING:
    from cascade.cache import Cache
    from cascade.model import ElasticModel

MIN_TOKENS = 64
SHARED_LOSS = 0.02  # nats per token: below this a shared cache costs nothing that matters


@dataclass(frozen=True, slots=True)
class Handoff:
    """One ordered pair of slices.

    own_loss:  nats per token of the continuation over the reader's own cache
    loss:      the same over the writer's cache
    agreement: share of positions with the same most likely token over both caches
    tokens:    positions measured, over all prompts, the first one after the handoff included
    """

    writer: str
    reader: str
    own_loss: float
    loss: float
    agreement: float
    tokens: int

    @property
    def excess(self) -> float:
        """What reading the writer's cache costs, in nats per token."""
        return self.loss - self.own_loss


@dataclass(frozen=True, slots=True)
class HandoffReport:
    """All pairs, and whether slices of this checkpoint should share a cache."""

    pairs: tuple[Handoff, ...]

    @property
    def can_share(self) -> bool:
        return all(pair.excess <= SHARED_LOSS for pair in self.pairs)

    @property
    def recommendation(self) -> str:
        worst = max(self.pairs, key=lambda pair: pair.excess)
        cost = f"{worst.writer} -> {worst.reader} costs {worst.excess:.3f} nats per token"
        if self.can_share:
            return f"slices read each other's cache (worst: {cost}): shared or exact mode"
        return (
            f"slices do not read each other's cache ({cost}): "
            'use consistency="exact" with draft_cache="own"'
        )


@torch.no_grad()
def handoff_report(
    model: ElasticModel,
    prompts: Seq[Seq[int]],
    *,
    slices: Seq[str] | None = None,
    tokens: int = MIN_TOKENS,
    until: Iterable[int] = (),
    cache: Cache | None = None,
) -> HandoffReport:
    """Measure every handoff between `slices` (unless given all trained ones, or all).

    prompts: token ids of each prompt. Each is continued greedily by the reader alone for up to
             2 * `tokens` ids (or to the end of the cache, or an id of `until`); the writer writes
             prompt and first half, the reader is scored on the second half. Never the first token
             alone: that one agrees even where nothing else does.

    Raises RequestError where fewer than `tokens` positions could be scored.
    """
    trained = [name for name, spec in model.slices.items() if spec.trained]
    names = list(slices or (trained if len(trained) > 1 else model.slices))
    if len(names) < 2:
        raise RequestError(f"a handoff needs two slices; got {names}")
    if not prompts:
        raise RequestError("no prompts to measure handoffs with")
    pairs, stops = [], frozenset(until)
    for reader in names:
        texts = [_own_text(model, prompt, reader, 2 * tokens, stops, cache) for prompt in prompts]
        scored = sum(len(tail) for _, tail in texts)
        if scored < tokens:
            raise RequestError(
                f"only {scored} positions after the handoff, too few to judge it by: "
                f"give more prompts, until there are at least {tokens}"
            )
        own = [_score(model, head, tail, reader, reader, cache) for head, tail in texts]
        for writer in names:
            if writer == reader:
                continue
            read = [_score(model, head, tail, writer, reader, cache) for head, tail in texts]
            pairs.append(_pair(writer, reader, own, read))
    return HandoffReport(tuple(pairs))


def _own_text(
    model: ElasticModel,
    prompt: Seq[int],
    reader: str,
    length: int,
    stops: frozenset[int],
    cache: Cache | None,
) -> tuple[list[int], list[int]]:
    """What the reader alone writes, split: (prompt and first half, second half)."""
    with model.sequence(cache=cache) as sequence:
        sequence.append(list(prompt), reader)
        while sequence.length - len(prompt) < length and sequence.room > 0:
            left = min(length - (sequence.length - len(prompt)), sequence.room)
            ids = sequence.draft(min(left, sequence.cache.max_draft), reader, until=stops)
            sequence.commit(len(ids))
            if ids[-1] in stops:
                break
        ids = sequence.tokens
    half = len(prompt) + (len(ids) - len(prompt)) // 2
    return ids[:half], ids[half:]


def _score(
    model: ElasticModel,
    head: list[int],
    tail: list[int],
    writer: str,
    reader: str,
    cache: Cache | None,
) -> tuple[Tensor, Tensor]:
    """Log-probability of each tail token, and the most likely id there, over the writer's head."""
    picked, best = [], []
    with model.sequence(cache=cache, consistency="shared") as sequence:
        sequence.append(head, writer)
        step = sequence.cache.max_draft
        for begin in range(0, len(tail), step):
            ids = tail[begin : begin + step]
            sequence.propose(ids)
            table = sequence.verify(reader)[: len(ids)].log_softmax(-1)
            picked.append(table.gather(1, torch.tensor(ids, device=table.device)[:, None])[:, 0])
            best.append(table.argmax(1))
            sequence.commit(len(ids))
    return torch.cat(picked), torch.cat(best)


def _pair(
    writer: str, reader: str, own: Seq[tuple[Tensor, Tensor]], read: Seq[tuple[Tensor, Tensor]]
) -> Handoff:
    own_loss = -torch.cat([p for p, _ in own])
    loss = -torch.cat([p for p, _ in read])
    same = torch.cat([a == b for (_, a), (_, b) in zip(own, read, strict=True)])
    return Handoff(
        writer=writer,
        reader=reader,
        own_loss=float(own_loss.mean()),
        loss=float(loss.mean()),
        agreement=float(same.float().mean()),
        tokens=loss.numel(),
    )
