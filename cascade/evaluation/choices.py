"""Multiple choice: which letter is right, and an order of the options that gives nothing away."""

from __future__ import annotations

import random
from collections.abc import Sequence as Seq
from dataclasses import replace
from string import ascii_uppercase

from cascade.errors import ProblemError
from cascade.problems import Problem


def letter_of(answer: str, choices: Seq[str]) -> str:
    """The letter of the right choice, which `answer` names by its text or by its letter.

    Raises ProblemError where it names none, and for choices that are no choice.
    """
    if not 2 <= len(choices) <= len(ascii_uppercase):
        raise ProblemError(f"{len(choices)} choices; there must be 2 to {len(ascii_uppercase)}")
    if len(set(choices)) < len(choices):
        raise ProblemError("two of the choices are the same")
    if answer in choices:
        return ascii_uppercase[list(choices).index(answer)]
    letter = answer.strip().upper()
    if len(letter) == 1 and letter in ascii_uppercase[: len(choices)]:
        return letter
    raise ProblemError(f"answer {answer!r} is none of the choices, nor a letter of one")


def shuffled(problem: Problem, seed: int) -> Problem:
    """The problem with its choices in an order drawn from (seed, id).

    `facts["permutation"]`: for each place, the number of the choice in the source's order.
    """
    order = list(range(len(problem.choices)))
    random.Random(f"{seed}/{problem.id}").shuffle(order)
    right = order.index(ascii_uppercase.index(problem.answer))
    return replace(
        problem,
        answer=ascii_uppercase[right],
        choices=tuple(problem.choices[i] for i in order),
        facts={**problem.facts, "permutation": order},
    )
