"""The process that `peers.vllm_peer` starts: decode times of vLLM, as one line of JSON.

Its argument is a JSON object: `directory` with a config.json, `prompt_tokens`, and two `counts`
of generated tokens whose difference in time is divided by their difference.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from pathlib import Path
from random import Random

REPEATS = 5


def main(directory: str, prompt_tokens: int, counts: tuple[int, int]) -> None:
    import vllm

    engine = vllm.LLM(
        model=directory,
        load_format="dummy",
        skip_tokenizer_init=True,
        max_model_len=prompt_tokens + max(counts) + 1,
        max_num_seqs=1,
        disable_log_stats=True,
    )

    config = json.loads((Path(directory) / "config.json").read_text())
    random = Random(0)
    prompt = [random.randrange(config["vocab_size"]) for _ in range(prompt_tokens)]

    def seconds(count: int) -> float:
        params = vllm.SamplingParams(
            max_tokens=count, temperature=0.0, ignore_eos=True, detokenize=False
        )
        times = []
        for _ in range(REPEATS + 1):
            began = time.perf_counter()
            engine.generate({"prompt_token_ids": prompt}, params, use_tqdm=False)
            times.append(time.perf_counter() - began)
        return statistics.median(times[1:])

    short, long = (seconds(count) for count in counts)
    answer = {"version": vllm.__version__, "seconds": (long - short) / (counts[1] - counts[0])}
    print("\n" + json.dumps(answer))


if __name__ == "__main__":
    main(**json.loads(sys.argv[1]))
