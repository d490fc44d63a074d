"""Training data: documents drawn and packed into rows by worker processes."""

from __future__ import annotations

import multiprocessing as mp
import os
import random
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from .traces import KINDS, held_out, held_out_step, sample, sample_bare, solve
from .vocabulary import encode_chat

BARE_SHARE = 0.04


@dataclass(frozen=True, slots=True)
class Rows:
    """Packed rows. ids [B, T] uint8; document [B, T] uint8 (0 is padding); reply [B, T] bool.

    `reply` marks tokens that the model has to predict: thought, answer and end.
    """

    ids: NDArray[np.uint8]
    document: NDArray[np.uint8]
    reply: NDArray[np.bool_]


def document(rng: random.Random) -> tuple[list[int], int]:
    """One document that training may see, and its prompt's length."""
    kinds = list(KINDS)
    while True:
        bare = rng.random() < BARE_SHARE
        question = sample_bare(rng) if bare else sample(rng.choice(kinds), rng)
        if held_out(question):
            continue
        trace = solve(question)
        if not any(map(held_out_step, trace.steps)):
            return encode_chat(question, trace.text, trace.answer)


def pack(rng: random.Random, rows: int, length: int) -> Rows:
    """Fill rows first-fit; a document never crosses a row."""
    ids = np.zeros((rows, length), np.uint8)
    owner = np.zeros((rows, length), np.uint8)
    reply = np.zeros((rows, length), np.bool_)
    used, count = [0] * rows, [0] * rows
    first, misses = 0, 0
    while misses < 12 and first < rows:
        tokens, prompt = document(rng)
        row = next((r for r in range(first, rows) if used[r] + len(tokens) <= length), None)
        if row is None:
            misses += 1
            continue
        begin, end = used[row], used[row] + len(tokens)
        count[row] += 1
        ids[row, begin:end] = tokens
        owner[row, begin:end] = count[row]
        reply[row, begin + prompt : end] = True
        used[row] = end
        while first < rows and used[first] > length - 24:
            first += 1
    return Rows(ids, owner, reply)


def batches(seed: int, rows: int, length: int, workers: int) -> Iterator[Rows]:
    """Endless packed batches from `workers` processes (0: this one)."""
    if workers == 0:
        rng = random.Random(seed)
        while True:
            yield pack(rng, rows, length)
    context = mp.get_context("spawn")
    queue = context.Queue(maxsize=4 * workers)
    processes = [
        context.Process(target=_work, args=(queue, seed * 1000 + i, rows, length), daemon=True)
        for i in range(workers)
    ]
    for process in processes:
        process.start()
    try:
        while True:
            yield queue.get()
    finally:
        for process in processes:
            process.terminate()


def _work(queue: mp.Queue[Rows], seed: int, rows: int, length: int) -> None:
    os.environ["OMP_NUM_THREADS"] = "1"
    rng = random.Random(seed)
    while True:
        queue.put(pack(rng, rows, length))
