"""What a request returns: text, steps, usage and metrics, as plain frozen values."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from cascade.policies import Phase

FinishReason = Literal["stop", "length", "error"]
StepDecision = Literal[
    "accept",
    "unverified",
    "refresh",
    "rewrite",
    "escalate",
    "lead",
    "verified",
    "written",
    "forced",
]


@dataclass(frozen=True, slots=True)
class Step:
    """One committed step of reasoning, or of the answer.

    text:         what was kept; None without a tokenizer
    slice:        the slice that finished it
    phase:        `thinking` or `answer`
    score:        the lowest probability that `scorer` gave a token of the last draft of this step;
                  None if nobody scored it
    mean_score:   the geometric mean of those probabilities
    decision:     `accept`      drafted, scored and kept whole
                  `unverified`  drafted and kept without a score
                  `refresh`     kept like `accept`; then the cache was made the verifier's
                  `rewrite`     kept up to a token, from there on written by the verifier
                  `escalate`    drafts dropped, written by the verifier, the last slice left
                  `lead`        written by the verifier, which was handed the lead
                  `verified`    token by token: drafted or not, drawn as the verifier would have
                  `written`     written by a slice without a draft
                  `forced`      the end of a thought, which nobody wrote
    drafter:      the slice that drafted it last; `slice` where nothing was drafted
    scorer:       the slice that scored the last draft
    tokens:       number of kept tokens; drafted_tokens: of those, how many were drafted
    milliseconds: wall time from the draft's start to the commit, waiting for other rows included
    retracted:    the text of drafted tokens that were dropped, in their order
    """

    index: int
    text: str | None
    token_ids: tuple[int, ...]
    slice: str
    phase: Phase
    score: float | None
    mean_score: float | None
    decision: StepDecision
    drafter: str
    drafted_tokens: int
    milliseconds: float
    retracted: str | None = None
    retracted_ids: tuple[int, ...] = ()
    scorer: str | None = None

    @property
    def tokens(self) -> int:
        return len(self.token_ids)


@dataclass(frozen=True, slots=True)
class Usage:
    """Token counts of one request.

    prompt, reasoning, answer: tokens of each part; `</think>` counts as reasoning
    drafted:    tokens proposed by drafting slices; accepted: of those, how many were kept
    rewritten:  kept tokens that the verifying slice wrote in place of a rejected draft
    unverified: of the accepted ones, those that no other slice has scored
    by_slice:  kept tokens by the slice that wrote them; thinking_by_slice: of the reasoning alone
    """

    prompt: int
    reasoning: int
    answer: int
    drafted: int
    accepted: int
    rewritten: int
    by_slice: Mapping[str, int]
    thinking_by_slice: Mapping[str, int]
    unverified: int = 0

    @property
    def completion(self) -> int:
        return self.reasoning + self.answer


@dataclass(frozen=True, slots=True)
class Metrics:
    """Times and work of one request.

    seconds:          wall time from its first pass to its last
    tokens_per_second: kept tokens over `seconds`
    acceptance_rate:  accepted / drafted tokens; None where nothing was drafted
    mean_accepted:    accepted tokens per draft; None where nothing was drafted
    passes, ran, bytes: forward passes this request took part in, its tokens in them (prompt, drafts
                      and verification included), and bytes of weights that those passes read
                      (expected distinct experts, each read once a pass), by slice
    refreshed:        tokens run again to make the cache exact, at a switch or before a verification
    refresh_seconds:  what the former took; the latter is part of its verifying pass
    """

    seconds: float
    tokens_per_second: float
    acceptance_rate: float | None
    mean_accepted: float | None
    passes: Mapping[str, int]
    bytes: Mapping[str, int]
    ran: Mapping[str, int] = field(default_factory=dict)
    refreshed: int = 0
    refresh_seconds: float = 0.0


@dataclass(frozen=True, slots=True)
class Candidate:
    """One of several drafts that a strategy chose from.

    score: what it was chosen by, None where nobody judged it; chosen: whether it became the result
    """

    answer: str | None
    text: str | None
    token_ids: tuple[int, ...]
    score: float | None
    chosen: bool


@dataclass(frozen=True, slots=True)
class Result:
    """The outcome of one prompt.

    answer:    text after the end of thinking, stripped; reasoning: text before it
    text:      everything that was generated, without the final end token or stop string
    Text fields are None for a checkpoint without a tokenizer.
    finish_reason: `stop` (end token or stop string), `length` (max_tokens or the cache), `error`
    logprobs:  for each generated token, its log-probability and those of the most likely ones,
               where `SamplingParams.logprobs` asked for them: under the slice that verified it, or
               that wrote it where none did, at temperature 1 and before any filter
    samples:   with `n` > 1, all samples, this first one included
    candidates: the drafts that `explore` chose from
    """

    prompt: str | None
    prompt_token_ids: tuple[int, ...]
    answer: str | None
    reasoning: str | None
    text: str | None
    token_ids: tuple[int, ...]
    finish_reason: FinishReason
    steps: tuple[Step, ...]
    usage: Usage
    metrics: Metrics
    seed: int
    logprobs: tuple[Mapping[int, float], ...] | None = None
    error: str | None = None
    candidates: tuple[Candidate, ...] = ()
    samples: tuple[Result, ...] = field(default=(), repr=False)

    def to_dict(self) -> dict[str, Any]:
        """Plain dicts, lists and numbers."""
        data = asdict(self)
        for step, values in zip(self.steps, data["steps"], strict=True):
            values["tokens"] = step.tokens
        return data

    def to_json(self, **kwargs: Any) -> str:
        return json.dumps(self.to_dict(), **kwargs)
