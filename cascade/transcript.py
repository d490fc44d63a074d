"""What a request has generated: ids, the slice that wrote each, its phase, and the text of it all.

Ids, text and log-probabilities are cut in one place, where generation ends (`Transcript.fit`).
"""

from __future__ import annotations

from collections.abc import Mapping
from collections.abc import Sequence as Seq
from copy import copy
from dataclasses import dataclass
from typing import TypeAlias

from cascade.policies import Phase
from cascade.sampling import SamplingParams
from cascade.text import Codec

Logprobs: TypeAlias = Mapping[int, float]

WINDOW = 16  # ids before new ones that their text may depend on
UNFINISHED = "\ufffd"  # what a part of a character decodes to


@dataclass(frozen=True, slots=True)
class Fit:
    """How many ids fit before generation ends, whether it does, and the length of the text then."""

    count: int
    ends: bool = False
    cut: int | None = None  # None unless a stop string cuts the text


class Transcript:
    """The generated part of one request.

    ids, authors, phases: one each per generated token; both thinking tags belong to the thought
    phase:   that of the next token
    thought: number of tokens of the thought
    text:  of all ids but a final end token, and without a stop string; None without a tokenizer.
           A character whose tokens are not all there yet is left out until they are.
    """

    def __init__(self, codec: Codec, params: SamplingParams, prompt_ids: Seq[int]) -> None:
        self.codec, self.params = codec, params
        self.ids: list[int] = []
        self.authors: list[str] = []
        self.phases: list[Phase] = []
        self.logprobs: list[Logprobs] = []
        self.phase: Phase = "thinking" if codec.thinks_at(prompt_ids) else "answer"
        self.thought = 0
        self.cut: int | None = None
        self._text = ""
        self._decoded = 0  # ids whose text is in `_text`
        self._answer_at: int | None = None  # length of the text up to the end of the thought
        self._search_from = 0  # no stop string begins before: `min_tokens` forbids it
        self._silent = frozenset() if params.ignore_eos else codec.end_ids
        self._ends = self._silent | frozenset(params.stop_token_ids)

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def text(self) -> str | None:
        return None if self.codec.tokenizer is None else self._text[: self.cut]

    def fit(self, ids: Seq[int]) -> Fit:
        """How many of these ids to keep: up to and with the first that ends generation."""
        if self.params.max_tokens is not None:
            ids = ids[: max(self.params.max_tokens - len(self), 0)]
        numbered = enumerate(ids, len(self) + 1)
        early = self.params.min_tokens
        ends = (n - len(self) for n, token in numbered if token in self._ends and n > early)
        count = next(ends, None)
        if count is None:
            return self._stop_string(ids) or Fit(len(ids))
        return self._stop_string(ids[: count - 1]) or Fit(count, ends=True)

    def add(self, ids: Seq[int], author: str, logprobs: Seq[Logprobs] = (), *, last: bool) -> None:
        """Take in committed ids; `last` says that generation ends with them."""
        self.logprobs += logprobs
        for token in ids:
            if token == self.codec.think_id and self.codec.has_thoughts:
                self.phase, self._answer_at = "thinking", None
            self.ids.append(token)
            self.authors.append(author)
            self.phases.append(self.phase)
            self.thought += self.phase == "thinking"
            if token == self.codec.end_think_id:
                if self._answer_at is None:  # a thought, opened or not
                    self.phases = ["thinking"] * len(self)
                    self.thought = len(self)
                self._decode(final=True)
                self.phase, self._answer_at = "answer", len(self._text)
            if len(self) == self.params.min_tokens:
                self._search_from = self._length_with(self.ids)
        if last and self.ids and self.ids[-1] in self._silent:
            self._decode(final=True, end=len(self.ids) - 1)
        self._decode(final=last)

    def parts(self) -> tuple[str | None, str | None]:
        """Reasoning and answer."""
        text = self.text
        if text is None:
            return None, None
        if self._answer_at is not None and self._answer_at <= len(text):
            thought, answer = text[: self._answer_at], text[self._answer_at :]
        elif "thinking" in self.phases:
            thought, answer = text, ""
        else:
            thought, answer = "", text
        thought = thought.removeprefix(self.codec.think).removesuffix(self.codec.end_think)
        return thought.strip("\n"), answer.strip()

    @property
    def may_be_cut(self) -> bool:
        """Whether the text ends in what may be the beginning of a stop string."""
        ends = (stop[:n] for stop in self.params.stop for n in range(1, len(stop)))
        return any(map(self._text.endswith, ends))

    def copy(self) -> Transcript:
        """An independent transcript that goes on from here."""
        new = copy(self)
        new.ids, new.authors = list(self.ids), list(self.authors)
        new.phases, new.logprobs = list(self.phases), list(self.logprobs)
        return new

    # ---- inside ----

    def _stop_string(self, ids: Seq[int]) -> Fit | None:
        """Where the first stop string is complete, if one is."""
        if not self.params.stop or self._found(ids) is None:
            return None
        for count in range(1, len(ids) + 1):
            cut = self._found(ids[:count])
            if cut is not None:
                return Fit(count, ends=True, cut=cut)
        return None

    def _found(self, ids: Seq[int]) -> int | None:
        """Where the first stop string begins in the text with these ids; None without one."""
        text = self._text + self._new_text([*self.ids, *ids], len(self) + len(ids))
        early = self.params.min_tokens - len(self)
        start = self._search_from
        if early > 0:
            if early >= len(ids):
                return None
            start = self._length_with([*self.ids, *ids[:early]])
        longest = max(map(len, self.params.stop))
        start = max(start, len(self._text) - longest + 1)
        places = [text.find(stop, start) for stop in self.params.stop]
        return min((place for place in places if place >= 0), default=None)

    def _new_text(self, ids: Seq[int], end: int) -> str:
        """Text of ids [_decoded, end), as it reads behind those before."""
        if end <= self._decoded or self.codec.tokenizer is None:
            return ""
        before = ids[max(self._decoded - WINDOW, 0) : self._decoded]
        known = self.codec.decode(before) or ""
        whole = self.codec.decode([*before, *ids[self._decoded : end]]) or ""
        return whole[len(known) :]

    def _length_with(self, ids: Seq[int]) -> int:
        """Length of the text of ids, without a character that is not whole."""
        return len(self._text) + len(self._new_text(ids, len(ids)).rstrip(UNFINISHED))

    def _decode(self, *, final: bool, end: int | None = None) -> None:
        """Take in the text of ids up to `end`, or to the last whole character before."""
        end = len(self.ids) if end is None else end
        new = self._new_text(self.ids, end)
        while not final and new.endswith(UNFINISHED):
            end -= 1
            new = self._new_text(self.ids, end)
        self._text += new
        self._decoded = max(self._decoded, len(self.ids) if final else end)
