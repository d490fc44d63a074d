"""Other engines on the same shape, side by side: a decoded token at batch 1, each with its cache.

transformers runs the very weights that are resident: its modules are built empty and given views
of them, so it needs no memory of its own. vLLM loads a model of its own in a process of its own.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from typing import Any

import torch

from cascade.bench.clock import Clock
from cascade.bench.report import Peer
from cascade.export import module_tensors
from cascade.model import ElasticModel

SHORT, LONG = 4, 20  # generated tokens of two runs; their difference leaves the prompt out
REPEATS = 3


def transformers_peer(model: ElasticModel, clock: Clock, slice: str, prompt: list[int]) -> Peer:
    """`generate` of transformers' own model of a slice, greedy, with its cache."""
    import transformers

    name = f"transformers {transformers.__version__}"
    try:
        with _quiet():
            theirs = shared_module(model, slice)
            ids = torch.tensor([prompt], device=model.device)

            def generate(count: int) -> None:
                theirs.generate(
                    ids,
                    attention_mask=torch.ones_like(ids),
                    min_new_tokens=count,
                    max_new_tokens=count,
                    do_sample=False,
                    pad_token_id=0,
                )

            short, long = (
                clock.median(partial(generate, count), REPEATS) for count in (SHORT, LONG)
            )
    except Exception as error:  # whatever another library raises: it is only compared with
        return Peer(name, slice, None, f"{type(error).__name__}: {_first_line(error)}")
    return Peer(name, slice, (long - short) / (LONG - SHORT), "our weights")


def shared_module(model: ElasticModel, slice: str) -> Any:
    """transformers' model of a slice whose parameters are views of ours."""
    from transformers import NemotronHForCausalLM

    with torch.device("meta"):
        theirs = NemotronHForCausalLM(_config(model, slice))
    state = dict(module_tensors(model.weights(slice)))
    theirs.load_state_dict(state, strict=True, assign=True)
    return theirs.eval().requires_grad_(False)


@dataclass(frozen=True)
class VllmJob:
    """All that vLLM needs to know of a slice."""

    slice: str
    config: Any
    prompt_tokens: int
    minutes: float = 15  # it may take, loading and compilation included

    @classmethod
    def of(cls, model: ElasticModel, slice: str, prompt_tokens: int) -> VllmJob:
        config = _config(model, slice)
        config.dtype = model.dtype
        config.architectures = ["NemotronHForCausalLM"]
        return cls(slice, config, prompt_tokens)


def vllm_peer(job: VllmJob) -> Peer:
    """vLLM in a process of its own, on random weights of its own. Needs the GPU's memory free."""
    with tempfile.TemporaryDirectory() as directory:
        job.config.save_pretrained(directory)
        work = {
            "directory": directory,
            "prompt_tokens": job.prompt_tokens,
            "counts": [SHORT, LONG],
        }
        command = [sys.executable, "-m", "cascade.bench.vllm_process", json.dumps(work)]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=job.minutes * 60)
        except subprocess.TimeoutExpired:
            return Peer("vllm", job.slice, None, f"not done after {job.minutes:g} minutes")
    lines = (done.stdout + done.stderr).strip().splitlines()
    if done.returncode:
        reason = lines[-1] if lines else f"exit code {done.returncode}"
        return Peer("vllm", job.slice, None, reason[:200])
    answer = json.loads(done.stdout.strip().splitlines()[-1])
    note = "weights of its own, routing not spread"
    return Peer(f"vllm {answer['version']}", job.slice, answer["seconds"], note)


def _config(model: ElasticModel, slice: str) -> Any:
    """transformers' config of one slice alone."""
    config = deepcopy(model.config)
    config.hidden_size, config.moe_intermediate_size = model.slice_spec(slice).widths
    return config


def installed(package: str) -> bool:
    return find_spec(package) is not None


@contextmanager
def _quiet() -> Iterator[None]:
    """Without another library's warnings and progress bars."""
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [""])[0][:200]
