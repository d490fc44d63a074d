"""A question about a drafted step, answered by the slice that scores it in one token."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from cascade.errors import RequestError
from cascade.text import Codec

Words = Annotated[tuple[Annotated[str, Field(min_length=1)], ...], Field(min_length=1)]


class Judge(BaseModel):
    """What is asked behind a step; nothing of it stays in the sequence.

    question: text put behind the step's last token. Special tokens in it count as such, so it can
              close the thought and be a turn of a chat.
    yes, no:  words whose first tokens are counted as the one answer or the other
    The question's tokens run in the pass that scores the step and are dropped with the drafts, so
    it costs a longer pass. How good the answer is depends on the checkpoint: compare it with the
    other scores before you trust it.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    question: Annotated[str, Field(min_length=1)] = "\nIs that right? Answer yes or no: "
    yes: Words = ("yes", "Yes", " yes", " Yes")
    no: Words = ("no", "No", " no", " No")

    def ask(self, codec: Codec) -> Question:
        """The question in token ids.

        Raises RequestError where it cannot be put: without a tokenizer, with words it has no tokens
        for, or where all answers begin with the same token.
        """
        if codec.tokenizer is None:
            raise RequestError(
                "the judge's question needs a tokenizer, and this checkpoint has none; "
                "use another score"
            )
        ids = codec.encode(self.question)
        unknown = codec.tokenizer.unk_token_id
        if unknown is not None and unknown in ids:
            raise RequestError(
                f"the tokenizer has no tokens for all of the judge's question {self.question!r}; "
                "give Stepwise(judge=Judge(question=...)) one in its own words"
            )
        yes, no = ({codec.encode(word)[0] for word in words} for words in (self.yes, self.no))
        shared = yes & no | {unknown}  # a space, where spaces are tokens
        if not yes - shared or not no - shared:
            raise RequestError(
                f"the judge's answers yes={self.yes} and no={self.no} cannot be told apart by "
                "their first tokens; choose other words"
            )
        return Question(tuple(ids), tuple(sorted(yes - shared)), tuple(sorted(no - shared)))


@dataclass(frozen=True, slots=True)
class Question:
    """The ids of the question, and those that begin either answer."""

    ids: tuple[int, ...]
    yes: tuple[int, ...]
    no: tuple[int, ...]

    def answer(self, row: Tensor) -> float:
        """Probability of yes, given yes or no, under logits [V] behind the question."""
        yes, no = row[list(self.yes)].logsumexp(0), row[list(self.no)].logsumexp(0)
        return float((yes - no).sigmoid())
