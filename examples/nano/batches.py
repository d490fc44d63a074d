"""Training data: documents drawn and packed into rows by worker processes."""

from __future__ import annotations

import multiprocessing as mp
import os
import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from .problems import KINDS, held_out, held_out_step, sample, sample_bare
from .solutions import solve
from .tokenizer import NEWLINE_ID, encode_chat

BARE_SHARE = 0.04
"""Share of prompts that are an expression alone."""

ROW_END = 24
"""A row with fewer free tokens than this is full."""


@dataclass(frozen=True, slots=True)
class Rows:
    """Packed rows of documents.

    ids      [B, T] uint8
    document [B, T] uint8  number of the document within its row; 0 is padding
    reply    [B, T] bool   thought, answer and end: the tokens that the model learns to predict
    writer   [B, T] bool   where the second of two slices owns the cache entry, in a shared cache
    """

    ids: NDArray[np.uint8]
    document: NDArray[np.uint8]
    reply: NDArray[np.bool_]
    writer: NDArray[np.bool_]


def document(rng: random.Random) -> tuple[list[int], int]:
    """Ids of one document that training may see, and its prompt's length."""
    kinds = list(KINDS)
    while True:
        try:
            question = (
                sample_bare(rng) if rng.random() < BARE_SHARE else sample(rng.choice(kinds), rng)
            )
            if held_out(question):
                continue
            trace = solve(question)
        except ZeroDivisionError:
            continue
        if not any(map(held_out_step, trace.steps)):
            return encode_chat(question, trace.text, trace.answer)


def writers(rng: random.Random, ids: list[int], prompt: int) -> NDArray[np.bool_]:
    """Who writes each token's cache entry, as two slices may take turns: [T], False is the first.

    Handoff once in the reply, at its begin or at line ends; or at random anywhere; or one slice
    alone, whose cache the other one then reads without having written any of it.
    """
    length, first = len(ids), rng.random() < 0.5
    second = np.full(length, first)
    pattern = rng.random()
    if pattern < 0.25:  # at random
        rate = rng.choice((4, 12, 24, 48))
        flips = np.array([rng.random() * rate < 1 for _ in range(length)])
        second = np.logical_xor.accumulate(flips) ^ first
    elif pattern < 0.35:  # prompt by one, reply by the other
        second[prompt:] = not first
    elif pattern < 0.55:  # once in the reply
        second[rng.randint(prompt, length - 1) :] = not first
    elif pattern < 0.85:  # at line ends
        now, often = first, rng.choice((0.2, 0.5, 0.9))
        for i in range(prompt, length):
            if ids[i - 1] == NEWLINE_ID and rng.random() < often:
                now = not now
            second[i] = now
    return second


def pack(rng: random.Random, rows: int, length: int) -> Rows:
    """Fill rows first-fit; a document never crosses a row."""
    ids = np.zeros((rows, length), np.uint8)
    number = np.zeros((rows, length), np.uint8)
    reply = np.zeros((rows, length), np.bool_)
    writer = np.zeros((rows, length), np.bool_)
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
        number[row, begin:end] = count[row]
        reply[row, begin + prompt : end] = True
        writer[row, begin:end] = writers(rng, tokens, prompt)
        used[row] = end
        while first < rows and used[first] > length - ROW_END:
            first += 1
    order = np.random.default_rng(rng.getrandbits(32)).permutation(rows)
    return Rows(ids[order], number[order], reply[order], writer[order])


@contextmanager
def batches(seed: int, rows: int, length: int, workers: int) -> Iterator[Iterator[Rows]]:
    """Endless packed batches from `workers` processes (0: from this one)."""
    if workers == 0:
        yield _endless(seed, rows, length)
        return
    context = mp.get_context("spawn")
    queue: mp.Queue[Rows] = context.Queue(maxsize=3 * workers)
    processes = [
        context.Process(target=_work, args=(queue, seed * 1000 + i, rows, length), daemon=True)
        for i in range(workers)
    ]
    for process in processes:
        process.start()
    try:
        yield iter(queue.get, None)
    finally:
        for process in processes:
            process.terminate()


def _endless(seed: int, rows: int, length: int) -> Iterator[Rows]:
    rng = random.Random(seed)
    while True:
        yield pack(rng, rows, length)


def _work(queue: mp.Queue[Rows], seed: int, rows: int, length: int) -> None:
    os.environ["OMP_NUM_THREADS"] = "1"
    for batch in _endless(seed, rows, length):
        queue.put(batch)
