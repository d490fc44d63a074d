"""Elastic budget control on nano: one slice thinks, another answers."""

import pytest

from cascade import Reasoner
from cascade.errors import RequestError, SliceError
from cascade.results import Result
from cascade.strategies import Budget, Single
from cascade.strategies.budget import last_sentence_end
from cascade.task import Task

QUESTION = "State the final answer to the following arithmetic problem: 57 + 87 + 70 - 12 ="


@pytest.fixture(scope="module")
def reasoner() -> Reasoner:
    return Reasoner.from_pretrained("nano", max_batch=4, max_length=384)


def thinking(result: Result) -> list[str]:
    return [step.slice for step in result.steps if step.phase == "thinking"]


def answering(result: Result) -> list[str]:
    return [step.slice for step in result.steps if step.phase == "answer"]


@pytest.mark.parametrize("switch", ["exact", "shared"])
def test_one_slice_thinks_and_another_answers(reasoner: Reasoner, switch: str) -> None:
    result = reasoner.generate(QUESTION, strategy=Budget(switch=switch))
    assert set(thinking(result)) == {"small"}
    assert set(answering(result)) == {"large"}
    assert result.finish_reason == "stop"
    assert result.answer
    if switch == "exact":
        # All but the last token of prompt and thought, which the next pass runs in any case.
        assert result.metrics.refreshed == result.usage.prompt + result.usage.reasoning - 1
        assert result.metrics.refresh_seconds > 0
    else:
        assert result.metrics.refreshed == 0


def test_an_exact_switch_answers_as_the_large_slice_would_after_that_thought(
    reasoner: Reasoner,
) -> None:
    result = reasoner.generate(QUESTION, strategy=Budget(switch="exact"))
    until = next(i for i, s in enumerate(result.steps) if s.phase == "answer")
    thought = [i for step in result.steps[:until] for i in step.token_ids]
    again = reasoner.generate(
        {"prompt_token_ids": [*result.prompt_token_ids, *thought]}, strategy=Single(slice="large")
    )
    assert list(again.token_ids) == list(result.token_ids[len(thought) :])


@pytest.mark.parametrize("budget", [0, 1, 5, 12, 13, 20, 40])
def test_a_thought_keeps_to_its_budget_and_ends_cleanly(reasoner: Reasoner, budget: int) -> None:
    free = reasoner.generate(QUESTION, strategy=Budget())
    result = reasoner.generate(QUESTION, strategy=Budget(budget=budget))
    forced = [s for s in result.steps if s.decision == "forced"]
    written = sum(s.tokens for s in result.steps if s.phase == "thinking") - sum(
        s.tokens for s in forced
    )
    assert written <= budget or not forced
    assert result.text is not None
    assert [s.phase for s in result.steps] == sorted((s.phase for s in result.steps), reverse=True)
    assert "</think>" in result.text
    if written < free.usage.reasoning:
        assert len(forced) == 1
    assert result.answer  # the answering slice speaks, whatever the thought was


def test_a_cut_falls_on_the_end_of_a_line_that_is_near(reasoner: Reasoner) -> None:
    free = reasoner.generate(QUESTION, strategy=Budget())
    first = free.steps[0].tokens
    for beyond in (0, 1, 2):
        result = reasoner.generate(QUESTION, strategy=Budget(budget=first + beyond))
        lines = [s.text for s in result.steps if s.phase == "thinking" and s.text != "</think>"]
        assert lines == [free.steps[0].text]


def test_the_parameter_of_the_request_counts_too(reasoner: Reasoner) -> None:
    by_field = reasoner.generate(QUESTION, strategy=Budget(budget=12))
    by_request = reasoner.generate(QUESTION, strategy="budget", thinking_token_budget=12)
    assert by_field.token_ids == by_request.token_ids


def test_a_batch_gives_what_each_prompt_alone_gives(reasoner: Reasoner) -> None:
    questions = [QUESTION.replace("57", str(n)) for n in (3, 21, 88)]
    alone = [reasoner.generate(q, strategy=Budget(budget=15)).token_ids for q in questions]
    together = reasoner.generate(questions, strategy=Budget(budget=15))
    assert [r.token_ids for r in together] == alone


def test_sentences_end_where_their_punctuation_is_followed_by_space(reasoner: Reasoner) -> None:
    class Spelling:
        """A codec in which an id is the number of a character."""

        def decode(self, ids: list[int]) -> str:
            return "".join(map(chr, ids))

    task = Task.__new__(Task)
    task.codec = Spelling()  # type: ignore[assignment]
    for text, kept in (
        ("so it is. And then", "so it is."),
        ("about 3.14 of it", ""),
        ('he said "no." But', 'he said "no."'),
        ("is it? Yes! Then", "is it? Yes!"),
        ("nothing", ""),
    ):
        assert last_sentence_end(task, [ord(c) for c in text]) == len(kept)


def test_unknown_slices_and_contradictions_are_refused_before_any_work(reasoner: Reasoner) -> None:
    with pytest.raises(SliceError, match="huge"):
        reasoner.generate(QUESTION, strategy=Budget(think="huge"))
    with pytest.raises(RequestError, match="thinking_token_budget=50 is beyond max_tokens=10"):
        reasoner.generate(QUESTION, strategy="budget", thinking_token_budget=50, max_tokens=10)
