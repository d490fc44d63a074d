"""Problems with known answers: reasoning-gym's procedural tasks, made by name, size and seed.

Needs the extra `eval`.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import count, islice
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
    """A question, its answer, and the grader that reasoning-gym brings for it."""

    id: str
    kind: str
    question: str
    answer: str
    entry: Mapping[str, Any] = field(repr=False)
    dataset: Any = field(repr=False)

    def score(self, answer: str | None) -> float:
        """reasoning-gym's own score of an answer, 0 to 1; 1 is solved."""
        return float(self.dataset.score_answer(answer, self.entry))


def make(kind: str, size: int, seed: int, **settings: Any) -> list[Problem]:
    """`size` problems of one kind. Raises RequestError for an unknown kind."""
    return list(islice(stream(kind, seed, **settings), size))


def stream(kind: str, seed: int, **settings: Any) -> Iterator[Problem]:
    """Problems of one kind without end, each made when it is asked for."""
    gym = _gym()
    if kind not in gym.factory.DATASETS:
        raise RequestError(unknown("reasoning-gym task", kind, gym.factory.DATASETS))
    dataset = gym.create_dataset(kind, seed=seed, size=1_000_000_000, **settings)
    for i in count():
        entry = dataset[i]
        yield Problem(
            id=f"{kind}-{seed}-{i}",
            kind=kind,
            question=entry["question"],
            answer=entry["answer"],
            entry=entry,
            dataset=dataset,
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
