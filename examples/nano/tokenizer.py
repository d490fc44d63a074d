"""nano's tokenizer: every printable ASCII character, the prompts' fixed phrases, and tags.

`write` makes files that `AutoTokenizer` reads without any code of ours; `encode_chat` is the fast
equal, for training, of applying the chat template and encoding (a test holds them together).
"""

from __future__ import annotations

import json
import re
import string
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers

from .problems import PHRASES

PAD, UNK, START, END, THINK, END_THINK = (
    "<pad>", "<unk>", "<|im_start|>", "<|im_end|>", "<think>", "</think>",
)  # fmt: skip
SPECIALS = (PAD, UNK, START, END, THINK, END_THINK)
ROLES = ("user\n", "assistant\n", "system\n")
LENGTH = 1024
"""The longest sequence, in tokens, that the configuration declares."""

CHAT_TEMPLATE = (
    "{%- for message in messages %}"
    "{{- '<|im_start|>' + message['role'] + '\\n' }}"
    "{%- if message['role'] == 'assistant' and '</think>' not in message['content'] %}"
    "{{- '<think></think>' }}"
    "{%- endif %}"
    "{{- message['content'] + '<|im_end|>\\n' }}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}"
    "{{- '<|im_start|>assistant\\n' }}"
    "{%- if enable_thinking is defined and not enable_thinking %}"
    "{{- '<think></think>' }}"
    "{%- else %}"
    "{{- '<think>\\n' }}"
    "{%- endif %}"
    "{%- endif %}"
)

_LONG = sorted((*ROLES, *PHRASES), key=len, reverse=True)  # a phrase wins over its beginning
_words = (*SPECIALS, *ROLES, *PHRASES, *string.printable)
WORDS = (*_words, *(f"<unused{i}>" for i in range(-len(_words) % 16)))
IDS = {word: i for i, word in enumerate(WORDS)}
assert len(IDS) == len(WORDS)
NEWLINE_ID, END_THINK_ID, END_ID, PAD_ID = IDS["\n"], IDS[END_THINK], IDS[END], IDS[PAD]

_PATTERN = re.compile("|".join(map(re.escape, (*SPECIALS, *_LONG))) + "|.", re.DOTALL)


def encode(text: str) -> list[int]:
    """Token ids of text; what is not ASCII becomes `<unk>`."""
    return [IDS.get(word, IDS[UNK]) for word in _PATTERN.findall(text)]


def decode(ids: list[int]) -> str:
    return "".join(WORDS[i] for i in ids)


def encode_chat(question: str, thought: str, answer: str) -> tuple[list[int], int]:
    """Ids of a question and its reply, and how many of them are the prompt."""
    prompt = encode_prompt(question)
    return prompt + encode(f"{thought}{END_THINK}{answer}{END}"), len(prompt)


def encode_prompt(question: str) -> list[int]:
    """Ids of the prompt that asks for a thought and an answer."""
    return encode(f"{START}user\n{question}{END}\n{START}assistant\n{THINK}\n")


def write(directory: Path) -> None:
    """`tokenizer.json` and `tokenizer_config.json`."""
    tokenizer = Tokenizer(models.WordLevel(IDS, unk_token=UNK))
    tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in SPECIALS])
    pieces = "|".join([*map(_oniguruma, _LONG), r"[\s\S]"])
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(pieces), behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.save(str(directory / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "pad_token": PAD,
        "unk_token": UNK,
        "eos_token": END,
        "additional_special_tokens": [START, THINK, END_THINK],
        "model_max_length": LENGTH,
        "clean_up_tokenization_spaces": False,
        "chat_template": CHAT_TEMPLATE,
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")


def _oniguruma(text: str) -> str:
    """A phrase as a pattern of the tokenizers library."""
    return re.escape(text).replace("\\\n", "\\n").replace("\\ ", " ")
