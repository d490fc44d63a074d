"""Where generation ends and what its text is: stop strings, end tokens, parts of characters."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from cascade import SamplingParams
from cascade.text import Codec
from cascade.transcript import Transcript

END = "<end>"


def byte_codec() -> Codec:
    """One token a byte, so that most characters outside ASCII need several."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    inner = Tokenizer(models.BPE({c: i for i, c in enumerate(alphabet)}, []))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    inner.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, eos_token=END)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<think>", "</think>"]})
    return Codec(tokenizer, frozenset({tokenizer.eos_token_id}))


CODEC = byte_codec()


def write(
    text: str, blocks: list[int], *, prompt: str = "", **params: object
) -> tuple[Transcript, bool, list[str | None]]:
    """Take in a text in blocks of some sizes, as a strategy would; also the text after each."""
    transcript = Transcript(CODEC, SamplingParams(**params), CODEC.encode(prompt))
    ids, ended, seen = CODEC.encode(text), False, []
    while ids and not ended:
        size = blocks[len(seen) % len(blocks)]
        block, ids = ids[:size], ids[size:]
        fit = transcript.fit(block)
        ended = fit.ends
        transcript.add(block[: fit.count], "small", last=ended)
        if ended:
            transcript.cut = fit.cut
        seen.append(transcript.text)
        if fit.count < len(block):
            break
    return transcript, ended, seen


texts = st.text(st.sampled_from("ab\n é漢🙂"), max_size=30)
blocks = st.lists(st.integers(1, 7), min_size=1, max_size=5)


@given(texts, blocks)
def test_text_grows_by_whole_characters(text: str, sizes: list[int]) -> None:
    transcript, ended, seen = write(text + END, sizes)
    assert ended
    assert transcript.text == text
    assert all(text.startswith(part or "") for part in seen)
    assert len(transcript) == len(text.encode()) + 1


@given(texts, blocks, st.lists(st.text("ab\né漢", min_size=1, max_size=3), min_size=1, max_size=2))
def test_a_stop_string_cuts_at_its_first_place_whatever_the_blocks(
    text: str, sizes: list[int], stops: list[str]
) -> None:
    transcript, ended, _ = write(text, sizes, stop=stops)
    ends = [(text.index(s) + len(s), text.index(s)) for s in stops if s in text]
    assert ended == bool(ends)
    if not ends:
        assert transcript.text == text
        return
    # The first to be complete; of several then, the one that begins first.
    first = min(end for end, _ in ends)
    begin = min(begin for end, begin in ends if end == first)
    assert transcript.text == text[:begin]
    assert len(transcript) == len(text[:first].encode())


@given(texts, blocks, st.integers(0, 12))
def test_nothing_ends_generation_before_min_tokens(text: str, sizes: list[int], least: int) -> None:
    transcript, ended, _ = write(text, sizes, stop="a", min_tokens=least)
    ids = CODEC.encode(text)
    places = [i for i, token in enumerate(ids) if CODEC.decode([token]) == "a" and i >= least]
    assert ended == bool(places)
    assert len(transcript) == (places[0] + 1 if places else len(ids))


@given(texts, blocks, st.integers(1, 20))
def test_no_more_ids_than_max_tokens_are_taken(text: str, sizes: list[int], most: int) -> None:
    transcript, ended, _ = write(text, sizes, max_tokens=most)
    assert len(transcript) == min(len(CODEC.encode(text)), most)
    assert not ended


def test_an_end_token_is_silent_unless_it_is_ignored() -> None:
    assert write(f"a{END}b", [9])[0].text == "a"
    assert write(f"a{END}b", [9], ignore_eos=True)[0].text == f"a{END}b"


def test_a_stop_string_before_an_end_token_counts() -> None:
    transcript, _, _ = write(f"abc{END}", [9], stop="b")
    assert (transcript.text, len(transcript)) == ("a", 2)


@pytest.mark.parametrize("sizes", [[1], [3], [50]])
def test_a_thought_and_an_answer_are_told_apart_by_their_tags(sizes: list[int]) -> None:
    inside, _, _ = write("so\n</think> 42", sizes, prompt="<think>\n")
    assert inside.parts() == ("so", "42")
    assert inside.thought == len("so\n") + 1
    opened, _, _ = write("<think>\nso\n</think>42", sizes)
    assert opened.parts() == ("so", "42")
    assert opened.thought == len("\nso\n") + 2
    unopened, _, _ = write("so\n</think>42", sizes)
    assert unopened.parts() == ("so", "42")
    assert unopened.thought == len("so\n") + 1 == unopened.phases.count("thinking")
    unfinished, _, _ = write("so", sizes, prompt="<think>")
    assert unfinished.parts() == ("so", "")
    plain, _, _ = write("so", sizes)
    assert plain.parts() == ("", "so")


def test_text_that_may_become_a_stop_string_is_known() -> None:
    transcript, _, _ = write("ab", [1], stop=["bcd", "xyz"])
    assert transcript.may_be_cut
    transcript.add(CODEC.encode("b"), "small", last=False)
    assert transcript.may_be_cut
    transcript.add(CODEC.encode("x!"), "small", last=False)
    assert not transcript.may_be_cut


def test_a_copy_goes_its_own_way() -> None:
    transcript, _, _ = write("ab", [1])
    other = transcript.copy()
    other.add(CODEC.encode("c"), "large", last=False)
    assert (transcript.text, other.text) == ("ab", "abc")
    assert transcript.authors == ["small"] * 2
