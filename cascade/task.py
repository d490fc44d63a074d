"""One request while it runs: its sequence, its limits, and the record of its steps.

A strategy is a generator over a `Task`: it yields verbs and is sent their outcome.
"""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Generator, Mapping
from collections.abc import Sequence as Seq
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from cascade.errors import PolicyError
from cascade.events import DraftDelta, Event, SliceChanged, StepCommitted, StepRetracted
from cascade.policies import Accept, Phase, Policy, Rewrite, StepScores
from cascade.results import Candidate, FinishReason, Metrics, Result, Step, Usage
from cascade.sampling import Sampler, derive_seed
from cascade.sequence import Sequence
from cascade.text import Codec
from cascade.verbs import Append, Commit, Draft, Propose, Refresh, Rollback, Run, Verb, Verify


@dataclass
class _OpenStep:
    began: float
    phase: Phase
    ids: list[int]
    drafted: int = 0
    score: float | None = None
    mean_score: float | None = None
    retracted: tuple[int, ...] = ()


class Task:
    """What a strategy sees of its request.

    sequence:  the tokens and the cache; `finished` says whether generation has ended
    delimiter: text that ends a step
    """

    def __init__(
        self,
        sequence: Sequence,
        codec: Codec,
        sampler: Sampler,
        prompt: str | None,
        prompt_ids: Seq[int],
        delimiter: str = "\n",
    ) -> None:
        self.sequence, self.codec, self.sampler = sequence, codec, sampler
        self.prompt, self.prompt_ids = prompt, tuple(prompt_ids)
        self.delimiter = delimiter
        self.steps: list[Step] = []
        self.finish_reason: FinishReason | None = None
        self.events: list[Event] = []
        self.phase: Phase = "thinking" if codec.thinks_at(prompt_ids) else "answer"
        self.score: float | None = None  # of a child, where a strategy has judged it
        self.candidates: tuple[Candidate, ...] = ()
        self._authors: list[tuple[str, Phase]] = []  # one per generated token
        self._logprobs: list[Mapping[int, float]] = []
        self._drafted = self._accepted = self._rewritten = self._draft_steps = 0
        self._refreshed, self._refresh_seconds = 0, 0.0
        self._cut: int | None = None  # length of the text before a stop string
        self._step: _OpenStep | None = None
        self._writer: str | None = None
        self._began = time.perf_counter()

    # ---- what a strategy asks ----

    @property
    def finished(self) -> bool:
        return self.finish_reason is not None

    @property
    def generated(self) -> list[int]:
        """Ids after the prompt."""
        return self.sequence.tokens[len(self.prompt_ids) :]

    @property
    def boundaries(self) -> frozenset[int]:
        """Ids after which a step ends."""
        return self.codec.boundaries(self.delimiter) | frozenset(self.sampler.params.stop_token_ids)

    @property
    def thinking_is_over_budget(self) -> bool:
        budget = self.sampler.params.thinking_token_budget
        return self.phase == "thinking" and budget is not None and self.thought >= budget

    @property
    def thought(self) -> int:
        """Number of generated tokens of the thought."""
        return sum(phase == "thinking" for _, phase in self._authors)

    @property
    def at_step_end(self) -> bool:
        """Whether the last committed id ends a step."""
        return self.sequence.tokens[-1] in self.boundaries

    def allowance(self, cap: int) -> int:
        """How many ids may be drafted now, at most `cap`."""
        params, cache = self.sampler.params, self.sequence.cache
        limits = [cap, self.sequence.room, cache.max_draft]
        if params.max_tokens is not None:
            limits.append(params.max_tokens - len(self._authors))
        if self.phase == "thinking" and params.thinking_token_budget is not None:
            limits.append(params.thinking_token_budget - self.thought)
        return max(min(limits), 0)

    def scores(self, draft: str, verify: str, table: Tensor) -> StepScores:
        """Score the drafted ids under the verifier's logits [k + 1, V]."""
        scores = StepScores(
            step=len(self.steps),
            phase=self.phase,
            drafter=draft,
            verifier=verify,
            logprobs=tuple(logprobs_of(self.sequence.drafted, table)),
        )
        step = self._open
        step.score, step.mean_score = math.exp(scores.min_logprob), math.exp(scores.mean_logprob)
        return scores

    # ---- what a strategy does ----

    def prefill(self, slice: str) -> Run:
        """Run the prompt under a slice."""
        self._began = time.perf_counter()
        yield Append(self.prompt_ids, slice)

    def open_step(self) -> None:
        self._step = _OpenStep(time.perf_counter(), self.phase, [])

    def write(self, cap: int, slice: str) -> Run:
        """Let a slice write up to the next boundary, and commit it unscored."""
        ids = yield Draft(self.allowance(cap), slice, self.boundaries)
        yield from self.commit(len(ids), slice)

    def propose(self, cap: int, slice: str) -> Generator[Verb, Any, list[int]]:
        """Let a slice draft up to the next boundary without committing."""
        ids: list[int] = yield Draft(self.allowance(cap), slice, self.boundaries)
        self._drafted += len(ids)
        self._draft_steps += 1
        self._announce(slice)
        self.events.append(DraftDelta(self.codec.decode(ids), tuple(ids), slice))
        return ids

    def commit(self, count: int, author: str, *, drafted: bool = False) -> Run:
        """Commit the first `count` drafted ids, cut where generation ends.

        author:  the slice that wrote them; drafted: whether they were a proposal of the draft slice
        """
        ids = self.sequence.drafted
        count = self._fit(ids[:count])
        if self.sampler.params.logprobs is not None:
            self._record_logprobs(ids[:count])
        yield Commit(count)
        step = self._open
        step.ids += ids[:count]
        self._authors += [(author, step.phase)] * count
        if drafted:
            self._accepted += count
            step.drafted += count
        self._announce(author)
        if self.finish_reason is None and not self.allowance_left:
            self.finish_reason = "length"

    def retract(self, ids: Seq[int], slice: str) -> None:
        """Note that drafted ids were dropped."""
        step = self._open
        step.retracted = tuple(ids)
        self.events.append(StepRetracted(self.codec.decode(ids), tuple(ids), slice, step.score))

    def close_step(
        self, decision: Literal["accept", "rewrite", "written", "forced"], slice: str, drafter: str
    ) -> None:
        """Record the step that was open, unless nothing of it was kept."""
        step = self._open
        self._step = None
        if decision == "rewrite":
            self._rewritten += len(step.ids) - step.drafted
        if not step.ids:
            return
        record = Step(
            index=len(self.steps),
            text=self._text_of(len(self._authors) - len(step.ids), len(self._authors)),
            token_ids=tuple(step.ids),
            slice=slice,
            phase=step.phase,
            score=step.score,
            mean_score=step.mean_score,
            decision=decision,
            drafter=drafter,
            drafted_tokens=step.drafted,
            milliseconds=(time.perf_counter() - step.began) * 1e3,
            retracted=self.codec.decode(step.retracted) if step.retracted else None,
            retracted_ids=step.retracted,
        )
        self.steps.append(record)
        self.events.append(StepCommitted(record))
        if self.codec.end_think_id in step.ids:
            self.phase = "answer"
        elif self.codec.think_id in step.ids:
            self.phase = "thinking"

    def end_thinking(self, slice: str) -> Run:
        """Force a clean end of the thought, on a line of its own."""
        self.open_step()
        ids = self.codec.end_of_thinking(self.sequence.tokens[-1], self.delimiter)
        if len(ids) >= self.sequence.room:
            self.finish_reason = "length"
            self._step = None
            return
        yield Propose(ids)
        yield Commit(len(ids))
        self._open.ids += ids
        self._authors += [(slice, "thinking")] * len(ids)
        if self.sampler.params.logprobs is not None:
            self._logprobs += [{} for _ in ids]
        self.close_step("forced", slice, slice)

    def refresh(self, slice: str, last: int | None = None) -> Run:
        """Make the cache what a slice alone would hold; tokens and time go into the metrics.

        last: re-run at most so many of the last tokens; see `Sequence.refresh` for what that leaves
        """
        began = time.perf_counter()
        self._refreshed += yield Refresh(slice, last)
        self._refresh_seconds += time.perf_counter() - began

    def run_through(self, ids: Seq[int], slice: str) -> Generator[Verb, Any, list[float]]:
        """Run and keep ids that were written elsewhere; their log-probabilities under the slice."""
        logprobs: list[float] = []
        longest = self.sequence.cache.max_draft
        for chunk in (ids[i : i + longest] for i in range(0, len(ids), longest)):
            yield Propose(chunk)
            table = yield Verify(slice)
            logprobs += logprobs_of(chunk, table)
            yield Commit(len(chunk))
        return logprobs

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
        child = Task(sequence, self.codec, sampler, self.prompt, self.prompt_ids, self.delimiter)
        child.phase, child.steps, child._writer = self.phase, list(self.steps), self._writer
        child._authors, child._logprobs = list(self._authors), list(self._logprobs)
        return child

    def judge(self, start: int, slice: str) -> Generator[Verb, Any, list[float]]:
        """Log-probabilities under a slice of the ids from position `start` on, run again by it."""
        ids = self.sequence.tokens[start:]
        yield Rollback(start)
        return (yield from self.run_through(ids, slice))

    def adopt(self, child: Task, slice: str, *, scored: bool) -> Run:
        """Go on as a child did: its ids are run here by a slice, its steps become this task's.

        scored: whether that slice judges what it runs
        """
        ids = child.generated[len(self.generated) :]
        logprobs = iter((yield from self.run_through(ids, slice)))
        for step in child.steps[len(self.steps) :]:
            table = [next(logprobs) for _ in step.token_ids]
            if scored:
                low, mean = math.exp(min(table)), math.exp(sum(table) / len(table))
                step = replace(step, score=low, mean_score=mean, decision="accept")
            self.steps.append(step)
            self._announce(step.slice)
            self.events.append(StepCommitted(step))
        self._authors, self._logprobs = child._authors, child._logprobs
        self.phase, self.finish_reason, self._cut = child.phase, child.finish_reason, child._cut
        self._accepted += len(ids)

    def count_drafts(self, children: Seq[Task]) -> None:
        """Enter into the usage what children wrote, kept or not."""
        self._drafted += sum(len(c.generated) - len(self.generated) for c in children)
        self._draft_steps += len(children)

    # ---- the outcome ----

    def result(self, error: BaseException | None = None) -> Result:
        """The request as it stands now."""
        ids = self.generated
        text = self._text_of(0, len(ids))
        reasoning, answer = self._parts(text)
        seconds = time.perf_counter() - self._began
        thinking = [author for author, phase in self._authors if phase == "thinking"]
        names = list(self.sequence.model.slices)
        passes: Counter[str] = Counter()
        moved: Counter[str] = Counter()
        for (writer, tokens), count in self.sequence.meter.passes.items():
            passes[names[writer]] += count
            moved[names[writer]] += count * self.sequence.model.pass_bytes(names[writer], tokens)
        return Result(
            prompt=self.prompt,
            prompt_token_ids=self.prompt_ids,
            answer=answer,
            reasoning=reasoning,
            text=text,
            token_ids=tuple(ids),
            finish_reason="error" if error else self.finish_reason or "length",
            steps=tuple(self.steps),
            usage=Usage(
                prompt=len(self.prompt_ids),
                reasoning=len(thinking),
                answer=len(ids) - len(thinking),
                drafted=self._drafted,
                accepted=self._accepted,
                rewritten=self._rewritten,
                by_slice=dict(Counter(author for author, _ in self._authors)),
                thinking_by_slice=dict(Counter(thinking)),
            ),
            metrics=Metrics(
                seconds=seconds,
                tokens_per_second=len(ids) / seconds if seconds else 0.0,
                acceptance_rate=self._accepted / self._drafted if self._drafted else None,
                mean_accepted=self._accepted / self._draft_steps if self._draft_steps else None,
                passes=dict(passes),
                bytes=dict(moved),
                refreshed=self._refreshed,
                refresh_seconds=self._refresh_seconds,
            ),
            seed=self.sampler.seed,
            logprobs=tuple(self._logprobs) if self.sampler.params.logprobs is not None else None,
            error=f"{type(error).__name__}: {error}" if error else None,
            candidates=self.candidates,
        )

    # ---- inside ----

    @property
    def allowance_left(self) -> bool:
        params = self.sampler.params
        over = params.max_tokens is not None and len(self._authors) >= params.max_tokens
        return not over and self.sequence.room > 0

    @property
    def _open(self) -> _OpenStep:
        if self._step is None:
            raise PolicyError("a strategy committed tokens outside a step; call open_step() first")
        return self._step

    def _fit(self, ids: Seq[int]) -> int:
        """How many of these ids to keep: up to and with the first that ends generation."""
        params = self.sampler.params
        ends = frozenset() if params.ignore_eos else self.codec.end_ids
        ends |= frozenset(params.stop_token_ids)
        before = self.generated if params.stop else []
        for count, token in enumerate(ids, 1):
            if len(self._authors) + count <= params.min_tokens and not params.max_tokens:
                continue
            if token in ends:
                self.finish_reason = "stop"
                return count
            if params.stop:
                text = self.codec.decode([*before, *ids[:count]]) or ""
                found = [i for i in (text.find(stop) for stop in params.stop) if i >= 0]
                if found:
                    self._cut = min(found)
                    self.finish_reason = "stop"
                    return count
        return len(ids)

    def _record_logprobs(self, ids: Seq[int]) -> None:
        wanted = self.sampler.params.logprobs or 0
        for token, row in zip(ids, self.sequence.rows, strict=False):
            table = row.log_softmax(0)
            top = table.topk(wanted) if wanted else None
            entry = dict(zip(top.indices.tolist(), top.values.tolist(), strict=True)) if top else {}
            entry[token] = float(table[token])
            self._logprobs.append(entry)

    def _announce(self, writer: str) -> None:
        if self._writer is not None and writer != self._writer:
            self.events.append(SliceChanged(self._writer, writer))
        self._writer = writer

    def _text_of(self, start: int, end: int) -> str | None:
        """Text of generated tokens [start, end), without the final end token or stop string."""
        if self.codec.tokenizer is None:
            return None
        ids = self.generated
        if end == len(ids) and ids and ids[-1] in self.codec.end_ids:
            end -= 1
        before = self.codec.decode(ids[:start]) or ""
        through = self.codec.decode(ids[:end]) or ""
        return through[: self._cut][len(before) :]

    def _parts(self, text: str | None) -> tuple[str | None, str | None]:
        """Reasoning and answer of the generated text."""
        if text is None:
            return None, None
        if self.codec.end_think_id is None:
            return "", text.strip()
        tag = "</think>"
        head, found, tail = text.rpartition(tag)
        if found:
            return head.removeprefix("<think>").strip("\n"), tail.strip()
        if self.phase == "thinking":
            return text.removeprefix("<think>").strip("\n"), ""
        return "", text.strip()


def logprobs_of(ids: Seq[int], table: Tensor) -> list[float]:
    """Natural-log probability of each id under its row of logits [at least len(ids), V]."""
    chosen = torch.tensor(ids, device=table.device)[:, None]
    picked: list[float] = table[: len(ids)].log_softmax(-1).gather(1, chosen)[:, 0].tolist()
    return picked


def decide(policy: Policy, scores: StepScores) -> Accept | Rewrite:
    """Ask a policy; whatever it does wrong becomes a PolicyError of this request alone."""
    try:
        decision = policy.decide(scores)
    except Exception as error:
        raise PolicyError(f"policy {policy!r} raised {type(error).__name__}: {error}") from error
    if not isinstance(decision, (Accept, Rewrite)):
        raise PolicyError(
            f"policy {policy!r} returned {decision!r}; "
            "decisions are Accept() and Rewrite(start=...)"
        )
    if isinstance(decision, Rewrite) and decision.start >= len(scores.logprobs):
        raise PolicyError(
            f"policy {policy!r} wants to keep {decision.start} tokens and rewrite the rest of a "
            f"step of {len(scores.logprobs)}"
        )
    return decision
