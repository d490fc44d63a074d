"""Problems from a file with one JSON object a line: `question`, `answer`, `choices`, `id`."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cascade.errors import ProblemError
from cascade.evaluation.choices import letter_of, shuffled
from cascade.problems import Problem


def read_problems(path: Path, *, limit: int | None = None, seed: int | None = 0) -> list[Problem]:
    """The problems of a file, at most `limit`.

    seed: choices are shuffled under it; None leaves them in the file's order
    Raises ProblemError naming the line for whatever is wrong with one.
    """
    found: list[Problem] = []
    lines: dict[str, int] = {}
    try:
        with path.open(encoding="utf-8-sig") as file:
            for number, line in enumerate(file, 1):
                if limit is not None and len(found) >= limit:
                    break
                if not line.strip():
                    continue
                where = f"{path}, line {number}"
                problem = problem_of(_parsed(line, where), where, f"{path.stem}-{number}", seed)
                if problem.id in lines:
                    raise ProblemError(
                        f"{where}: id {problem.id!r} stands in line {lines[problem.id]} already"
                    )
                lines[problem.id] = number
                found.append(problem)
    except FileNotFoundError:
        raise ProblemError(f"there is no file {path}") from None
    except UnicodeDecodeError as error:
        raise ProblemError(f"{path} is not UTF-8 text: {error}") from None
    except OSError as error:
        raise ProblemError(f"{path} could not be read: {error}") from error
    if not found:
        raise ProblemError(f"{path} holds no problems")
    return found


def problem_of(data: Any, where: str, id: str, seed: int | None = 0) -> Problem:
    """A problem from a mapping; `id` is used where it has none. Raises ProblemError."""
    if not isinstance(data, Mapping):
        raise ProblemError(f"{where}: {_brief(data)} is not an object with a question")
    for field in ("question", "answer"):
        if field not in data:
            raise ProblemError(f"{where}: no {field!r}; it has {', '.join(map(str, data)) or '-'}")
    question = data["question"]
    if not isinstance(question, str) or not question.strip():
        raise ProblemError(f"{where}: the question is {_brief(question)}, not a text")
    if isinstance(data["answer"], bool) or not isinstance(data["answer"], (str, int, float)):
        raise ProblemError(f"{where}: the answer is {_brief(data['answer'])}, not text or a number")
    answer, choices = str(data["answer"]), data.get("choices") or ()
    if not isinstance(choices, (list, tuple)):
        raise ProblemError(f"{where}: choices are {_brief(choices)}, not a list")
    choices = tuple(map(str, choices))
    if choices:
        try:
            answer = letter_of(answer, choices)
        except ProblemError as error:
            raise ProblemError(f"{where}: {error}") from None
    problem = Problem(
        id=str(data.get("id", id)),
        question=question,
        answer=answer,
        kind=str(data.get("kind", "")),
        choices=choices,
    )
    return shuffled(problem, seed) if choices and seed is not None else problem


def _parsed(line: str, where: str) -> Any:
    try:
        return json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ProblemError(f"{where} is not JSON: {error}") from None


def _brief(value: Any) -> str:
    text = repr(value)
    return text if len(text) < 60 else text[:57] + "..."
