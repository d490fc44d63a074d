"""One request while it runs: its sequence, its limits, and the record of its steps.

A strategy is a generator over a `Task`: it yields verbs and is sent their outcome.
"""

from __future__ import annotations

import math
import time
from collections.abc import Generator, MutableMapping
from collections.abc import Sequence as Seq
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from cascade.account import Account
from cascade.events import DraftDelta, Event, SliceChanged, StepCommitted, StepRetracted
from cascade.figures import divergences, draft_figures, likeliest, logprobs_of
from cascade.judge import Question
from cascade.passes import is_stale, repair_start
from cascade.policies import DraftScores, LabelledStep, Need, Phase, StepScores
from cascade.results import Candidate, FinishReason, Result, Step, StepDecision
from cascade.sampling import Sampler, derive_seed
from cascade.sequence import Sequence
from cascade.steps import Steps
from cascade.text import Codec
from cascade.transcript import Logprobs, Transcript
from cascade.verbs import Append, Commit, Draft, Propose, Refresh, Rollback, Run, Verb, Verify

NOTHING: frozenset[Need] = frozenset()


@dataclass(frozen=True, slots=True)
class Proposal:
    """A drafted step that is not committed.

    scores: how its drafter sees it; logits: the drafter's own [k, V], None unless asked for
    """

    ids: list[int]
    slice: str
    scores: DraftScores
    logits: Tensor | None = None


class Task:
    """What a strategy sees of its request.

    sequence:   the tokens and the cache; transcript: what was generated, whose it is, its text
    account:    what it has cost; `finished` says whether generation has ended
    delimiter:  text that ends a step
    memory:     what strategies keep from one request of a Reasoner to the next
    beside:     requests that shared the last batch, this one included
    busy:       seconds of work: its own, and its share of the batches it was in
    score, candidates, labels: what a strategy has found out, for whoever started it
    """

    def __init__(
        self,
        sequence: Sequence,
        codec: Codec,
        sampler: Sampler,
        prompt: str | None,
        prompt_ids: Seq[int],
        delimiter: str = "\n",
        memory: MutableMapping[Any, Any] | None = None,
    ) -> None:
        self.sequence, self.codec, self.sampler = sequence, codec, sampler
        self.prompt, self.prompt_ids = prompt, tuple(prompt_ids)
        self.delimiter = delimiter
        self.memory: MutableMapping[Any, Any] = {} if memory is None else memory
        self.beside, self.busy = 1, 0.0
        self.transcript = Transcript(codec, sampler.params, prompt_ids)
        self.account = Account()
        self.log = Steps(self.transcript)
        self.finish_reason: FinishReason | None = None
        self.events: list[Event] = []
        self.score: float | None = None
        self.candidates: tuple[Candidate, ...] = ()
        self.labels: list[LabelledStep] = []
        self._writer: str | None = None

    # ---- what a strategy asks ----

    @property
    def finished(self) -> bool:
        return self.finish_reason is not None

    @property
    def steps(self) -> list[Step]:
        """The steps that were committed."""
        return self.log.done

    @property
    def generated(self) -> list[int]:
        """Ids after the prompt."""
        return list(self.transcript.ids)

    @property
    def kept(self) -> int:
        """Number of ids after the prompt."""
        return len(self.transcript)

    @property
    def phase(self) -> Phase:
        return self.transcript.phase

    @property
    def thought(self) -> int:
        """Number of generated tokens of the thought."""
        return self.transcript.thought

    @property
    def boundaries(self) -> frozenset[int]:
        """Ids after which a step may end."""
        closers, stops = self.codec.closers(self.delimiter), self.sampler.params.stop_token_ids
        return closers | frozenset(stops) if stops else closers

    @property
    def thinking_is_over_budget(self) -> bool:
        budget = self.sampler.params.thinking_token_budget
        return self.phase == "thinking" and budget is not None and self.thought >= budget

    @property
    def at_step_end(self) -> bool:
        """Whether the last committed id ends a step."""
        return self.ends_step(self._tail(len(self.delimiter) + 1))

    @property
    def step_tokens(self) -> int:
        """Tokens of the open step that are committed."""
        return len(self.transcript) - self.log.current.first

    def ends_step(self, ids: Seq[int]) -> bool:
        """Whether a step ends with the last of these ids."""
        stops = self.sampler.params.stop_token_ids
        return bool(ids) and (ids[-1] in stops or self.codec.closes(ids, self.delimiter))

    def allowance(self, cap: int, spare: int = 0) -> int:
        """How many ids may be drafted now, at most `cap`, with room for `spare` behind them."""
        params, cache = self.sampler.params, self.sequence.cache
        limits = [cap, self.sequence.room - spare, cache.max_draft - spare]
        if params.max_tokens is not None:
            limits.append(params.max_tokens - len(self.transcript))
        if self.phase == "thinking" and params.thinking_token_budget is not None:
            limits.append(params.thinking_token_budget - self.thought)
        return max(min(limits), 0)

    # ---- drafts and their scores ----

    def prefill(self, slice: str) -> Run:
        """Run the prompt under a slice."""
        self.account.began = time.perf_counter()
        yield Append(self.prompt_ids, slice)

    def continue_step(
        self, cap: int, slice: str, spare: int = 0
    ) -> Generator[Verb, Any, list[int]]:
        """Let a slice draft up to the end of the step, for `commit`; timed, but not entered."""
        ids: list[int] = []
        room, began = self.allowance(cap, spare), time.perf_counter()
        while len(ids) < room:
            ids += yield Draft(room - len(ids), slice, self.boundaries)
            # What may complete a delimiter of several characters need not.
            if len(self.delimiter) == 1 or self.ends_step(ids):
                break
        self.account.wrote(slice, len(ids), time.perf_counter() - began)
        return ids

    def draft(self, cap: int, slice: str, spare: int = 0) -> Generator[Verb, Any, list[int]]:
        """Let a slice draft up to the next boundary, without committing."""
        ids = yield from self.continue_step(cap, slice, spare)
        self.account.drafted += len(ids)
        self.account.rounds += 1
        self._announce(slice)
        self.events.append(DraftDelta(self.codec.decode(ids), tuple(ids), slice))
        return ids

    def propose(
        self,
        cap: int,
        slice: str,
        verifier: str,
        needs: frozenset[Need] = NOTHING,
        question: Question | None = None,
    ) -> Generator[Verb, Any, Proposal]:
        """Let a slice draft a step; also how it sees it itself, for a policy that `needs` that."""
        ids = yield from self.draft(cap, slice, len(question.ids) if question else 0)
        self.log.current.scores = None
        logits = None
        if needs & {"draft", "divergence"}:
            logits = torch.stack(self.sequence.rows[: len(ids)])
        figures = draft_figures(ids, logits) if logits is not None and "draft" in needs else {}
        model, meter = self.sequence.model, self.sequence.meter
        scores = DraftScores(
            step=len(self.steps),
            phase=self.phase,
            drafter=slice,
            verifier=verifier,
            text=self.codec.decode(ids),
            progress=self.account.progress(self.transcript, meter, list(model.slices), self.steps),
            **figures,
        )
        return Proposal(ids, slice, scores, logits)

    def rate(
        self,
        proposal: Proposal,
        slice: str,
        needs: frozenset[Need] = NOTHING,
        question: Question | None = None,
        *,
        repair: bool = True,
    ) -> Generator[Verb, Any, StepScores]:
        """Let a slice score a proposed step in one pass, and judge it where a question is put.

        repair: as in `Sequence.verify`
        """
        ids = proposal.ids
        if question and len(self.sequence.drafted) == len(ids):
            yield Propose(question.ids)
        began = time.perf_counter()
        if repair:
            self.account.refreshed += self._stale(slice)
            self.account.unverified_steps = 0
        table = yield Verify(slice, repair)
        self.account.verified(slice, time.perf_counter() - began)
        found: dict[str, Any] = {"logprobs": tuple(logprobs_of(ids, table))}
        if proposal.logits is not None and "divergence" in needs:
            found["divergences"] = divergences(proposal.logits, table[: len(ids)])
        if question:
            found["judge"] = question.answer(table[-1])
        scores = StepScores(**dict(proposal.scores) | found | {"verifier": slice})
        self.log.current.scores = scores
        return scores

    # ---- what becomes of them ----

    def open_step(self) -> None:
        self.log.open()

    def write(self, cap: int, slice: str) -> Run:
        """Let a slice write up to the next boundary, and commit it unscored."""
        ids = yield from self.continue_step(cap, slice)
        yield from self.commit(len(ids), slice)

    def commit(
        self,
        count: int,
        author: str,
        *,
        drafted: bool = False,
        bonus: tuple[int, str] | None = None,
    ) -> Run:
        """Commit the first `count` drafted ids, cut where generation ends.

        author:  the slice that wrote them; drafted: whether they were a proposal
        bonus:   one more id and its author
        """
        ids = self.sequence.drafted[:count]
        offered = ids if bonus is None else [*ids, bonus[0]]
        fit = self.transcript.fit(offered)
        ids, more = ids[: fit.count], offered[count : fit.count]
        wanted, logprobs = self.sampler.params.logprobs, []
        if wanted is not None:
            pairs = zip([*ids, *more], self.sequence.rows, strict=False)
            logprobs = [likeliest(row, token, wanted) for token, row in pairs]
        yield Commit(len(ids), more[0] if more else None)
        self.transcript.add(ids, author, logprobs[: len(ids)], last=fit.ends and not more)
        self._announce(author)
        if bonus and more:
            self.transcript.add(more, bonus[1], logprobs[len(ids) :], last=fit.ends)
            self._announce(bonus[1])
        if drafted:
            self.account.accepted += len(ids)
            self.log.current.drafted += len(ids)
        if fit.ends:
            self.transcript.cut, self.finish_reason = fit.cut, "stop"
        elif not self._may_go_on:
            self.end("length")

    def end(self, reason: FinishReason) -> None:
        """End generation here."""
        self.finish_reason = reason
        self._hand_out_steps()

    def retract(self, ids: Seq[int], slice: str) -> None:
        """Note that drafted ids are dropped."""
        if ids:
            step = self.log.current
            step.retracted += ids
            score = None if step.scores is None else math.exp(step.scores.min_logprob)
            self.events.append(StepRetracted(self.codec.decode(ids), tuple(ids), slice, score))

    def drop(self, proposal: Proposal) -> Run:
        """Drop a proposed step as a whole."""
        yield Commit(0)
        self.retract(proposal.ids, proposal.slice)

    def close_step(self, decision: StepDecision, drafter: str | None = None) -> None:
        """Record the step that is open, unless nothing of it was kept.

        drafter: the slice that drafted it, where one did
        """
        step = self.log.close(decision, drafter)
        if step is not None:
            if decision in ("rewrite", "escalate", "lead") and step.retracted_ids:
                self.account.rewritten += step.tokens - step.drafted_tokens
            if decision == "unverified":
                self.account.unverified += step.tokens
                self.account.unverified_steps += 1
        self._hand_out_steps()

    def end_thinking(self, slice: str) -> Run:
        """Force a clean end of a thought that goes on, on a line of its own; a slice runs it."""
        if self.finished or self.phase != "thinking":
            return
        if not self.log.is_open:
            self.open_step()
        ids = self.codec.end_of_thinking(self._tail(2))[: self.sequence.room]
        yield Propose(ids)
        yield Verify(slice, repair=False)
        yield from self.commit(len(ids), slice)
        self.close_step("forced")

    def refresh(self, slice: str, last: int | None = None) -> Run:
        """Make the cache what a slice alone would hold; tokens and time go into the metrics.

        last: re-run at most so many of the last tokens; see `Sequence.refresh` for what that leaves
        """
        with self.account.refreshing():
            self.account.refreshed += yield Refresh(slice, last)
        self.account.unverified_steps = 0

    # ---- tasks beside this one ----

    def child(self, number: int, temperature: float) -> Task:
        """A task that goes on from here on a fork of the sequence, under a seed of its own.

        temperature: where the request itself is greedy, so that children differ
        """
        sampler = self.sampler
        if sampler.params.greedy:
            params = sampler.params.model_copy(update={"temperature": temperature})
            sampler = replace(sampler, params=params)
        sampler = replace(sampler, seed=derive_seed(sampler.seed, 0, number + 1))
        [sequence] = self.sequence.fork()
        sequence.meter = self.sequence.meter  # one account of passes
        child = Task(
            sequence,
            self.codec,
            sampler,
            self.prompt,
            self.prompt_ids,
            self.delimiter,
            self.memory,
        )
        child.transcript = self.transcript.copy()
        child.log, child._writer = self.log.over(child.transcript), self._writer
        return child

    def rerun(self, start: int, slice: str) -> Generator[Verb, Any, list[float]]:
        """Log-probabilities under a slice of the ids from position `start` on, run again by it."""
        ids = self.sequence.tokens[start:]
        yield Rollback(start)
        return (yield from self._run_through(ids, slice))[0]

    def adopt(self, child: Task, slice: str, *, scored: bool) -> Run:
        """Go on as a child did: its ids are run here by a slice, its steps become this task's.

        scored: whether that slice judges what it runs
        """
        before = len(self.transcript)
        logprobs, entries = yield from self._run_through(child.transcript.ids[before:], slice)
        self.transcript = child.transcript
        if entries:
            self.transcript.logprobs[before:] = entries
        rest = iter(logprobs)
        self.log, adopted = self.log.over(self.transcript), child.log.since(len(self.steps))
        for step, span in adopted:
            table = [next(rest) for _ in step.token_ids]
            if scored:
                low, mean = math.exp(min(table)), math.exp(sum(table) / len(table))
                step = replace(step, score=low, mean_score=mean, decision="accept", scorer=slice)
            self.log.add(step, span)
            self._announce(step.slice)
        self.finish_reason = child.finish_reason
        self.account.accepted += len(self.transcript) - before
        self._hand_out_steps()

    def count_drafts(self, children: Seq[Task]) -> None:
        """Enter into the account what children wrote, kept or not."""
        before = len(self.transcript)
        self.account.drafted += sum(len(child.transcript) - before for child in children)
        self.account.rounds += len(children)

    # ---- the outcome ----

    def result(self, error: BaseException | None = None) -> Result:
        """The request as it stands now."""
        transcript, sequence = self.transcript, self.sequence
        reasoning, answer = transcript.parts()
        return Result(
            prompt=self.prompt,
            prompt_token_ids=self.prompt_ids,
            answer=answer,
            reasoning=reasoning,
            text=transcript.text,
            token_ids=tuple(transcript.ids),
            finish_reason="error" if error else self.finish_reason or "length",
            steps=tuple(self.steps),
            usage=self.account.usage(len(self.prompt_ids), transcript),
            metrics=self.account.metrics(len(transcript), sequence.meter, sequence.model),
            seed=self.sampler.seed,
            logprobs=None if self.sampler.params.logprobs is None else tuple(transcript.logprobs),
            error=f"{type(error).__name__}: {error}" if error else None,
            candidates=self.candidates,
        )

    # ---- inside ----

    @property
    def _may_go_on(self) -> bool:
        limit = self.sampler.params.max_tokens
        return self.sequence.room > 0 and (limit is None or len(self.transcript) < limit)

    def _run_through(
        self, ids: Seq[int], slice: str
    ) -> Generator[Verb, Any, tuple[list[float], list[Logprobs]]]:
        """Run and keep ids that were written elsewhere.

        Their log-probabilities under the slice, and what `SamplingParams.logprobs` asks for.
        """
        found: list[float] = []
        entries: list[Logprobs] = []
        wanted, longest = self.sampler.params.logprobs, self.sequence.cache.max_draft
        for chunk in (ids[i : i + longest] for i in range(0, len(ids), longest)):
            yield Propose(chunk)
            table = yield Verify(slice)
            found += logprobs_of(chunk, table)
            if wanted is not None:
                entries += (likeliest(r, i, wanted) for r, i in zip(table, chunk, strict=False))
            yield Commit(len(chunk))
        return found, entries

    def _tail(self, count: int) -> list[int]:
        """The last committed ids."""
        return [*self.prompt_ids[-count:], *self.transcript.ids[-count:]][-count:]

    def _stale(self, slice: str) -> int:
        """Tokens that a verifying pass of a slice runs again before it starts."""
        sequence, writer = self.sequence, self.sequence.model.slice_index(slice)
        if sequence.consistency != "exact" or not is_stale(sequence, writer):
            return 0
        return sequence.length - 1 - repair_start(sequence, writer)

    def _announce(self, writer: str) -> None:
        if self._writer is not None and writer != self._writer:
            self.events.append(SliceChanged(self._writer, writer))
        self._writer = writer

    def _hand_out_steps(self) -> None:
        self.events += map(StepCommitted, self.log.hand_out(finished=self.finished))
