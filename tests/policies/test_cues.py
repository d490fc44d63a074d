"""Cues: which words and which repetitions are taken for a thought gone astray."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from cascade.policies import Accept, Cues, EndThinking, Lead, Progress, Rewrite
from tests.policies.steps import step

TAKEOVER, CIRCLES = Lead(steps=2), EndThinking()


@pytest.mark.parametrize(
    "text", ["Wait, that is 14.", "so 3 + 4 = 7. wait", "HOLD ON", "Hmm.", "Actually, 12"]
)
def test_a_cue_hands_the_lead_over(text: str) -> None:
    assert Cues().decide(step(text=text)) == TAKEOVER


@pytest.mark.parametrize("text", ["the waiter waited", "await", "factually", "3 + 4 = 7", " "])
def test_parts_of_words_and_plain_steps_are_no_cue(text: str) -> None:
    assert Cues().decide(step(text=text)) == Accept()


def test_repeated_reflection_goes_in_circles() -> None:
    texts = ("wait", "3 + 4 = 7", "hmm, again")
    scores = step(text="Actually no", progress=Progress(texts=texts))
    assert Cues(reflections=3).decide(scores) == CIRCLES
    assert Cues(reflections=4).decide(scores) == TAKEOVER
    assert Cues(reflections=3, within=3).decide(scores) == TAKEOVER  # the first is out of sight


def test_a_step_written_before_is_a_loop() -> None:
    texts = ("3 + 4 = 7", "7 + 1 = 8", "3 + 4  = 7")
    scores = step(text="3 + 4 = 7\n", progress=Progress(texts=texts))
    assert Cues(repeats=2).decide(scores) == CIRCLES
    assert Cues(repeats=3).decide(scores) == Accept()


def test_a_phrase_that_stutters_is_a_loop() -> None:
    assert Cues().decide(step(text="and then we add " * 4)) == CIRCLES
    assert Cues().decide(step(text="and then we add " * 3)) == Accept()
    assert Cues().decide(step(text="1000000000000000000000000000000")) == CIRCLES


def test_the_answer_and_a_checkpoint_without_text_are_left_alone() -> None:
    assert Cues().decide(step(text="Wait", phase="answer")) == Accept()
    assert Cues().decide(step(text=None)) == Accept()


@given(st.text(), st.lists(st.text(), max_size=5))
def test_any_text_is_decided(text: str, texts: list[str]) -> None:
    scores = step(text=text, progress=Progress(texts=tuple(texts)))
    assert Cues().decide(scores) in (Accept(), TAKEOVER, CIRCLES)


def test_a_cue_of_ones_own_may_hold_any_sign() -> None:
    policy = Cues(words=("(?)",), takeover=Rewrite())
    assert policy.decide(step(text="is it 7 (?) or 8")) == Rewrite()
    with pytest.raises(ValidationError, match="blank"):
        Cues(words=("wait", " "))
