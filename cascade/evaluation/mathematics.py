"""Whether two mathematical expressions are equal, judged by math-verify in a process of its own.

A model's LaTeX may take forever to compare (`9^{9^{9^9}}`), or all memory: the process has a limit
of both, and is replaced when it passes one. Expressions are parsed by a grammar; the part of
math-verify that would hand text to Python's `eval` (plain expressions) is not used: text without
LaTeX is wrapped in dollars.
"""

from __future__ import annotations

import json
import os
import re
import select
import subprocess
import sys
from concurrent.futures import Future, ThreadPoolExecutor

SECONDS = 10.0  # for one comparison; the first also waits for sympy to be imported
STARTING = 60.0
MEMORY = 4 * 2**30  # bytes of address space

_CUE = re.compile(r"\bis\b|:|=")


class MathJudge:
    """Scores by a process that is started when it is first needed. Safe to kill at any moment."""

    def __init__(self, seconds: float = SECONDS) -> None:
        self.seconds = seconds
        self.restarts = 0
        self._process: subprocess.Popen[bytes] | None = None
        self._fresh = True
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="cascade-math")

    def submit(self, reference: str, answer: str) -> Future[float]:
        """1 where the answer equals the reference; 0 where not, or where it cannot be told."""
        return self._worker.submit(self._score, reference, answer)

    def close(self) -> None:
        self._worker.shutdown(cancel_futures=True)
        self._stop()

    def _score(self, reference: str, answer: str) -> float:
        line = json.dumps([reference, answer[-20_000:]]).encode() + b"\n"
        for _ in range(2):  # a process that has died meanwhile is replaced once
            process = self._running()
            assert process.stdin is not None and process.stdout is not None
            seconds, in_time, reply = STARTING if self._fresh else self.seconds, True, b""
            try:
                process.stdin.write(line)
                process.stdin.flush()
                in_time = bool(select.select([process.stdout], [], [], seconds)[0])
                reply = process.stdout.readline() if in_time else b""
            except BrokenPipeError:
                pass
            if reply:
                self._fresh = False
                return float(json.loads(reply))
            self._stop()
            self.restarts += 1
            if not in_time:
                return 0.0
        return 0.0

    def _running(self) -> subprocess.Popen[bytes]:
        if self._process is None or self._process.poll() is not None:
            self._process = subprocess.Popen(
                [sys.executable, "-W", "ignore", __file__],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
                env=os.environ | {"OPENBLAS_NUM_THREADS": "1"},
                start_new_session=True,  # ctrl-C is for the evaluation
            )  # fmt: skip
            self._fresh = True
        return self._process

    def _stop(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.communicate()
            self._process = None


def equal(reference: str, answer: str) -> bool:
    """Whether math-verify finds the expression in `answer` equal to the reference."""
    from math_verify import LatexExtractionConfig, parse, verify

    config = [LatexExtractionConfig()]
    right = parse(_as_latex(reference), config, parsing_timeout=5)
    for text in _forms(answer):
        if verify(right, parse(text, config, parsing_timeout=5), timeout_seconds=5):
            return True
    return False


def _forms(answer: str) -> list[str]:
    """The answer where it has LaTeX; otherwise its last line, whole and behind its last cue."""
    if "\\boxed" in answer or "$" in answer or "\\(" in answer or "\\[" in answer:
        return [answer]
    lines = [line for line in answer.splitlines() if line.strip()][-1:]
    return [_as_latex(part) for line in lines for part in (line, _CUE.split(line)[-1])]


def _as_latex(text: str) -> str:
    return text if "$" in text or "\\boxed" in text else f"${text.strip().rstrip('.')}$"


def main() -> None:
    """One JSON pair a line in, one number a line out."""
    try:
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    except (ImportError, ValueError, OSError):
        pass  # no such limit here
    for line in sys.stdin.buffer:
        reference, answer = json.loads(line)
        try:
            score = float(equal(reference, answer))
        except Exception:  # whatever a parser makes of a model's text
            score = 0.0
        sys.stdout.write(f"{score}\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
