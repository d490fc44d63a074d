"""nano's tokenizer: every printable ASCII character, the prompts' fixed phrases, and tags.

The file it writes is read by `AutoTokenizer` without any code of ours. `encode_chat` is a fast
equal of applying the chat template and encoding (a test holds them together).
"""

from __future__ import annotations

import json
import re
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers

from .traces import PHRASES

PAD, UNK, START, END, THINK, END_THINK = (
    "<pad>", "<unk>", "<|im_start|>", "<|im_end|>", "<think>", "</think>",
)  # fmt: skip
SPECIALS = (PAD, UNK, START, END, THINK, END_THINK)
ROLES = ("user\n", "assistant\n", "system\n")
CHARACTERS = (*map(chr, range(32, 127)), "\n")

CHAT_TEMPLATE = (
    "{%- for message in messages %}"
    "{{- '<|im_start|>' + message['role'] + '\n' }}"
    "{%- if message['role'] == 'assistant' and '</think>' not in message['content'] %}"
    "{{- '<think></think>' }}{%- endif %}"
    "{{- message['content'] + '<|im_end|>\n' }}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}"
    "{{- '<|im_start|>assistant\n' }}"
    "{{- '<think></think>' if enable_thinking is defined and not enable_thinking "
    "else '<think>\n' }}"
    "{%- endif %}"
)

_words = (*SPECIALS, *ROLES, *PHRASES, *CHARACTERS)
WORDS = (*_words, *(f"<unused{i}>" for i in range(-len(_words) % 16)))
IDS = {word: i for i, word in enumerate(WORDS)}
assert len(IDS) == len(WORDS)

# Longest first, so that a phrase wins over its beginning.
_LONG = sorted((*SPECIALS, *ROLES, *PHRASES), key=len, reverse=True)
_PATTERN = re.compile("|".join(map(re.escape, _LONG)) + "|.|\n", re.ASCII)


def encode(text: str) -> list[int]:
    """Token ids of ASCII text."""
    return [IDS.get(word, IDS[UNK]) for word in _PATTERN.findall(text)]


def encode_chat(question: str, trace: str, answer: str) -> tuple[list[int], int]:
    """Ids of a whole exchange, and how many of them are the prompt."""
    prompt = encode(f"{START}user\n{question}{END}\n{START}assistant\n{THINK}\n")
    return prompt + encode(f"{trace}{END_THINK}{answer}{END}"), len(prompt)


def write(directory: Path) -> None:
    """`tokenizer.json` and `tokenizer_config.json`."""
    tokenizer = Tokenizer(models.WordLevel(IDS, unk_token=UNK))
    tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in SPECIALS])
    # Phrases stand before single characters; [\\s\\S] is any character, a newline too.
    long = "|".join(re.escape(word) for word in sorted((*ROLES, *PHRASES), key=len, reverse=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(f"{long}|[\\s\\S]"), behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.save(str(directory / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "pad_token": PAD,
        "unk_token": UNK,
        "eos_token": END,
        "additional_special_tokens": [START, THINK, END_THINK],
        "model_max_length": 1024,
        "clean_up_tokenization_spaces": False,
        "chat_template": CHAT_TEMPLATE,
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")
