"""Measure nano: accuracy by slice and task, handoffs, step scores, and stepwise. On any machine.

    python examples/evaluate_nano.py [--model nano] [--size 1500] [--out nano_report.json]

Stopped, it goes on with the same command.

Greedy throughout, on questions that training refused; reasoning-gym grades. Ends with the tables
of the model card.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import permutations
from pathlib import Path
from typing import Any

import torch
from rich.progress import Progress

from cascade import Reasoner
from cascade.problems import NANO_KINDS, Problem, nano_problems, stream
from cascade.results import Result, Step
from cascade.strategies.base import Roles, Strategy
from cascade.strategies.single import Single
from cascade.task import Task
from cascade.verbs import Run

sys.path.insert(0, str(Path(__file__).parent))

from nano.traces import Trace, held_out_step, solve

SEED = 90210


class Handoff(Strategy):
    """The prompt's cache is the writer's; the reader goes on alone."""

    writer: str
    reader: str

    def run(self, task: Task, roles: Roles) -> Run:
        yield from task.prefill(self.writer)
        while not task.finished:
            task.open_step()
            yield from task.write(64, self.reader)
            task.close_step("written")


class ScoreOneStep(Strategy):
    """Score the next step of `draft` over a cache that `writer` wrote, and stop."""

    writer: str
    draft: str
    verify: str

    def run(self, task: Task, roles: Roles) -> Run:
        yield from task.prefill(self.writer)
        task.open_step()
        draft = yield from task.propose(64, self.draft, self.verify)
        yield from task.rate(draft, self.verify)
        yield from task.commit(len(draft.ids), self.draft, drafted=True)
        task.close_step("accept", self.draft)
        task.finish_reason = "stop"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="nano")
    parser.add_argument("--size", type=int, default=1500, help="held-out problems")
    parser.add_argument("--seed", type=int, default=SEED)
    parser.add_argument("--batch", type=int, default=24)
    parser.add_argument("--dtype", default="auto", help="float32 for a CPU's figures on a GPU")
    parser.add_argument("--out", type=Path, default=Path("nano_report.json"))
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    evaluation = Evaluation(args.model, args.batch, args.dtype)
    head = {"model": args.model, "problems": args.size, "seed": args.seed}
    report = json.loads(args.out.read_text()) if args.out.exists() else head
    if {k: report.get(k) for k in head} != head:
        raise SystemExit(f"{args.out} is the report of another evaluation; give another --out")
    with evaluation.progress:
        for name, part in evaluation.parts(args.size, args.seed):
            if name not in report:
                report[name] = part()
                args.out.write_text(json.dumps(report, indent=1) + "\n")
    print(markdown(report))


class Evaluation:
    """One model, in exact mode and in shared mode over the same weights."""

    def __init__(self, model: str, batch: int, dtype: str) -> None:
        self.exact = Reasoner.from_pretrained(model, max_batch=batch, max_length=512, dtype=dtype)
        self.chunk = 4 * batch  # prompts between two signs of progress
        self.shared = Reasoner(
            self.exact.model, max_batch=batch, max_length=512, consistency="shared"
        )
        self.slices = [n for n, spec in self.exact.model.slices.items() if spec.trained]
        self.small, self.large = self.slices[0], self.slices[-1]
        self.progress = Progress(disable=not sys.stderr.isatty())

    def parts(self, size: int, seed: int) -> Iterator[tuple[str, Callable[[], Any]]]:
        """What is measured, by name; a report that has a part is not asked for it again."""
        problems = nano_problems(size, seed)
        prompts = [self.exact.codec.encode_prompt(p.question)[1] for p in problems]
        alone = {s: self._generate(prompts, slice=s, strategy="single") for s in self.slices}
        small, medium, large = self.small, self.slices[1], self.large

        def half_way(writer: str, reader: str, at_line: bool) -> Callable[[], Any]:
            return lambda: self._half_way(problems, prompts, alone, writer, reader, at_line)

        yield "accuracy", lambda: {s: by_task(problems, alone[s]) for s in self.slices}
        yield "stepwise", lambda: self._stepwise(problems[:200])
        for writer, reader in permutations((large, small, medium), 2):
            yield f"at a line's end, {writer} to {reader}", half_way(writer, reader, True)
            yield f"half-way, {writer} to {reader}", half_way(writer, reader, False)
        for writer, reader in permutations((large, small), 2):
            yield (
                f"after the prompt, {writer} to {reader}",
                partial(self._handoff, problems, prompts, prompts, writer, reader),
            )
        yield "scores", lambda: self._scores(problems, prompts, alone[small], size // 2)
        yield "new_steps", lambda: self._new_steps(max(size // 4, 6), seed + 1)

    # ---- parts ----

    def _new_steps(self, size: int, seed: int) -> dict[str, Any]:
        """Problems whose solution has a single operation that was never trained on."""
        problems = list(with_new_steps(size, seed))
        prompts = [self.exact.codec.encode_prompt(p.question)[1] for p in problems]
        found = {
            s: by_task(problems, self._generate(prompts, slice=s, strategy="single"))["all"]
            for s in self.slices
        }
        return {"problems": size} | found

    def _half_way(
        self,
        problems: Sequence[Problem],
        prompts: Sequence[list[int]],
        alone: dict[str, list[Result]],
        writer: str,
        reader: str,
        at_line: bool,
    ) -> dict[str, float]:
        """The writer writes the first half of its own reply, the reader the rest.

        Half-way is often inside a number, and what the writer would have written next is in its
        state, right or wrong; `at_line` cuts at the last end of a line before.
        """
        newlines = self.exact.codec.closers("\n") - self.exact.codec.end_ids
        heads = []
        for prompt, result in zip(prompts, alone[writer], strict=True):
            head = list(result.token_ids[: len(result.token_ids) // 2])
            while at_line and head and head[-1] not in newlines:
                head.pop()
            heads.append([*prompt, *head])
        return self._handoff(problems, prompts, heads, writer, reader)

    def _handoff(
        self,
        problems: Sequence[Problem],
        prompts: Sequence[list[int]],
        heads: Sequence[list[int]],
        writer: str,
        reader: str,
    ) -> dict[str, float]:
        """Share solved over the writer's cache, and over one recomputed by the reader."""
        solved = {}
        for name, author in (("shared", writer), ("recomputed", reader)):
            strategy = Handoff(writer=author, reader=reader)
            tails = self._generate(heads, strategy=strategy, reasoner=self.shared)
            answers = [
                self._answer([*head[len(prompt) :], *tail.token_ids])
                for prompt, head, tail in zip(prompts, heads, tails, strict=True)
            ]
            solved[name] = mean(p.score(a) == 1 for p, a in zip(problems, answers, strict=True))
        return solved

    def _scores(
        self,
        problems: Sequence[Problem],
        prompts: Sequence[list[int]],
        drafts: Sequence[Result],
        size: int,
    ) -> dict[str, Any]:
        """Does the large slice's score tell wrong small steps from right ones?

        Steps of small after a right beginning; right is what the exact solution says. Small
        reads the same cache as large does, and may write another step over another one's.
        """
        heads, expected = [], []
        for problem, prompt, result in list(zip(problems, prompts, drafts, strict=True))[:size]:
            lines = [*(line + "\n" for line in trace_of(problem).lines), "</think>"]
            head = list(prompt)
            thought = [step for step in result.steps if step.phase == "thinking"]
            for step, line in zip(thought, lines, strict=False):
                heads.append(list(head))
                expected.append(line)
                if not is_right(step, line):
                    break
                head += step.token_ids
        found: dict[str, Any] = {}
        for name, writer in (("shared", self.small), ("recomputed", self.large)):
            strategy = ScoreOneStep(writer=writer, draft=self.small, verify=self.large)
            results = self._generate(heads, strategy=strategy, reasoner=self.shared)
            steps = [result.steps[0] for result in results]
            wrong = [not is_right(s, line) for s, line in zip(steps, expected, strict=True)]
            rejected = [(s.score or 0) < 0.5 for s in steps]
            found[name] = {
                "steps": len(steps),
                "wrong": sum(wrong),
                "auroc_mean": auroc([-(s.mean_score or 0) for s in steps], wrong),
                "auroc_min": auroc([-(s.score or 0) for s in steps], wrong),
                "wrong_caught": mean(r for r, w in zip(rejected, wrong, strict=True) if w),
                "right_rejected": mean(r for r, w in zip(rejected, wrong, strict=True) if not w),
            }
        return found

    def _stepwise(self, problems: Sequence[Problem]) -> dict[str, Any]:
        """The main job: stepwise beside large alone and small alone, with wall-clock seconds."""
        questions = [p.question for p in problems]
        runs: dict[str, Any] = {"problems": len(problems)}
        for name, options in (
            ("large alone", {"strategy": "single", "slice": self.large}),
            ("small alone", {"strategy": "single", "slice": self.small}),
            ("stepwise", {"strategy": "stepwise"}),
        ):
            began = time.perf_counter()
            results = self._generate(questions, **options)
            seconds = time.perf_counter() - began
            steps = [s for r in results for s in r.steps]
            thought = sum(r.usage.reasoning for r in results)
            by_small = sum(r.usage.thinking_by_slice.get(self.small, 0) for r in results)
            runs[name] = {
                "solved": by_task(problems, results)["all"],
                "seconds": round(seconds, 1),
                "small_share": by_small / thought,
                "steps_rewritten": mean(s.decision == "rewrite" for s in steps),
            }
        return runs

    # ---- helpers ----

    def _generate(
        self,
        prompts: Sequence[Any],
        *,
        strategy: str | Strategy,
        slice: str | None = None,
        reasoner: Reasoner | None = None,
    ) -> list[Result]:
        chosen = Single(slice=slice) if slice else strategy
        task = self.progress.add_task(f"{chosen!r:.60}", total=len(prompts))
        results: list[Result] = []
        for begin in range(0, len(prompts), self.chunk):
            requests = [
                p if isinstance(p, str) else {"prompt_token_ids": p}
                for p in prompts[begin : begin + self.chunk]
            ]
            results += (reasoner or self.exact).generate(requests, strategy=chosen)
            self.progress.update(task, completed=len(results))
        return results

    def _answer(self, ids: list[int]) -> str:
        text = self.exact.codec.decode([i for i in ids if i not in self.exact.codec.end_ids]) or ""
        return text.rpartition("</think>")[2].strip()


def with_new_steps(size: int, seed: int) -> Iterator[Problem]:
    """Problems of all kinds in turn with an operation that training refused."""
    pools: dict[str, Iterator[Problem]] = {
        kind: (
            p for p in stream(kind, seed, **settings) if any(map(held_out_step, trace_of(p).steps))
        )
        for kind, settings in NANO_KINDS.items()
    }
    kinds = list(pools)
    for i in range(size):
        yield next(pools[kinds[i % len(kinds)]])


def trace_of(problem: Problem) -> Trace:
    """The exact solution; none for what has no steps: `0 = 0`, or a number without digits."""
    try:
        return Trace() if problem.question.endswith(": 0 = 0") else solve(problem.question)
    except ValueError:
        return Trace()


def is_right(step: Step, line: str) -> bool:
    text = step.text or ""
    return text.startswith(line) if line == "</think>" else text == line


def by_task(problems: Sequence[Problem], results: Sequence[Result]) -> dict[str, float]:
    """Share solved by kind, and over `all`."""
    solved: dict[str, list[bool]] = defaultdict(list)
    for problem, result in zip(problems, results, strict=True):
        right = problem.score(result.answer) == 1
        solved[problem.kind].append(right)
        solved["all"].append(right)
    return {kind: mean(values) for kind, values in solved.items()}


def mean(values: Any) -> float:
    found = [float(v) for v in values]
    return sum(found) / len(found) if found else float("nan")


def auroc(scores: Sequence[float], labels: Sequence[bool]) -> float:
    """Chance that a positive scores above a negative; ties count half."""
    order = torch.tensor(scores, dtype=torch.float64)
    positive = torch.tensor(labels)
    above = order[positive][:, None] - order[~positive][None]
    return float((above > 0).double().mean() + 0.5 * (above == 0).double().mean())


def markdown(report: dict[str, Any]) -> str:
    """The tables of the model card."""
    slices = list(report["accuracy"])
    kinds = list(report["accuracy"][slices[0]])
    lines = [f"Accuracy on {report['problems']} held-out problems, greedy, %", ""]
    lines += ["| task | " + " | ".join(slices) + " |", "|---|" + "--:|" * len(slices)]
    for kind in kinds:
        cells = [f"{100 * report['accuracy'][s][kind]:.1f}" for s in slices]
        lines.append(f"| {kind} | " + " | ".join(cells) + " |")
    cells = [f"{100 * report['new_steps'][s]:.1f}" for s in slices]
    lines.append(
        f"| operations never trained on ({report['new_steps']['problems']}) | "
        + " | ".join(cells)
        + " |"
    )
    lines += [
        "",
        "| handoff | writer | reader | shared cache | recomputed |",
        "|---|---|---|--:|--:|",
    ]
    for name, h in report.items():
        if " to " in name:
            cells = name.replace(", ", " | ").replace(" to ", " | ")
            lines.append(f"| {cells} | {100 * h['shared']:.1f} | {100 * h['recomputed']:.1f} |")
    lines += ["", "Large's score of small's steps", ""]
    lines += [
        "| cache | steps | wrong | AUROC mean | AUROC min | wrong caught | right rejected |",
        "|---|--:|--:|--:|--:|--:|--:|",
    ]
    for name, row in report["scores"].items():
        lines.append(
            f"| {name} | {row['steps']} | {row['wrong']} "
            f"| {row['auroc_mean']:.4f} | {row['auroc_min']:.4f} "
            f"| {100 * row['wrong_caught']:.1f} % | {100 * row['right_rejected']:.1f} % |"
        )
    w = report["stepwise"]
    lines += ["", f"{w['problems']} problems, {torch.get_num_threads()} threads", ""]
    lines += [
        "| | solved | seconds | thinking by small | steps rewritten |",
        "|---|--:|--:|--:|--:|",
    ]
    for name in ("large alone", "small alone", "stepwise"):
        row = w[name]
        lines.append(
            f"| {name} | {100 * row['solved']:.1f} % | {row['seconds']} "
            f"| {100 * row['small_share']:.1f} % | {100 * row['steps_rewritten']:.1f} % |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
