"""Between text and token ids: chat template, thinking tags, step boundaries, stop strings."""

from __future__ import annotations

from collections.abc import Mapping
from collections.abc import Sequence as Seq
from pathlib import Path
from typing import Any

from cascade.errors import CheckpointError, RequestError

THINK, END_THINK = "<think>", "</think>"


class Codec:
    """A checkpoint's tokenizer and end tokens. Without a tokenizer, text is None everywhere."""

    def __init__(self, tokenizer: Any | None, end_ids: frozenset[int]) -> None:
        self.tokenizer = tokenizer
        self.end_ids = end_ids
        self.think_id = self._single(THINK)
        self.end_think_id = self._single(END_THINK)
        self._delimiters: dict[str, frozenset[int]] = {}

    @classmethod
    def from_directory(cls, directory: Path | None, config: Any) -> Codec:
        """The tokenizer files of a checkpoint directory, if it has any."""
        tokenizer = None
        if directory is not None and (directory / "tokenizer.json").exists():
            from transformers import AutoTokenizer

            try:
                tokenizer = AutoTokenizer.from_pretrained(directory, trust_remote_code=False)
            except Exception as error:  # whatever a broken tokenizer file raises
                raise CheckpointError(
                    f"{directory / 'tokenizer.json'} could not be read: {error}"
                ) from error
        ends = {*_ids(getattr(config, "eos_token_id", None))}
        generation = directory / "generation_config.json" if directory else None
        if generation is not None and generation.exists():
            import json

            ends |= {*_ids(json.loads(generation.read_text()).get("eos_token_id"))}
        if tokenizer is not None:
            ends |= {*_ids(tokenizer.eos_token_id)}
        return cls(tokenizer, frozenset(ends))

    def encode_prompt(self, prompt: Any) -> tuple[str | None, list[int]]:
        """Text and ids of a prompt: a string, chat messages, or `{"prompt_token_ids": [...]}`.

        A string becomes a user message where the tokenizer has a chat template.
        """
        if isinstance(prompt, Mapping):
            if set(prompt) != {"prompt_token_ids"}:
                raise RequestError(
                    f"a prompt dict has the one key 'prompt_token_ids', got {sorted(prompt)}"
                )
            ids = [int(i) for i in prompt["prompt_token_ids"]]
            if not ids:
                raise RequestError("the prompt is empty: prompt_token_ids has no ids")
            return None, ids
        tokenizer = self._need_tokenizer()
        if isinstance(prompt, str):
            if not prompt.strip():
                raise RequestError("the prompt is empty")
            if tokenizer.chat_template is None:
                return prompt, list(tokenizer.encode(prompt))
            prompt = [{"role": "user", "content": prompt}]
        if not is_messages(prompt):
            raise RequestError(
                "a prompt is a string, a list of messages with 'role' and 'content', or "
                f"{{'prompt_token_ids': [...]}}; got {type(prompt).__name__}"
            )
        if not any(str(message["content"]).strip() for message in prompt):
            raise RequestError("the prompt is empty: no message has content")
        text = tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True)
        return text, list(tokenizer.encode(text, add_special_tokens=False))

    def encode(self, text: str) -> list[int]:
        return list(self._need_tokenizer().encode(text, add_special_tokens=False))

    def decode(self, ids: Seq[int]) -> str | None:
        """Text of ids, special tokens included; None without a tokenizer."""
        if self.tokenizer is None:
            return None
        return str(
            self.tokenizer.decode(
                list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False
            )
        )

    def thinks_at(self, prompt_ids: Seq[int]) -> bool:
        """Whether generation after this prompt starts inside a thought."""
        if self.think_id is None or self.end_think_id is None:
            return False
        tags = [i for i in prompt_ids if i in (self.think_id, self.end_think_id)]
        return bool(tags) and tags[-1] == self.think_id

    def boundaries(self, delimiter: str) -> frozenset[int]:
        """Ids after which a step ends: tokens with the delimiter in their text, and end tags."""
        if delimiter not in self._delimiters:
            found: set[int] = set()
            if self.tokenizer is not None:
                ids = range(len(self.tokenizer))
                texts = self.tokenizer.batch_decode(
                    [[i] for i in ids], clean_up_tokenization_spaces=False
                )
                found = {i for i, text in zip(ids, texts, strict=True) if delimiter in text}
            self._delimiters[delimiter] = frozenset(found)
        tags = frozenset() if self.end_think_id is None else frozenset({self.end_think_id})
        return self._delimiters[delimiter] | self.end_ids | tags

    def end_of_thinking(self, last_id: int, delimiter: str = "\n") -> list[int]:
        """Ids that end a thought cleanly after `last_id`: on a line of its own."""
        if self.end_think_id is None:
            raise RequestError("this tokenizer has no </think>; a thinking budget has no meaning")
        newline = [] if last_id in self.boundaries(delimiter) else self.encode(delimiter)
        return [*newline, self.end_think_id]

    def _single(self, text: str) -> int | None:
        if self.tokenizer is None:
            return None
        value = self.tokenizer.convert_tokens_to_ids(text)
        known = value is not None and value != self.tokenizer.unk_token_id
        return int(value) if known else None

    def _need_tokenizer(self) -> Any:
        if self.tokenizer is None:
            raise RequestError(
                "this checkpoint has no tokenizer: give the prompt as "
                "{'prompt_token_ids': [...]} and leave out stop strings"
            )
        return self.tokenizer


def is_messages(prompt: Any) -> bool:
    """Whether this is one chat, rather than a list of prompts."""
    return (
        isinstance(prompt, (list, tuple))
        and bool(prompt)
        and all(isinstance(m, Mapping) and {"role", "content"} <= set(m) for m in prompt)
    )


def _ids(value: Any) -> list[int]:
    if value is None:
        return []
    return [int(value)] if isinstance(value, int) else [int(v) for v in value]
