"""Chat templates, thinking tags and step boundaries, from the tokenizer or in its place."""

from __future__ import annotations

import pytest

from cascade import Reasoner
from cascade.errors import RequestError
from cascade.text import Codec
from tests.nested import elastic, parent

QUESTION = "57 + 87 + 70"


@pytest.fixture(scope="module")
def reasoner() -> Reasoner:
    return Reasoner.from_pretrained("nano", max_batch=1, max_length=256)


def codec(reasoner: Reasoner, **options: object) -> Codec:
    return Codec(reasoner.codec.tokenizer, reasoner.codec.end_ids, **options)  # type: ignore[arg-type]


def test_tags_and_template_come_from_the_tokenizer(reasoner: Reasoner) -> None:
    assert (reasoner.codec.think, reasoner.codec.end_think) == ("<think>", "</think>")
    text, ids = reasoner.codec.encode_prompt(QUESTION)
    assert text == f"<|im_start|>user\n{QUESTION}<|im_end|>\n<|im_start|>assistant\n<think>\n"
    assert reasoner.codec.thinks_at(ids)


def test_options_reach_the_template(reasoner: Reasoner) -> None:
    other = Reasoner(
        reasoner.model, max_batch=1, max_length=256, chat_options={"enable_thinking": False}
    )
    result = other.generate(QUESTION)
    assert result.prompt and result.prompt.endswith("<think></think>")
    assert result.steps[0].phase == "answer"
    assert not other.codec.thinks_at(result.prompt_token_ids)


def test_another_template_takes_the_place_of_the_tokenizers(reasoner: Reasoner) -> None:
    template = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    own = codec(reasoner, chat_template=template)
    text, ids = own.encode_prompt([{"role": "user", "content": QUESTION}])
    assert text == f"user: {QUESTION}\n"
    assert own.decode(ids) == text
    assert not own.thinks_at(ids)


def test_a_template_that_fails_says_so(reasoner: Reasoner) -> None:
    broken = codec(reasoner, chat_template="{{ raise_exception('no system role') }}")
    with pytest.raises(RequestError, match="no system role"):
        broken.encode_prompt(QUESTION)


def test_other_tags_take_the_place_of_the_tokenizers(reasoner: Reasoner) -> None:
    own = Reasoner(reasoner.model, max_batch=1, max_length=256, think_tags=("=", "<unused0>"))
    assert own.codec.think_id == own.codec.encode("=")[0]
    result = own.generate(QUESTION, max_tokens=30)
    assert result.usage.reasoning > 0 and result.answer == ""


@pytest.mark.parametrize("tags", [("<think>", "no such token"), ("two tokens", "</think>")])
def test_a_tag_is_one_token(reasoner: Reasoner, tags: tuple[str, str]) -> None:
    with pytest.raises(RequestError, match="each must be one token"):
        codec(reasoner, think_tags=tags)


def test_without_a_tokenizer_there_is_nothing_to_override() -> None:
    model = elastic(parent("M*E"))
    for options in ({"think_tags": ("a", "b")}, {"chat_template": "x"}):
        with pytest.raises(RequestError, match="this checkpoint has none"):
            Reasoner(model, max_batch=1, max_length=32, **options)  # type: ignore[arg-type]


def test_a_checkpoint_without_a_tokenizer_works_with_ids() -> None:
    reasoner = Reasoner(elastic(parent("M*E")), max_batch=2, max_length=48)
    prompt = {"prompt_token_ids": [3, 1, 2]}
    for strategy in ("single", "speculative", "stepwise", "budget"):
        result = reasoner.generate(prompt, strategy=strategy, max_tokens=12, ignore_eos=True)
        assert len(result.token_ids) == 12
        assert (result.text, result.answer, result.reasoning) == (None, None, None)
        assert all(step.text is None for step in result.steps)
    with pytest.raises(RequestError, match="needs a tokenizer"):
        reasoner.generate(prompt, policy={"kind": "threshold", "score": "judge"})
    with pytest.raises(RequestError, match="has no tags"):
        reasoner.generate(prompt, thinking_token_budget=4)
    with pytest.raises(RequestError, match="has no tokenizer"):
        reasoner.generate("text")


@pytest.mark.parametrize(
    ("text", "delimiter", "closes"),
    [
        ("a\n", "\n", True),
        ("a", "\n", False),
        ("a\n\n", "\n\n", True),
        ("a\n", "\n\n", False),
        ("a = ", "= ", True),
        ("a == ", "= ", True),
        ("a =x", "= ", False),
        ("so </think>", "\n", True),
    ],
)
def test_a_step_ends_where_its_delimiter_is_complete(
    reasoner: Reasoner, text: str, delimiter: str, closes: bool
) -> None:
    ids = reasoner.codec.encode(text)
    assert reasoner.codec.closes(ids, delimiter) == closes
    assert reasoner.codec.closes([], delimiter) is False


def test_a_thought_ends_on_a_line_of_its_own(reasoner: Reasoner) -> None:
    own = reasoner.codec
    assert own.decode(own.end_of_thinking(own.encode("4 + 4"))) == "\n</think>"
    assert own.decode(own.end_of_thinking(own.encode("8\n"))) == "</think>"


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ({"prompt_token_ids": "123"}, "a list of token ids"),
        ({"prompt_token_ids": [1, 2.5]}, "2.5"),
        ({"prompt_token_ids": [True]}, "True"),
        ({"prompt_token_ids": [1], "text": "x"}, "one key"),
        (17, "a prompt is a string"),
        ([{"role": "user", "content": " "}], "no message has content"),
    ],
)
def test_what_is_no_prompt_is_refused(reasoner: Reasoner, prompt: object, message: str) -> None:
    with pytest.raises(RequestError, match=message):
        reasoner.generate(prompt)  # type: ignore[call-overload]
