"""Problems with known answers, and reasoning-gym's procedural tasks by name, size and seed.

The tasks need the extra `eval`.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from itertools import count, islice
from string import ascii_uppercase
from typing import Any

from cascade.errors import CascadeError, RequestError, unknown

# The kinds that nano was trained on, with the settings that narrow them (none: the defaults).
NANO_KINDS: Mapping[str, Mapping[str, Any]] = {
    "chain_sum": {},
    "basic_arithmetic": {"max_terms": 3, "max_digits": 2},
    "gcd": {},
    "lcm": {},
    "simple_equations": {"max_terms": 3},
    "base_conversion": {},
}


@dataclass(frozen=True, slots=True)
class Problem:
    """A question and the answer it should get.

    id:      unique in a set of problems; kind: what it is compared with, a task's name for example
    choices: the options of a multiple-choice question as they are shown; `answer` is the letter
    ask:     what is said under the question: how to answer it
    facts:   what its source recorded about it, the permutation of the choices for example
    grader:  the source's own score of an answer, 0 to 1, where it brings one
    """

    id: str
    question: str
    answer: str
    kind: str = ""
    choices: tuple[str, ...] = ()
    ask: str = ""
    facts: Mapping[str, Any] = field(default_factory=dict)
    grader: Callable[[str | None], float] | None = field(default=None, repr=False, compare=False)

    @property
    def prompt(self) -> str:
        """What the model is asked: the question, the lettered choices, and how to answer."""
        letters = ascii_uppercase[: len(self.choices)]
        lines = [f"{letter}) {text}" for letter, text in zip(letters, self.choices, strict=True)]
        parts = (self.question, "\n".join(lines), self.ask)
        return "\n\n".join(part for part in parts if part)

    @property
    def described(self) -> dict[str, Any]:
        """Everything but the grader, as JSON has it."""
        return {
            "id": self.id,
            "question": self.question,
            "answer": self.answer,
            "kind": self.kind,
            "choices": list(self.choices),
            "ask": self.ask,
            "facts": dict(self.facts),
        }

    def score(self, answer: str | None) -> float:
        """The source's own score of an answer, 0 to 1; 1 is solved. Raises RequestError."""
        if self.grader is None:
            raise RequestError(f"problem {self.id!r} comes without a grader of its own")
        return float(self.grader(answer))


def make(kind: str, size: int, seed: int, **settings: Any) -> list[Problem]:
    """`size` problems of one kind. Raises RequestError for an unknown kind."""
    return list(islice(stream(kind, seed, **settings), size))


def stream(kind: str, seed: int, **settings: Any) -> Iterator[Problem]:
    """Problems of one kind without end, each made when it is asked for."""
    gym = _gym()
    if kind not in gym.factory.DATASETS:
        raise RequestError(unknown("reasoning-gym task", kind, gym.factory.DATASETS))
    try:
        dataset = gym.create_dataset(kind, seed=seed, size=1_000_000_000, **settings)
    except (AssertionError, TypeError, ValueError) as error:
        raise RequestError(f"reasoning-gym task {kind!r} refuses {settings}: {error}") from error
    for i in count():
        entry = dataset[i]
        yield Problem(
            id=f"{kind}-{seed}-{i}",
            kind=kind,
            question=entry["question"],
            answer=str(entry["answer"]),
            grader=partial(dataset.score_answer, entry=entry),
        )


def held_out(question: str) -> bool:
    """Whether nano's training refused this question: one in sixteen, by checksum."""
    return zlib.crc32(question.encode()) % 16 == 0


def nano_problems(size: int, seed: int) -> list[Problem]:
    """`size` problems that nano was never trained on, its kinds in turn."""
    streams = [
        (p for p in stream(kind, seed, **settings) if held_out(p.question))
        for kind, settings in NANO_KINDS.items()
    ]
    return [next(streams[i % len(streams)]) for i in range(size)]


def _gym() -> Any:
    try:
        import reasoning_gym
    except ImportError as error:
        raise CascadeError(
            f"reasoning-gym is not installed ({error}): pip install 'cascade-reasoning[eval]'"
        ) from error
    return reasoning_gym
