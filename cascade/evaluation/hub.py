"""Problems from Hugging Face datasets, loaded when they are asked for. Needs the extra `eval`.

Presets know the columns and the wording of GSM8K, MATH-500, AIME and GPQA. Code from a dataset is
never run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

from cascade.errors import CascadeError, ProblemError, unknown
from cascade.evaluation.lines import problem_of
from cascade.evaluation.retries import Retries
from cascade.problems import Problem

BOXED = "Reason step by step, and put the final answer in \\boxed{}."
LETTER = "Reason step by step, and put the letter of the right choice in \\boxed{}."


@dataclass(frozen=True)
class Preset:
    """A dataset whose columns and wording are known.

    read: makes `question`, `answer`, and where there are any `choices` and `id`, of a row
    grader: name of the grader that fits its answers; ask: what is said under each question
    """

    path: str
    split: str
    grader: str
    read: Callable[[Mapping[str, Any]], dict[str, Any]]
    config: str | None = None
    ask: str = BOXED


def _gsm8k(row: Mapping[str, Any]) -> dict[str, Any]:
    return {"question": row["question"], "answer": row["answer"].rpartition("####")[2].strip()}


def _math(row: Mapping[str, Any]) -> dict[str, Any]:
    found = {"question": row["problem"], "answer": str(row["answer"])}
    return found | ({"id": str(row["unique_id"])} if "unique_id" in row else {})


def _gpqa(row: Mapping[str, Any]) -> dict[str, Any]:
    wrong = [row[f"Incorrect Answer {i}"].strip() for i in (1, 2, 3)]
    right = row["Correct Answer"].strip()
    found = {"question": row["Question"].strip(), "answer": right, "choices": [right, *wrong]}
    return found | ({"id": str(row["Record ID"])} if "Record ID" in row else {})


PRESETS: Mapping[str, Preset] = {
    "gsm8k": Preset("openai/gsm8k", "test", "numeric", _gsm8k, config="main"),
    "math-500": Preset("HuggingFaceH4/MATH-500", "test", "math", _math),
    "aime": Preset("HuggingFaceH4/aime_2024", "train", "numeric", _math),
    "aime25": Preset("math-ai/aime25", "test", "numeric", _math),
    "gpqa": Preset("Idavidrein/gpqa", "train", "choice", _gpqa, config="gpqa_diamond", ask=LETTER),
}


def load_preset(
    name: str,
    *,
    path: str | None = None,
    limit: int | None = None,
    seed: int | None = 0,
    retries: Retries | None = None,
) -> list[Problem]:
    """The problems of a preset, at most `limit`.

    path: read them from this directory or Hub id, of the same columns
    Raises ProblemError where the Hub cannot be reached, or a row is not as expected.
    """
    if name not in PRESETS:
        raise ProblemError(unknown("dataset preset", name, PRESETS))
    preset = PRESETS[name]
    rows = _rows(path or preset.path, preset.config, preset.split, limit, retries or Retries())
    return [_problem(row, name, i, preset.read, preset.ask, seed) for i, row in enumerate(rows)]


def load_dataset(
    path: str,
    *,
    config: str | None = None,
    split: str = "test",
    columns: Mapping[str, str] | None = None,
    limit: int | None = None,
    seed: int | None = 0,
    retries: Retries | None = None,
) -> list[Problem]:
    """The problems of any dataset with a column for questions and one for answers.

    columns: its names for `question`, `answer`, `choices` and `id`, where they are others
    """
    names = {field: field for field in ("question", "answer", "choices", "id")} | dict(
        columns or {}
    )

    def read(row: Mapping[str, Any]) -> dict[str, Any]:
        missing = [names[field] for field in ("question", "answer") if names[field] not in row]
        if missing:
            raise KeyError(missing[0])
        return {field: row[name] for field, name in names.items() if row.get(name) is not None}

    name = path.rstrip("/").rpartition("/")[2]
    rows = _rows(path, config, split, limit, retries or Retries())
    return [_problem(row, name, i, read, "", seed) for i, row in enumerate(rows)]


def _problem(
    row: Mapping[str, Any],
    name: str,
    number: int,
    read: Callable[[Mapping[str, Any]], dict[str, Any]],
    ask: str,
    seed: int | None,
) -> Problem:
    where = f"dataset {name}, row {number}"
    try:
        data = read(row)
    except (KeyError, AttributeError, TypeError) as error:
        raise ProblemError(
            f"{where} has no column {error}; it has {', '.join(row)}. Name the columns with "
            "columns={'question': ..., 'answer': ...}"
        ) from None
    data = {"kind": name, "id": f"{name}-{number}", **data}
    return replace(problem_of(data, where, "", seed), ask=ask)


def _rows(
    path: str, config: str | None, split: str, limit: int | None, retries: Retries
) -> list[Mapping[str, Any]]:
    """Rows of a split, streamed, so that no more is fetched than is asked for."""
    try:
        import datasets
    except ImportError as error:
        raise CascadeError(
            f"the library datasets is not installed ({error}): pip install "
            "'cascade-reasoning[eval]'"
        ) from error
    local = Path(path).is_dir()

    def fetch() -> list[Mapping[str, Any]]:
        # Offline, what was fetched before is read from the cache, which cannot be streamed.
        streaming = local or not datasets.config.HF_HUB_OFFLINE
        rows: Iterable[Mapping[str, Any]] = datasets.load_dataset(
            path, None if local else config, split=split, streaming=streaming
        )
        return list(islice(rows, limit))

    try:
        rows = retries.call(fetch, f"dataset {path}", _is_transient)
    except CascadeError:
        raise
    except Exception as error:  # whatever datasets, its readers or the network raise
        raise ProblemError(_why(error, path, split, local)) from error
    if not rows:
        raise ProblemError(f"split {split!r} of {path} is empty")
    return rows


def _is_transient(error: BaseException) -> bool:
    """Whether the same call may succeed in a moment."""
    chain: BaseException | None = error
    while chain is not None:
        name = type(chain).__name__
        if "Offline" in name or "NotFound" in name or "Gated" in name:
            return False
        if isinstance(chain, (TimeoutError, ConnectionResetError)) or "Timeout" in name:
            return True
        chain = chain.__cause__ or chain.__context__
    return isinstance(error, ConnectionError) and "Offline" not in str(error)


def _why(error: Exception, path: str, split: str, local: bool) -> str:
    text = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'no message'}"
    if local:
        return f"no split {split!r} could be read from the directory {path} ({text})"
    if isinstance(error, (ConnectionError, TimeoutError)) or "reach" in text or "Offline" in text:
        return (
            f"the Hugging Face Hub could not be reached for dataset {path} ({text}). Where there "
            "is no network, put a copy of the dataset in a directory and name it with "
            "--dataset-path"
        )
    return (
        f"dataset {path}, split {split!r}, could not be loaded ({text}). Gated ones need "
        "`hf auth login` and the owner's consent"
    )
