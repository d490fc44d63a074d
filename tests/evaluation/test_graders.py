"""What answers are worth, and that no answer is ever run."""

from pathlib import Path

import pytest

from cascade.errors import RequestError
from cascade.evaluation.graders import Grading, number_in
from cascade.problems import Problem, make


def grade(
    grader: object, reference: str, answer: str | None, choices: tuple[str, ...] = ()
) -> float:
    grading = Grading(grader)  # type: ignore[arg-type]
    try:
        return grading.submit(Problem("p", "?", reference, choices=choices), answer).result()
    finally:
        grading.close()


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("The answer is 1,234.", 1234), ("\\boxed{\\frac{3}{4}}", 0.75), ("it costs $18", 18),
        ("#### -5", -5), ("x = 3/4", 0.75), ("1e5", 1e5), ("about 50%", 0.5), ("5.", 5),
        ("Answer: 12 apples, of 30", 30), ("= 7\nso 7.", 7), ("−3", -3), ("none", None), ("", None),
        ("I had 3, then 4.\n**Answer:** 7", 7), ("v2 gives \\boxed{10} of 20", 10), ("1/0", None),
    ],
)  # fmt: skip
def test_the_number_of_an_answer(text: str, number: float | None) -> None:
    assert number_in(text) == number


@pytest.mark.parametrize(
    ("grader", "reference", "answer", "score"),
    [
        ("exact", "42", " 42\n", 1), ("exact", "42", "42.0", 0), ("exact", "42", None, 0),
        ("numeric", "42", "so it is 42.0", 1), ("numeric", "0.333333", "1/3", 1),
        ("numeric", "42", "41", 0), ("numeric", "42", None, 0), ("numeric", "1", "9e999", 0),
    ],
)  # fmt: skip
def test_exact_and_numeric(grader: str, reference: str, answer: str | None, score: float) -> None:
    assert grade(grader, reference, answer) == score


@pytest.mark.parametrize(
    ("answer", "score"),
    [
        ("B", 1), ("(B)", 1), ("The answer is B", 1), ("\\boxed{B}", 1), ("**B**", 1),
        ("I think A, but then: the answer is (B).", 1), ("B) because A is wrong", 1),
        ("A train leaves, I say B", 1), ("fish", 1), ("ant", 0), ("A", 0), ("", 0), (None, 0),
        ("The answer is Z", 0), ("Bring C", 0),
    ],
)  # fmt: skip
def test_multiple_choice(answer: str | None, score: float) -> None:
    assert grade("choice", "B", answer, ("bird", "fish", "ant")) == score
    assert grade(None, "B", answer, ("bird", "fish", "ant")) == score  # what `auto` picks


def test_math_is_judged_by_math_verify_and_never_run(tmp_path: Path) -> None:
    trap = tmp_path / "ran"
    cases = [
        ("\\frac{1}{2}", "0.5", 1), ("1/2", "So $\\frac{2}{4}$.", 1),
        ("x^2+1", "\\boxed{1+x^2}", 1),
        ("2\\sqrt{3}", "\\sqrt{12}", 1), ("3", "4", 0), ("7", "so\nit is 7.", 1), ("7", "", 0),
        ("7", f"__import__('pathlib').Path({str(trap)!r}).touch()", 0),
        ("7", f"\\boxed{{__import__('os').system('touch {trap}')}}", 0),
    ]  # fmt: skip
    grading = Grading("math")
    try:
        owed = [grading.submit(Problem("p", "?", r), a) for r, a, _ in cases]
        assert [f.result() for f in owed] == [score for _, _, score in cases]
    finally:
        grading.close()
    assert not trap.exists()


def test_a_comparison_that_never_ends_is_cut_off_and_the_next_one_is_made() -> None:
    grading = Grading("math")
    judge = grading._judge
    assert judge is not None
    try:
        assert grading.submit(Problem("p", "?", "1"), "1").result() == 1
        judge.seconds = 0.3
        endless = "9^{" * 5 + "9" + "}" * 5
        assert grading.submit(Problem("p", "?", "1"), endless).result() == 0
        assert judge.restarts == 1
        assert grading.submit(Problem("p", "?", "1"), "1").result() == 1
    finally:
        grading.close()


def test_reasoning_gym_grades_its_own_problems() -> None:
    [problem] = make("chain_sum", 1, seed=3)
    for grader in (None, "reasoning-gym"):
        assert Grading(grader).submit(problem, problem.answer).result() == 1
    with pytest.raises(RequestError, match="without a grader"):
        grade("reasoning-gym", "1", "1")


def test_a_function_of_ones_own_is_checked() -> None:
    assert grade(lambda problem, answer: len(answer or "") / 4, "x", "ab") == 0.5
    assert grade(lambda problem, answer: answer == "x", "x", "x") == 1
    for wrong in ("high", 2, float("nan"), None):
        with pytest.raises(RequestError, match="a grader returned"):
            grade(lambda problem, answer, wrong=wrong: wrong, "x", "x")
    with pytest.raises(ZeroDivisionError):
        grade(lambda problem, answer: 1 / 0, "x", "x")


def test_graders_have_names_and_unknown_ones_list_them() -> None:
    assert grade("cascade.evaluation.graders:exact", "1", "1") == 1
    with pytest.raises(RequestError, match=r"did you mean 'numeric'.*module:function"):
        Grading("numerik")
    with pytest.raises(RequestError, match="could not be imported"):
        Grading("no_such_module:grade")
    with pytest.raises(RequestError, match="not a function"):
        Grading("cascade.evaluation.graders:CLOSE")
    with pytest.raises(RequestError, match="is no number"):
        grade("numeric", "many", "3")
