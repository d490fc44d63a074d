"""Sequences: append, draft or propose, verify, commit, rollback, fork, refresh and audit.

`Sequence` is one sequence in one slot of a cache. `Batch` runs the same verb on several at once,
ragged over rows; `Sequence`'s own verbs are a batch of one. Every verb either does all of its work
or raises and leaves every sequence as it was.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import TYPE_CHECKING, Literal, Self

import torch
from torch import Tensor

from cascade.audit import AuditReport, audit
from cascade.batch import Batch, TokenIds
from cascade.cache import Cache, DraftCache, Slot
from cascade.digest import CacheDigest, digest
from cascade.errors import RequestError, SequenceClosed, unknown
from cascade.passes import settle
from cascade.sampling import Sampler, SamplingParams

if TYPE_CHECKING:
    from cascade.model import ElasticModel

Consistency = Literal["exact", "shared", "refresh"]
MODES: tuple[Consistency, ...] = ("exact", "shared", "refresh")


def check_consistency(mode: object) -> None:
    """Raises RequestError for an unknown consistency mode."""
    if mode not in MODES:
        raise RequestError(unknown("consistency mode", mode, MODES))


class Meter:
    """The forward passes a sequence took part in, by (slice number, its tokens in the pass)."""

    def __init__(self) -> None:
        self.passes: Counter[tuple[int, int]] = Counter()

    def count(self, writer: int, tokens: int) -> None:
        self.passes[writer, tokens] += 1


class Sequence:
    """One sequence of tokens over a model's shared cache. Use as a context manager, or `close`.

    consistency:
      `exact`    `append` and `verify` first re-run whatever their slice did not write, so that
                 after every commit the cache is what that slice alone would hold (the last
                 committed token enters with the next pass). Drafts committed without `verify`
                 are the one exception; the next `append` or `verify` repairs them.
      `shared`   positions stay as their writer left them. A switch costs nothing. Approximate,
                 and sound only for checkpoints trained for it.
      `refresh`  like `shared`, but the newest state whose prefix is exact is kept, so that
                 `refresh(slice)` re-runs no more than what is stale.

    draft_cache:
      `shared`   a draft slice reads what the others wrote, and keeps nothing of its own.
      `own`      for checkpoints whose slices cannot read each other's cache (`handoff_report`): a
                 slice drafts what it would draft alone. Where it did not write all that is
                 committed, it reads a cache of its own, the `companion`. The ids that it drafts
                 cross over as proposed ones: the shared cache never holds anything of it, and
                 drafts committed without `verify` are run by the slice that ran last, in one chunk
                 when the next verb needs them. Takes a second slot of the same size.
    """

    def __init__(
        self,
        model: ElasticModel,
        cache: Cache,
        consistency: Consistency,
        draft_cache: DraftCache = "shared",
        slot: Slot | None = None,
    ) -> None:
        check_consistency(consistency)
        cache.check_draft_cache(draft_cache)
        self.model, self.cache, self.consistency = model, cache, consistency
        self.draft_cache = draft_cache
        self.meter = Meter()
        self._tokens: list[int] = []
        self._drafted: list[int] = []
        # Logits [V] by the slice that ran last: row i predicts token number length + i.
        self._rows: list[Tensor] = []
        self._proposals: list[Tensor | None] = []  # None where no other id was possible
        self._verified = False  # whether the slice that ran last was asked to verify all of them
        self._companion: Sequence | None = None
        self._slot: Slot | None = slot or cache.allocate()

    # ---- what is known ----

    @property
    def tokens(self) -> list[int]:
        """The committed token ids."""
        return list(self._tokens)

    @property
    def drafted(self) -> list[int]:
        """The drafted ids, not committed yet."""
        return list(self._drafted)

    @property
    def proposals(self) -> list[Tensor]:
        """For each drafted id the distribution [V] that it was really drawn from; read only.

        An id given to `propose`, or drawn greedily, was drawn with probability 1.
        """
        return [
            self._certainly(token) if proposal is None else proposal
            for token, proposal in zip(self._drafted, self._proposals, strict=True)
        ]

    @property
    def rows(self) -> list[Tensor]:
        """Logits [V] known so far by the slice that ran or drafted last: row i is for drafted id i.

        Read only: the next verb may take them as known.
        """
        return list(self._rows)

    @property
    def companion(self) -> Sequence | None:
        """The sequence that a draft slice keeps of its own (draft_cache="own"), to look into.

        All its tokens were run by the slice that drafted last; a draft by another slice starts it
        anew. It lags behind until its slice drafts again, and catches up in one chunk then. None
        before it was needed.
        """
        return self._companion

    @property
    def length(self) -> int:
        """Number of committed tokens."""
        return len(self._tokens)

    @property
    def room(self) -> int:
        """Tokens that still fit behind the committed ones."""
        return self.cache.max_length - self.length

    @property
    def provenance(self) -> list[str]:
        """For each committed position the name of the slice that wrote it.

        The last one is provisional: the next pass runs that token again.
        """
        names, slot = list(self.model.slices), self.slot
        row = self.cache.provenance[slot.index, : max(self.length - 1, 0)].tolist()
        return [names[i] for i in [*row, slot.tail][: self.length]]

    @property
    def is_closed(self) -> bool:
        return self._slot is None

    @property
    def slot(self) -> Slot:
        """The bookkeeping of this sequence's slot. Raises SequenceClosed after `close`."""
        if self._slot is None:
            raise SequenceClosed("this sequence was closed; open a new one with model.sequence()")
        return self._slot

    def exact_length(self, slice: str) -> int:
        """Leading tokens whose cache is exactly what `slice` alone would have written."""
        writer = self.model.slice_index(slice)
        settle([self])
        return self.slot.exact_length(writer)

    # ---- verbs ----

    def append(self, ids: TokenIds, slice: str) -> Tensor:
        """Run ids under a slice and commit them; drafted ids are dropped.

        ids: a list or 1-D tensor of token ids, at least one. Returns the logits [V] (fp32) that
        predict the id after the last.
        """
        return Batch([self]).append([ids], slice)[0]

    def draft(
        self,
        k: int,
        slice: str,
        params: SamplingParams | Sampler | None = None,
        *,
        until: Iterable[int] = (),
    ) -> list[int]:
        """Continue by up to `k` ids without committing, and return them.

        Stops early after an id of `until`. Greedy without `params`; a `Sampler` knows where the
        prompt ends, for penalties on the output and `min_tokens`. A second call goes on behind the
        ids drafted so far.
        """
        return Batch([self]).draft([k], slice, [params], until=until)[0]

    def propose(self, ids: TokenIds) -> None:
        """Take ids from elsewhere as drafted ids, behind those drafted so far.

        No slice has run them yet; `verify` does. ids: a list or 1-D tensor, possibly empty.
        """
        Batch([self]).propose([ids])

    def verify(self, slice: str, *, repair: bool = True) -> Tensor:
        """Logits [k + 1, V] (fp32) of a slice over the k drafted ids.

        Row i predicts drafted id i; the last row predicts the bonus token after them. Another
        slice may verify the same ids again; the same slice may not.

        repair: False leaves what another slice wrote as it is in exact mode too: for a slice that
                only gives an opinion on the way. The next `append` or `verify` with it repairs.
        """
        return Batch([self]).verify(slice, repair=repair)[0]

    def commit(self, n: int, bonus: int | None = None) -> None:
        """Keep the first `n` drafted ids (0 <= n <= k) and drop the others.

        bonus: one more id to commit behind them, drawn from the verifier's logits. The next pass
        runs it, so the promises are those of a commit without one. Ids that were neither drafted
        nor verified by a slice are run under the one that ran last.
        """
        Batch([self]).commit([n], [bonus])

    def rollback(self, length: int) -> None:
        """Go back to an earlier committed length; drafted ids are dropped.

        K and V are still there; windows and states are re-run from the newest stored state, each
        span under the slice that wrote it.
        """
        Batch([self]).rollback([length])

    def fork(self, n: int = 1) -> list[Sequence]:
        """`n` independent sequences with the same committed tokens; nothing writable is shared.

        Drafted ids stay with this sequence alone. Raises CacheFull where slots are missing.
        """
        if isinstance(n, bool) or not isinstance(n, int) or n < 1:
            raise RequestError(f"cannot fork into {n!r} sequences; ask for at least one")
        _ = self.slot  # raises where this sequence is closed
        forks: list[Sequence] = []
        try:
            for _ in range(n):
                fork = Sequence(self.model, self.cache, self.consistency, self.draft_cache)
                forks.append(fork)
            self.copy_to(forks)
            if self._companion is not None:
                self._companion.copy_to([fork.open_companion() for fork in forks])
            return forks
        except BaseException:
            for fork in forks:
                fork.close()
            raise

    def refresh(self, slice: str, last: int | None = None) -> int:
        """Re-run what `slice` did not write, and return how many tokens that were.

        Restarts from the newest stored state whose prefix is exact for that slice; afterwards the
        cache is what the slice alone would hold. Drafted ids are dropped.

        last: re-run at most so many of the last tokens, over the cache before them as it is. That
              repairs their K and V as far as they do not depend on what came before, and nothing
              else: earlier K and V, and all that the windows and states have taken in from
              earlier tokens, stay the other slice's. Sound where slices read each other's cache.
        """
        return Batch([self]).refresh(slice, last)[0]

    def audit(self, slice: str, *, tolerance: float | None = None) -> AuditReport:
        """Compare the cache with a from-scratch prefill of the committed tokens under `slice`."""
        settle([self])
        return audit(self, slice, tolerance=tolerance)

    def digest(self) -> CacheDigest:
        """64-bit digests of the committed cache by layer and 64 positions, to compare two of them.

        `a.digest() == b.digest()` where both hold the same bits; `differences` says where not.
        """
        settle([self])
        return digest(self)

    def copy_to(self, targets: list[Sequence]) -> None:
        """What is committed, into sequences that hold nothing yet."""
        self.cache.copy(self.slot, [target.slot for target in targets], self.length)
        for target in targets:
            target._tokens = list(self._tokens)
            target._rows = [row.clone() for row in self._rows[:1] if target.slot.entries]

    def open_companion(self) -> Sequence:
        """A companion that holds nothing, in place of the one that there was."""
        self.drop_companion()
        slot = self.cache.companion_slot(self.slot)
        self._companion = Sequence(self.model, self.cache, "shared", slot=slot)
        self._companion.meter = self.meter
        return self._companion

    def drop_companion(self) -> None:
        companion, self._companion = self._companion, None
        if companion is not None:
            companion.close()

    def drop_draft(self) -> None:
        """Forget the drafted ids."""
        slot = self.slot
        committed = max(self.length - slot.folded, 0)
        slot.entries = committed if slot.entries >= committed else 0  # others have no row
        # A copy: a view would keep the logits of a whole pass alive.
        self._rows = [row.clone() for row in self._rows[:1] if slot.entries]
        self._drafted, self._proposals, self._verified = [], [], False

    def close(self) -> None:
        """Give the slot back. Closing twice is allowed."""
        slot, self._slot = self._slot, None
        if slot is not None:
            self._rows, self._drafted, self._proposals = [], [], []
            self.drop_companion()
            self.cache.release(slot)

    def _certainly(self, token: int) -> Tensor:
        """The distribution [V] that has nothing but one id."""
        return torch.zeros(self.model.arch.vocab_size, device=self.cache.device).index_fill_(
            0, torch.tensor(token, device=self.cache.device), 1.0
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def __repr__(self) -> str:
        state = "closed" if self._slot is None else f"{self.length} tokens"
        return f"Sequence({state}, {len(self._drafted)} drafted, {self.consistency})"
