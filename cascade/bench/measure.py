"""The figures: every one is a verb of `Batch` or `Sequence`, on random tokens, timed warm."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field

import torch

from cascade.batch import Batch
from cascade.bench.clock import WARM, Clock
from cascade.bench.report import Cost, Decode, Memory, Prefill, Scoring, Switch
from cascade.bench.routing import chosen_experts, distinct_a_pass, distinct_a_step, summary
from cascade.bench.traffic import commit_bytes, pass_bytes
from cascade.cache import Cache
from cascade.model import ElasticModel
from cascade.sequence import Sequence

TOGETHER = 8  # rows whose prompts are run at once
SEED = 2605


@dataclass
class Bench:
    """A model and how to measure it.

    context: tokens of a row before the first timed one; run: drafted tokens a commit; repeats:
    timed runs a figure
    """

    model: ElasticModel
    clock: Clock
    bandwidth: float
    context: int
    run: int
    repeats: int
    generator: torch.Generator = field(default_factory=lambda: torch.Generator().manual_seed(SEED))

    def decode(self, slice: str, batch: int) -> Decode:
        """Draft `run` tokens for every row and commit them, again and again, as a user would."""
        run, began = self.run, self.context
        self.clock.forget_peak()
        with self._rows(slice, batch, (WARM + self.repeats + 1) * run, run) as rows:

            def draft_and_commit() -> None:
                rows.draft([run] * batch, slice)
                rows.commit([run] * batch)

            seconds = self.clock.median(draft_and_commit, self.repeats) / run
            context, peak = (began + rows.sequences[0].length) // 2, self.clock.peak_bytes()
            rows.draft([run] * batch, slice)
            weights, cache = self.model.weights(slice), rows.cache
            chosen = [c[:, :run] for c in chosen_experts(weights, cache, rows.sequences)]
        distinct = distinct_a_step(chosen)
        moved = commit_bytes(cache, batch) // run + pass_bytes(
            weights, cache, distinct=distinct, rows=batch, tokens=batch, context=context
        )
        experts = summary(distinct, self.model.arch, batch)
        return Decode(slice, batch, context, run, self._cost(seconds, moved), experts, peak)

    def score(self, slice: str, tokens: int) -> Scoring:
        """Run `tokens` ids from elsewhere under a slice, all at once: logits for each of them."""
        with self._rows(slice, 1, tokens, tokens) as rows:
            [row] = rows.sequences

            def propose() -> None:
                row.commit(0)
                row.propose(self.random_ids(tokens))

            seconds = self.clock.median(lambda: row.verify(slice), self.repeats, propose)
            weights, cache = self.model.weights(slice), rows.cache
            chosen = chosen_experts(weights, cache, [row])
        distinct, run = distinct_a_pass(chosen), tokens + 1  # the last committed token as well
        moved = pass_bytes(
            weights, cache, distinct=distinct, rows=1, tokens=run, context=self.context
        )
        experts = summary(distinct, self.model.arch, run)
        return Scoring(slice, tokens, self.context, self._cost(seconds, moved), experts)

    def prefill(self, slice: str, tokens: int) -> Prefill:
        cache = self.model.cache(max_batch=1, max_length=tokens + 1, max_draft=1)
        ids: list[list[int]] = []
        with self.model.sequence(cache=cache) as row:

            def clear() -> None:
                row.rollback(0)
                ids[:] = [self.random_ids(tokens)]

            seconds = self.clock.median(lambda: row.append(ids[0], slice), 3, clear)
        flops = 2 * tokens * self.model.slice_spec(slice).active
        return Prefill(slice, tokens, seconds, flops)

    def switch(self, before: str, after: str) -> Switch:
        """Drafts of one slice over a shared cache, behind its own and behind another's."""
        run = self.run
        room = 2 * (WARM + self.repeats) * 2 * run
        with self._rows(after, 1, room, run) as rows:
            [row] = rows.sequences

            def draft(slice: str) -> None:
                row.draft(run, slice)
                row.commit(run)

            def timed(previous: str) -> float:
                return self.clock.median(
                    lambda: draft(after), self.repeats, lambda: draft(previous)
                )

            return Switch(before, after, timed(before) - timed(after))

    def memory(self) -> Memory:
        """Weights once, and the cache of one sequence."""
        parent = {t.untyped_storage().data_ptr() for _, t in self._tensors(self.model.largest)}
        copies = sum(
            t.nbytes
            for name in self.model.slices
            for _, t in self._tensors(name)
            if t.untyped_storage().data_ptr() not in parent
        )
        cache = self.model.cache(max_batch=1, max_length=self.context, max_draft=self.run)
        return Memory(self.model.nbytes, copies, cache.nbytes, self.context)

    def cache_bytes(self, batch: int) -> int:
        """Bytes of the cache that `decode` opens for so many rows."""
        arch, model = self.model.arch, self.model
        length = self.context + (WARM + self.repeats + 2) * self.run
        return batch * (
            arch.state_bytes()
            + arch.window_bytes(model.dtype)
            + arch.journal_bytes(self.run + 1, model.dtype)
            + length * (arch.bytes_per_token(model.dtype) + 1)
        )

    def random_ids(self, count: int) -> list[int]:
        vocabulary = self.model.arch.vocab_size
        ids: list[int] = torch.randint(vocabulary, (count,), generator=self.generator).tolist()
        return ids

    @contextmanager
    def _rows(self, slice: str, batch: int, room: int, drafts: int) -> Iterator[Batch]:
        """Rows of random tokens, with room for more."""
        cache: Cache = self.model.cache(
            max_batch=batch, max_length=self.context + room + 1, max_draft=drafts
        )
        with ExitStack() as stack:
            rows: list[Sequence] = [
                stack.enter_context(self.model.sequence(cache=cache, consistency="shared"))
                for _ in range(batch)
            ]
            for start in range(0, batch, TOGETHER):
                some = rows[start : start + TOGETHER]
                Batch(some).append([self.random_ids(self.context) for _ in some], slice)
            yield Batch(rows)

    def _cost(self, seconds: float, moved: int) -> Cost:
        return Cost(seconds, moved, self.bandwidth)

    def _tensors(self, slice: str) -> Iterator[tuple[str, torch.Tensor]]:
        return self.model.weights(slice).named_tensors()
