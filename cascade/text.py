"""Between text and token ids: chat template, thinking tags, step boundaries."""

from __future__ import annotations

from collections.abc import Mapping
from collections.abc import Sequence as Seq
from pathlib import Path
from typing import Any

from cascade.errors import CheckpointError, RequestError

# The tags that reasoning models use, each one token; the first pair that a tokenizer has counts.
THINK_TAGS = (
    ("<think>", "</think>"),
    ("<thinking>", "</thinking>"),
    ("[THINK]", "[/THINK]"),
    ("<|begin_of_thought|>", "<|end_of_thought|>"),
)


class Codec:
    """A checkpoint's tokenizer and end tokens. Without a tokenizer, text is None everywhere.

    think_tags:    what opens and closes a thought, one token each; the tokenizer's unless given
    chat_template: in place of the tokenizer's own
    chat_options:  further variables of the template, `{"enable_thinking": False}` for example
    Raises RequestError for any of them without a tokenizer, and for tags that are not one token.
    """

    def __init__(
        self,
        tokenizer: Any | None,
        end_ids: frozenset[int],
        *,
        think_tags: tuple[str, str] | None = None,
        chat_template: str | None = None,
        chat_options: Mapping[str, Any] | None = None,
    ) -> None:
        self.tokenizer = tokenizer
        self.end_ids = end_ids
        if tokenizer is None and (think_tags or chat_template or chat_options):
            raise RequestError(
                "think_tags, chat_template and chat_options need a tokenizer, "
                "and this checkpoint has none"
            )
        self.chat_template = chat_template or getattr(tokenizer, "chat_template", None)
        self.chat_options = dict(chat_options or {})
        self.think, self.end_think = think_tags or self._known_tags()
        self.think_id, self.end_think_id = self._single(self.think), self._single(self.end_think)
        if think_tags and None in (self.think_id, self.end_think_id):
            raise RequestError(
                f"think_tags={think_tags!r}: each must be one token of the tokenizer"
            )
        self._closers: dict[str, frozenset[int]] = {}

    @classmethod
    def from_directory(cls, directory: Path | None, config: Any, **options: Any) -> Codec:
        """The tokenizer files of a checkpoint directory, if it has any; see Codec for options."""
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
        return cls(tokenizer, frozenset(ends), **options)

    # ---- prompts ----

    def encode_prompt(self, prompt: Any) -> tuple[str | None, list[int]]:
        """Text and ids of a prompt: a string, chat messages, or `{"prompt_token_ids": [...]}`.

        A string becomes a user message where there is a chat template.
        """
        if isinstance(prompt, Mapping):
            return None, _prompt_ids(prompt)
        tokenizer = self._need_tokenizer()
        if isinstance(prompt, str):
            if not prompt.strip():
                raise RequestError("the prompt is empty")
            if self.chat_template is None:
                return prompt, list(tokenizer.encode(prompt))
            prompt = [{"role": "user", "content": prompt}]
        if not is_messages(prompt):
            raise RequestError(
                "a prompt is a string, a list of messages with 'role' and 'content', or "
                f"{{'prompt_token_ids': [...]}}; got {type(prompt).__name__}"
            )
        if self.chat_template is None:
            raise RequestError("messages need a chat template; give Reasoner a chat_template")
        if not any(str(message["content"]).strip() for message in prompt):
            raise RequestError("the prompt is empty: no message has content")
        text = self._render(prompt)
        return text, list(tokenizer.encode(text, add_special_tokens=False))

    def _render(self, messages: Any) -> str:
        try:
            return str(
                self._need_tokenizer().apply_chat_template(
                    messages,
                    chat_template=self.chat_template,
                    tokenize=False,
                    add_generation_prompt=True,
                    **self.chat_options,
                )
            )
        except Exception as error:  # whatever a template raises
            raise RequestError(
                f"the chat template does not take these messages: {type(error).__name__}: {error}"
            ) from error

    # ---- text ----

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

    # ---- thoughts and steps ----

    @property
    def has_thoughts(self) -> bool:
        """Whether a thought can be told from an answer."""
        return self.think_id is not None and self.end_think_id is not None

    def thinks_at(self, prompt_ids: Seq[int]) -> bool:
        """Whether generation after this prompt starts inside a thought."""
        if not self.has_thoughts:
            return False
        tags = [i for i in prompt_ids if i in (self.think_id, self.end_think_id)]
        return bool(tags) and tags[-1] == self.think_id

    def closers(self, delimiter: str) -> frozenset[int]:
        """Ids that may end a step: end tokens, the end tag, and what can complete the delimiter.

        A delimiter of one character is complete after any of them; see `closes`.
        """
        if delimiter not in self._closers:
            found: set[int] = set()
            if self.tokenizer is not None:
                ids = range(len(self.tokenizer))
                texts = self.tokenizer.batch_decode(
                    [[i] for i in ids], clean_up_tokenization_spaces=False
                )
                found = {i for i, text in zip(ids, texts, strict=True) if delimiter[-1] in text}
            if self.end_think_id is not None:
                found.add(self.end_think_id)
            self._closers[delimiter] = frozenset(found) | self.end_ids
        return self._closers[delimiter]

    def closes(self, ids: Seq[int], delimiter: str) -> bool:
        """Whether a step ends with the last of these ids."""
        if not ids or ids[-1] not in self.closers(delimiter):
            return False
        if ids[-1] in self.end_ids or ids[-1] == self.end_think_id:
            return True
        tail = list(ids[-len(delimiter) - 1 :])
        text, before = self.decode(tail) or "", self.decode(tail[:-1]) or ""
        return delimiter in text[max(len(before) - len(delimiter) + 1, 0) :]

    def end_of_thinking(self, ids: Seq[int]) -> list[int]:
        """Ids that end a thought cleanly behind `ids`: on a line of its own."""
        if self.end_think_id is None:
            raise RequestError(f"this tokenizer has no {self.end_think}: a thought cannot be ended")
        return [*([] if self.closes(ids, "\n") else self.encode("\n")), self.end_think_id]

    # ---- inside ----

    def _known_tags(self) -> tuple[str, str]:
        for opening, closing in THINK_TAGS:
            if None not in (self._single(opening), self._single(closing)):
                return opening, closing
        return THINK_TAGS[0]

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


def _prompt_ids(prompt: Mapping[str, Any]) -> list[int]:
    if set(prompt) != {"prompt_token_ids"}:
        raise RequestError(
            f"a prompt dict has the one key 'prompt_token_ids', got {sorted(map(str, prompt))}"
        )
    ids = prompt["prompt_token_ids"]
    ids = ids.tolist() if hasattr(ids, "tolist") else ids
    if not isinstance(ids, (list, tuple)):
        raise RequestError(f"prompt_token_ids must be a list of token ids, got {ids!r}")
    if not ids:
        raise RequestError("the prompt is empty: prompt_token_ids has no ids")
    wrong = [i for i in ids if isinstance(i, bool) or not isinstance(i, int)]
    if wrong:
        raise RequestError(f"prompt_token_ids holds {wrong[0]!r}, which is no integer")
    return list(ids)


def _ids(value: Any) -> list[int]:
    if value is None:
        return []
    return [int(value)] if isinstance(value, int) else [int(v) for v in value]
