"""What an answer is worth, 0 to 1.

Graders read text. None of them evaluates code from a model: numbers are parsed digit by digit, and
`math` reads LaTeX by a grammar in a process of its own (`mathematics.py`).
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from importlib import import_module
from typing import Any, TypeAlias

from cascade.errors import CascadeError, RequestError, unknown
from cascade.evaluation.mathematics import MathJudge
from cascade.problems import Problem

Grader: TypeAlias = Callable[[Problem, str | None], float]

CLOSE = 1e-6  # relative difference of equal numbers

_BOXED = re.compile(r"\\boxed\s*\{((?:[^{}]|\{[^{}]*\})*)\}")
_CUE = re.compile(r"(?:####|answer\s*(?:is|:|=)|\*\*answer:?\*\*)\s*:?\s*(.+)", re.IGNORECASE)
_NUMBER = re.compile(
    r"(?<![\w.])[-+−]?\s?[$€£]?\s?(?:\d{1,3}(?:,\d{3})+|\d+)?(?:\.\d+|(?<=\d)\.?)"
    r"(?:[eE][-+]?\d{1,3})?(?:\s*/\s*\d+)?\s?%?"
)
_FRACTION = re.compile(r"\\[dt]?frac\s*\{\s*(\d+)\s*\}\s*\{\s*(\d+)\s*\}")
_LEADING = re.compile(r"\s*(\(?[A-Z]\)|[A-Z][.:]|\*\*[A-Z]\*\*)(?:\s|$)")
# A capital that stands alone; `A train` and `I think` are words.
_LETTER = re.compile(r"(?<![A-Za-z0-9])(?![AI] [a-z])([A-Z])(?![A-Za-z0-9'’])")


def exact(problem: Problem, answer: str | None) -> float:
    """The same text, blanks at both ends aside."""
    return float(answer is not None and answer.strip() == problem.answer.strip())


def numeric(problem: Problem, answer: str | None) -> float:
    """The same number, to 1e-6 of itself: the boxed one, the announced one, or the last one."""
    right = number_in(problem.answer)
    if right is None:
        raise RequestError(f"problem {problem.id!r}: its answer {problem.answer!r} is no number")
    found = number_in(answer or "")
    return float(found is not None and math.isclose(found, right, rel_tol=CLOSE, abs_tol=1e-12))


def choice(problem: Problem, answer: str | None) -> float:
    """The letter of the right choice: the boxed one, the announced one, or the last one.

    The text of a choice counts as its letter, where it is the whole answer.
    """
    text = (answer or "").strip()
    for letter, option in zip("ABCDEFGHIJKLMNOPQRSTUVWXYZ", problem.choices, strict=False):
        if text == option.strip():
            return float(letter == problem.answer)
    leading = _LEADING.match(text)
    for part in (*_places(text)[:-1], *([leading[1]] if leading else []), text):
        letters = [m for m in _LETTER.findall(part) if not problem.choices or _is_one(m, problem)]
        if letters:
            return float(letters[0 if part is not text else -1] == problem.answer)
    return 0.0


def own(problem: Problem, answer: str | None) -> float:
    """The score by the grader that the problem's source brought, reasoning-gym's for example."""
    return problem.score(answer)


def auto(problem: Problem, answer: str | None) -> float:
    """The source's own grader, `choice` for multiple choice, otherwise `exact`."""
    if problem.grader is not None:
        return own(problem, answer)
    return (choice if problem.choices else exact)(problem, answer)


_GRADERS: Mapping[str, Grader] = {
    "auto": auto,
    "exact": exact,
    "numeric": numeric,
    "choice": choice,
    "reasoning-gym": own,
}
NAMES = (*_GRADERS, "math")


class Grading:
    """A grader by name or function, and the scores that it still owes.

    grader: one of `NAMES`, `"module:function"`, or a function of a problem and an answer
    `math` runs in a process of its own, beside the engine; close it with `close`.
    """

    def __init__(self, grader: str | Grader | None) -> None:
        self.name = grader if isinstance(grader, str) else "auto"
        self._judge = MathJudge() if grader == "math" else None
        self._grader = _GRADERS["auto"]
        if callable(grader):
            self._grader = grader
            self.name = f"{grader.__module__}:{getattr(grader, '__qualname__', repr(grader))}"
        elif grader is not None and grader != "math":
            self._grader = _GRADERS.get(grader) or _imported(grader)

    def submit(self, problem: Problem, answer: str | None) -> Future[float]:
        """The score, now or later; a Future with the error where the grader raises."""
        if self._judge is not None:
            return self._judge.submit(problem.answer, answer or "")
        done: Future[float] = Future()
        try:
            done.set_result(checked(self._grader(problem, answer)))
        except Exception as error:  # a user's function may raise anything
            done.set_exception(error)
        return done

    def close(self) -> None:
        if self._judge is not None:
            self._judge.close()


def checked(score: Any) -> float:
    """A grader's outcome as a number from 0 to 1. Raises RequestError for anything else."""
    try:
        value = float(score)
    except (TypeError, ValueError):
        raise RequestError(f"a grader returned {score!r}, not a number from 0 to 1") from None
    if not 0 <= value <= 1:
        raise RequestError(f"a grader returned {score!r}, which is not between 0 and 1")
    return value


def number_in(text: str) -> float | None:
    """The number that a text ends in, or announces; None where there is none."""
    for part in _places(text):
        part = _FRACTION.sub(r"\1/\2", part)
        found = [value for m in _NUMBER.finditer(part) if (value := _value(m[0])) is not None]
        if found:
            return found[0 if part is not text and len(found) == 1 else -1]
    return None


def _places(text: str) -> list[str]:
    """Where an answer is looked for, in turn: in the last box, behind the last cue, everywhere."""
    boxed, cued = _BOXED.findall(text), _CUE.findall(text)
    return [*boxed[-1:], *(line.split("\n")[0] for line in cued[-1:]), text]


def _is_one(letter: str, problem: Problem) -> bool:
    return ord(letter) - ord("A") < len(problem.choices)


def _value(text: str) -> float | None:
    digits = re.sub(r"[\s,$€£]", "", text).replace("−", "-")
    percent, digits = digits.endswith("%"), digits.removesuffix("%")
    top, _, bottom = digits.partition("/")
    try:
        value = float(top) / float(bottom or 1)
    except (ValueError, ZeroDivisionError):
        return None
    return value / 100 if percent else value


def _imported(name: str) -> Grader:
    """A user's function by `module:function`."""
    module, found, function = name.partition(":")
    if not found:
        raise RequestError(
            unknown("grader", name, NAMES) + ", or a function of your own as 'module:function'"
        )
    try:
        grader = getattr(import_module(module), function)
    except (ImportError, AttributeError) as error:
        raise RequestError(f"grader {name!r} could not be imported: {error}") from error
    if not callable(grader):
        raise RequestError(f"grader {name!r} is a {type(grader).__name__}, not a function")
    return grader  # type: ignore[no-any-return]


def require_math() -> None:
    """Raises CascadeError where the grader `math` cannot run."""
    try:
        import_module("math_verify")
    except ImportError as error:
        raise CascadeError(
            f"math-verify is not installed ({error}): pip install 'cascade-reasoning[eval]'"
        ) from error
