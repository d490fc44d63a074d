"""Problems from tasks, files and datasets, and what bad ones are told."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cascade.errors import ProblemError, RequestError
from cascade.evaluation import FileSource, GymSource, HubSource
from cascade.evaluation.choices import shuffled
from cascade.evaluation.retries import Retries
from cascade.evaluation.sources import load
from cascade.problems import Problem


def write(path: Path, *lines: Any) -> Path:
    path.write_text("".join(f"{x if isinstance(x, str) else json.dumps(x)}\n" for x in lines))
    return path


# ---- reasoning-gym ----


def test_a_task_gives_the_same_problems_for_the_same_seed() -> None:
    first, facts = load(GymSource(task="chain_sum", size=5, seed=4242))
    again, _ = load(facts)
    assert [p.id for p in first] == [f"chain_sum-4242-{i}" for i in range(5)]
    assert first == again
    assert first[0].score(first[0].answer) == 1


def test_several_tasks_take_turns_with_settings_of_their_own() -> None:
    source = GymSource(task={"chain_sum": {"min_terms": 2, "max_terms": 2}, "gcd": {}}, size=6)
    problems, _ = load(source)
    assert [p.kind for p in problems] == ["chain_sum", "gcd"] * 3
    assert all(len(p.question.split(": ")[1].split()) == 4 for p in problems[::2])  # a + b =


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (GymSource(task="chain_sun"), "did you mean 'chain_sum'"),
        (GymSource(task={"chain_sum": {"min_terms": 9, "max_terms": 2}}), "refuses"),
        (GymSource(task={"chain_sum": {"terms": 9}}), "terms"),
        (GymSource(task=()), "no reasoning-gym task"),
    ],
)
def test_an_unknown_task_or_setting_is_refused(source: GymSource, message: str) -> None:
    with pytest.raises(RequestError, match=message):
        load(source)


# ---- files ----


def test_a_file_gives_questions_answers_ids_and_choices(tmp_path: Path) -> None:
    path = write(
        tmp_path / "mine.jsonl",
        {"question": "1 + 1?", "answer": 2},
        "",
        {"id": "b", "question": "Which?", "answer": "fish", "choices": ["bird", "fish", "ant"]},
    )
    first, second = load(FileSource(path=path))[0]
    assert (first.id, first.answer, first.prompt) == ("mine-1", "2", "1 + 1?")
    assert second.id == "b"
    assert second.choices["ABC".index(second.answer)] == "fish"
    assert f"{second.answer}) fish" in second.prompt
    assert [("bird", "fish", "ant")[i] for i in second.facts["permutation"]] == list(second.choices)


def test_choices_are_left_in_order_where_that_is_asked_for(tmp_path: Path) -> None:
    line = {"question": "?", "answer": "C", "choices": ["x", "y", "both"]}
    [problem], _ = load(FileSource(path=write(tmp_path / "a.jsonl", line), shuffle=False))
    assert problem.choices == ("x", "y", "both") and problem.answer == "C"


@given(st.integers(2, 26), st.data())
def test_a_permutation_keeps_the_right_choice_and_can_be_undone(n: int, data: Any) -> None:
    right = data.draw(st.integers(0, n - 1))
    choices = tuple(f"option {i}" for i in range(n))
    problem = Problem("p", "?", "ABCDEFGHIJKLMNOPQRSTUVWXYZ"[right], choices=choices)
    mixed = shuffled(problem, data.draw(st.integers(0, 9)))
    assert mixed.choices[ord(mixed.answer) - 65] == choices[right]
    order = mixed.facts["permutation"]
    assert [mixed.choices[order.index(i)] for i in range(n)] == list(choices)


def test_the_right_letter_is_spread_over_the_places() -> None:
    """Benchmarks whose answer is always A measure nothing: 400 items, four letters, p > 1e-6."""
    letters = [
        shuffled(Problem(f"p{i}", "?", "A", choices=("a", "b", "c", "d")), 0).answer
        for i in range(400)
    ]
    assert all(60 < letters.count(letter) < 145 for letter in "ABCD")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{oops", "line 2 is not JSON"),
        ("[1, 2]", r"line 2: \[1, 2\] is not an object"),
        ({"question": "?"}, "line 2: no 'answer'; it has question"),
        ({"question": "  ", "answer": "1"}, "line 2: the question is '  '"),
        ({"question": "?", "answer": None}, "line 2: the answer is None"),
        ({"question": "?", "answer": [1]}, "line 2: the answer is"),
        ({"question": "?", "answer": "z", "choices": ["a", "b"]}, "line 2: answer 'z' is none"),
        ({"question": "?", "answer": "a", "choices": ["a"]}, "line 2: 1 choices"),
        ({"question": "?", "answer": "a", "choices": ["a", "a"]}, "two of the choices"),
        ({"question": "?", "answer": "a", "choices": "ab"}, "choices are 'ab', not a list"),
        ({"id": "first", "question": "?", "answer": "1"}, "'first' stands in line 1 already"),
        ("[" * 10_000, "line 2 is not JSON"),
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, line: Any, message: str) -> None:
    path = write(tmp_path / "bad.jsonl", {"id": "first", "question": "?", "answer": "1"}, line)
    with pytest.raises(ProblemError, match=message):
        load(FileSource(path=path))


def test_a_file_that_is_missing_empty_or_no_text_is_named(tmp_path: Path) -> None:
    with pytest.raises(ProblemError, match="there is no file"):
        load(FileSource(path=tmp_path / "none.jsonl"))
    with pytest.raises(ProblemError, match="holds no problems"):
        load(FileSource(path=write(tmp_path / "empty.jsonl", "")))
    (tmp_path / "binary.jsonl").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ProblemError, match="UTF-8"):
        load(FileSource(path=tmp_path / "binary.jsonl"))
    with pytest.raises(ProblemError, match="could not be read"):
        load(FileSource(path=tmp_path))


def test_no_more_is_read_than_is_asked_for(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", {"question": "?", "answer": "1"}, "{never read")
    assert len(load(FileSource(path=path, size=1))[0]) == 1


def test_a_list_of_problems_needs_ids_that_differ() -> None:
    problems, _ = load([{"question": "?", "answer": "1"}, Problem("x", "?", "2")])
    assert [p.id for p in problems] == ["problem-0", "x"]
    with pytest.raises(ProblemError, match="0 and 1 have the same id, 'x'"):
        load([Problem("x", "?", "1"), Problem("x", "?", "2")])
    with pytest.raises(ProblemError, match="there are no problems"):
        load([])
    with pytest.raises(ProblemError, match="is a text"):
        load("chain_sum")  # type: ignore[arg-type]
    with pytest.raises(ProblemError, match="kind"):
        load({"kind": "gim", "task": "chain_sum"})


# ---- datasets: the real library, on directories with the columns that the Hub's have ----


@pytest.fixture
def hub_copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    directory = tmp_path / "copy"
    directory.mkdir()
    return directory


def test_gsm8k_is_read_from_its_columns(hub_copy: Path) -> None:
    row = {"question": "How many?", "answer": "2 + 3 = <<2+3=5>>5\n#### 1,005"}
    write(hub_copy / "test.jsonl", row)
    [problem], facts = load(HubSource(dataset="gsm8k", path=str(hub_copy)))
    assert (problem.id, problem.answer) == ("gsm8k-0", "1,005")
    assert problem.prompt.startswith("How many?") and "\\boxed{}" in problem.prompt
    assert HubSource.model_validate(facts).grader == "numeric"


def test_math_500_and_aime_are_read_from_their_columns(hub_copy: Path) -> None:
    row = {"problem": "x?", "answer": "\\frac{1}{2}", "unique_id": "test/algebra/1.json"}
    write(hub_copy / "test.jsonl", row)
    [problem], _ = load(HubSource(dataset="math-500", path=str(hub_copy)))
    assert (problem.id, problem.answer) == ("test/algebra/1.json", "\\frac{1}{2}")
    (hub_copy / "test.jsonl").unlink()
    write(hub_copy / "train.jsonl", {"problem": "y?", "answer": 73})
    [problem], _ = load(HubSource(dataset="aime", path=str(hub_copy)))
    assert (problem.id, problem.answer) == ("aime-0", "73")


def test_gpqa_shuffles_its_choices_item_by_item(hub_copy: Path) -> None:
    rows = [
        {
            "Question": f"Q{i}?", "Record ID": f"rec{i}", "Correct Answer": f"right {i}\n",
            **{f"Incorrect Answer {n}": f"wrong {n}" for n in (1, 2, 3)},
        }
        for i in range(12)
    ]  # fmt: skip
    write(hub_copy / "train.jsonl", *rows)
    problems, _ = load(HubSource(dataset="gpqa", path=str(hub_copy), seed=1))
    assert len({p.answer for p in problems}) > 1
    for i, p in enumerate(problems):
        assert p.id == f"rec{i}"
        assert p.choices["ABCD".index(p.answer)] == f"right {i}"
        assert p.facts["permutation"].index(0) == "ABCD".index(p.answer)


def test_any_dataset_can_name_its_columns(hub_copy: Path) -> None:
    write(hub_copy / "test.jsonl", {"q": "1?", "a": "1"}, {"q": "2?", "a": "2"})
    columns = {"question": "q", "answer": "a"}
    source = HubSource(dataset="someone/mine", path=str(hub_copy), columns=columns, size=1)
    [problem], _ = load(source)
    assert (problem.question, problem.answer) == ("1?", "1")
    with pytest.raises(ProblemError, match=r"no column 'question'; it has q, a"):
        load(source.model_copy(update={"columns": {}}))


def test_a_hub_that_cannot_be_reached_says_what_to_do() -> None:
    with pytest.raises(ProblemError, match=r"Hub could not be reached.*--dataset-path"):
        load(HubSource(dataset="gsm8k"))  # tests run with HF_HUB_OFFLINE=1


def test_an_unknown_preset_or_split_is_named(hub_copy: Path) -> None:
    with pytest.raises(ProblemError, match="did you mean 'gsm8k'"):
        load(HubSource(dataset="gsm8"))
    write(hub_copy / "test.jsonl", {"question": "?", "answer": "#### 1"})
    with pytest.raises(ProblemError, match="no split 'train'"):
        load(HubSource(dataset="gpqa", path=str(hub_copy)))


def test_a_source_that_times_out_is_asked_again_and_counted() -> None:
    retries, calls = Retries(wait=0.001), []

    def fetch() -> str:
        calls.append(1)
        if len(calls) < 3:
            raise TimeoutError("slow")
        return "rows"

    transient = lambda error: isinstance(error, TimeoutError)  # noqa: E731
    assert retries.call(fetch, "dataset", transient) == "rows"
    assert retries.counts == {"dataset": 2}
    with pytest.raises(ValueError, match="for good"):
        retries.call(lambda: (_ for _ in ()).throw(ValueError("for good")), "dataset", transient)
    assert retries.counts == {"dataset": 2}
