"""A quick look at a model in training: greedy accuracy of each slice on held-out questions.

Without a cache, by whole forward passes; `evaluate_nano.py` is the real measurement.
"""

from __future__ import annotations

import random

import torch

from .network import Nano, Widths, pair_forward
from .traces import KINDS, held_out, sample, solve
from .vocabulary import END, END_THINK, IDS, START, THINK, WORDS, encode


@torch.no_grad()
def accuracy(
    model: Nano, widths: tuple[Widths, Widths], device: str, each: int = 64, seed: int = 99
) -> tuple[dict[str, float], dict[str, float]]:
    """Share of held-out questions solved, by kind and over all, for each of two slices."""
    rng = random.Random(seed)
    questions = [(kind, _held_out(kind, rng)) for kind in KINDS for _ in range(each)]
    prompts = [
        encode(f"{START}user\n{q}{END}\n{START}assistant\n{THINK}\n") for _, q in questions
    ]
    results = []
    for which in (0, 1) if widths[0] != widths[1] else (0,):
        replies = _greedy(model, widths, which, prompts, device)
        solved = {kind: 0 for kind in KINDS}
        for (kind, question), reply in zip(questions, replies, strict=True):
            text = "".join(WORDS[i] for i in reply)
            answer = text.partition(END_THINK)[2].removesuffix(END)
            solved[kind] += answer == solve(question).answer
        shares = {kind: count / each for kind, count in solved.items()}
        results.append({**shares, "all": sum(shares.values()) / len(shares)})
    return results[0], results[-1]


def _held_out(kind: str, rng: random.Random) -> str:
    while not held_out(question := sample(kind, rng)):
        pass
    return question


def _greedy(
    model: Nano, widths: tuple[Widths, Widths], which: int, prompts: list[list[int]], device: str
) -> list[list[int]]:
    limit = 256
    rows = len(prompts)
    ids = torch.zeros(rows, limit, dtype=torch.long, device=device)
    ends = torch.tensor([len(p) for p in prompts], device=device)
    for row, prompt in enumerate(prompts):
        ids[row, : len(prompt)] = torch.tensor(prompt, device=device)
    running = torch.ones(rows, dtype=torch.bool, device=device)
    at = torch.arange(rows, device=device)
    chosen = (widths[which], widths[which])
    while bool(running.any()) and int(ends.max()) < limit - 1:
        length = min(limit, -(-int(ends.max()) // 32) * 32)
        document = torch.ones(rows, length, dtype=torch.long, device=device)
        logits = pair_forward(model, ids[:, :length], document, chosen, None)[0]
        token = logits[at, ends - 1].argmax(-1)
        ids[at[running], ends[running]] = token[running]
        ends += running.long()
        running &= token != IDS[END]
    return [row[len(p) : e].tolist() for row, p, e in zip(ids, prompts, ends, strict=True)]
