"""`cascade.evaluate` on nano: what it compares, keeps, retries and survives."""

import inspect
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import cascade
from cascade import Reasoner, Result, SamplingParams
from cascade.errors import RequestError, RunDirectoryError, SliceError
from cascade.evaluation import Evaluation, GymSource, Problem, Run
from cascade.evaluation.engine import LocalEngine, Recipe
from cascade.evaluation.records import Record
from cascade.evaluation.runs import run_of
from cascade.policies import Policy, Rewrite, Threshold
from cascade.strategies import Explore, Single, Stepwise
from cascade.strategies.base import Roles, Strategy
from cascade.task import Task
from cascade.verbs import Run as Verbs

SIZE = 5
SOURCE = GymSource(task="chain_sum", size=SIZE, seed=4242)


@pytest.fixture(scope="module")
def reasoner() -> Reasoner:
    return Reasoner.from_pretrained("nano", max_batch=8, max_length=256)


def content(records: Any) -> list[dict[str, Any]]:
    """What must not depend on time, processes or batches."""
    found = []
    for record in records:
        steps = [{k: v for k, v in s.items() if k in STEP} for s in record.steps]
        found.append({k: getattr(record, k) for k in ITEM} | {"steps": steps})
    return found


ITEM = ("id", "run", "answer", "score", "reference", "kind", "finish", "error", "seed")
STEP = ("text", "slice", "decision", "retracted", "tokens", "drafted_tokens", "phase")


# ---- results as they finish ----


def test_results_come_as_they_finish_and_are_those_of_generate(reasoner: Reasoner) -> None:
    prompts = ["8 - 3 + 12 - 4 + 9 - 6 + 23 - 11", "1 + 1", "57 + 87 + 70", "2 + 2"] * 3
    came = list(reasoner.as_completed(prompts, max_batch=2))
    assert sorted(number for number, _ in came) == list(range(12))
    assert [number for number, _ in came] != list(range(12))
    together = reasoner.generate(prompts)
    for number, result in came:
        assert result.token_ids == together[number].token_ids
    assert reasoner.cache.free_slots == reasoner.max_batch


def test_samples_of_one_prompt_come_together(reasoner: Reasoner) -> None:
    params = SamplingParams(n=3, temperature=1.0, seed=5, max_tokens=8)
    came = dict(reasoner.as_completed(["1 + 1", "2 + 2"], params))
    assert [len(came[i].samples) for i in (0, 1)] == [3, 3]
    expected = reasoner.generate(["1 + 1", "2 + 2"], params)
    assert [r.token_ids for r in came[1].samples] == [r.token_ids for r in expected[1].samples]


def test_closing_the_iterator_stops_the_work(reasoner: Reasoner) -> None:
    stream = reasoner.as_completed(["57 + 87 + 70"] * 20)
    next(stream)
    stream.close()
    assert reasoner.cache.free_slots == reasoner.max_batch
    reasoner.check("1 + 1")
    with pytest.raises(RequestError, match="empty"):
        reasoner.check("")


# ---- the function ----


def test_the_module_is_the_function() -> None:
    from cascade import evaluate

    assert callable(cascade.evaluate) and callable(evaluate)
    names = list(inspect.signature(cascade.evaluate).parameters)
    assert names[:3] == ["reasoner", "problems", "runs"]


def test_runs_and_baselines_over_one_set_in_one_go(reasoner: Reasoner, tmp_path: Path) -> None:
    found = cascade.evaluate(reasoner, SOURCE, ["stepwise"], out=tmp_path / "run")
    assert list(found.runs) == ["large-only", "small-only", "majority", "stepwise"]
    assert found.finished and found.reference == "large-only"
    lines = (tmp_path / "run" / "results.jsonl").read_text().splitlines()
    items = [json.loads(line) for line in lines]
    expected = [(f"chain_sum-4242-{i}", run) for run in found.runs for i in range(SIZE)]
    assert [(item["id"], item["run"]) for item in items] == expected
    assert all(item["score"] in (0, 1) for item in items)
    assert content(Evaluation.load(tmp_path / "run").records) == content(found.records)
    manifest = found.manifest
    assert manifest.engine.digest.startswith("sha256:") and manifest.seed == 0
    assert manifest.sessions[0]["ended"]


def test_results_are_those_of_generate(reasoner: Reasoner) -> None:
    found = cascade.evaluate(reasoner, SOURCE, {"mine": Stepwise()}, baselines=False)
    questions = [p["question"] for p in found.problems]
    by_id = {r.id: r for r in found.records}
    results: list[Result] = reasoner.generate(questions)
    for problem, result in zip(found.problems, results, strict=True):
        record = by_id[problem["id"]]
        assert record.answer == result.answer
        assert [s["text"] for s in record.steps] == [s.text for s in result.steps]
        assert record.tokens == len(result.token_ids)


def test_sampled_items_do_not_depend_on_their_neighbours(reasoner: Reasoner) -> None:
    params = SamplingParams(temperature=1.0)
    runs = [run_of({"name": "warm", "strategy": Single()})]
    whole = cascade.evaluate(reasoner, SOURCE, runs, baselines=False, params=params, seed=3)
    from cascade.evaluation.sources import load

    backwards = list(reversed(load(SOURCE)[0]))[:3]
    part = cascade.evaluate(reasoner, backwards, runs, baselines=False, params=params, seed=3)
    expected = {r.id: r for r in whole.records}
    assert content(part.records) == content([expected[r.id] for r in part.records])
    other = cascade.evaluate(reasoner, backwards, runs, baselines=False, params=params, seed=4)
    assert {r.seed for r in other.records}.isdisjoint(r.seed for r in part.records)


def test_a_resumed_evaluation_makes_only_what_is_missing(
    reasoner: Reasoner, tmp_path: Path
) -> None:
    whole = cascade.evaluate(reasoner, SOURCE, ["stepwise"], baselines=False, out=tmp_path)
    path = tmp_path / "results.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(lines[1::2]))
    again = cascade.evaluate(
        reasoner, SOURCE, ["stepwise"], baselines=False, out=tmp_path, resume=True
    )
    assert content(again.records) == content(whole.records)
    assert [r.session for r in again.records] == [1, 0, 1, 0, 1]
    with pytest.raises(RunDirectoryError, match="--resume"):
        cascade.evaluate(reasoner, SOURCE, ["stepwise"], baselines=False, out=tmp_path)
    with pytest.raises(RunDirectoryError, match="seed"):
        cascade.evaluate(reasoner, SOURCE, ["stepwise"], out=tmp_path, resume=True, seed=1)
    more = cascade.evaluate(
        reasoner, SOURCE, ["single"], baselines=False, out=tmp_path, resume=True
    )
    assert more.finished and list(more.runs) == ["stepwise", "single"]


def test_ctrl_c_keeps_what_is_finished(reasoner: Reasoner, tmp_path: Path) -> None:
    def grade(problem: Problem, answer: str | None) -> float:
        if problem.id.endswith("-3"):
            raise KeyboardInterrupt
        return 1.0

    with pytest.raises(KeyboardInterrupt):
        cascade.evaluate(reasoner, SOURCE, [Single()], baselines=False, grader=grade, out=tmp_path)
    assert reasoner.cache.free_slots == reasoner.max_batch
    kept = Evaluation.load(tmp_path)
    assert not kept.finished
    assert "ended" in kept.manifest.sessions[0]


# ---- what goes wrong ----


class Moody(Policy):
    """Raises on problems whose first draft has a 7 in it."""

    def decide(self, scores: Any) -> Rewrite:
        if "7" in (scores.text or "7"):
            raise ValueError("a seven")
        return Rewrite()


def test_a_failed_item_is_recorded_and_the_run_goes_on(reasoner: Reasoner) -> None:
    problems = [
        Problem("good", "1 + 1", "2"),
        Problem("long", "1 + " * 300 + "1", "301"),
        Problem("blank", " ", "2"),
        Problem("odd", "2 + 2", "not a number"),
    ]
    found = cascade.evaluate(reasoner, problems, [Single()], baselines=False, grader="numeric")
    errors = {r.id: r.error or "" for r in found.records}
    assert errors["good"] == ""
    assert errors["long"].startswith("PromptTooLong: the prompt has")
    assert errors["blank"].startswith("RequestError: the prompt is empty")
    assert errors["odd"].startswith("grader: RequestError") and "is no number" in errors["odd"]
    assert [r.score for r in found.records if r.error] == [0, 0, 0]
    assert found.summaries["single"].failed == 3


def test_a_policy_that_raises_fails_its_items_alone(reasoner: Reasoner) -> None:
    runs = [{"name": "moody", "policy": Moody()}, "single"]
    found = cascade.evaluate(reasoner, SOURCE, runs, baselines=False)
    failed = [r for r in found.runs["moody"] if r.error]
    assert failed and all(r.error and "a seven" in r.error for r in failed)
    assert not any(r.error for r in found.runs["single"])


class Hungry(Strategy):
    """Runs out of memory wherever more than `fits` requests run at once."""

    fits: int

    def run(self, task: Task, roles: Roles) -> Verbs:
        cache = task.sequence.cache
        if cache.max_batch - cache.free_slots > self.fits:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
        yield from Single().run(task, roles)


@pytest.mark.parametrize(("fits", "failed", "retried"), [(2, 0, 2), (0, SIZE, 3)])
def test_where_memory_runs_out_fewer_run_at_once(
    reasoner: Reasoner, fits: int, failed: int, retried: int
) -> None:
    run = {"name": "hungry", "strategy": Hungry(fits=fits)}
    found = cascade.evaluate(reasoner, SOURCE, [run], baselines=False)
    summary = found.summaries["hungry"]
    assert (summary.items, summary.failed) == (SIZE, failed)
    assert summary.repeated == retried
    if not failed:
        alone = cascade.evaluate(reasoner, SOURCE, [Single()], baselines=False)
        assert {r.answer for r in found.records} == {r.answer for r in alone.records}


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"runs": [Single(slice="smal")]}, SliceError, "did you mean 'small'"),
        ({"runs": ["stepwize"]}, RequestError, "did you mean 'stepwise'"),
        ({"grader": "exakt"}, RequestError, "did you mean 'exact'"),
        ({"params": SamplingParams(n=2)}, RequestError, "one sample"),
        ({"params": SamplingParams(stop_token_ids=(9999,))}, RequestError, "9999"),
        ({"backend": "rai"}, RequestError, "did you mean 'ray'"),
        ({"workers": 2}, RequestError, "workers=2"),
    ],
)
def test_a_wrong_setting_is_refused_before_any_work(
    reasoner: Reasoner, tmp_path: Path, arguments: dict[str, Any],
    error: type[Exception], message: str,
) -> None:  # fmt: skip
    with pytest.raises(error, match=message):
        cascade.evaluate(reasoner, SOURCE, out=tmp_path / "never", **arguments)
    assert not (tmp_path / "never").exists()


def test_a_directory_of_another_checkpoint_is_refused(reasoner: Reasoner, tmp_path: Path) -> None:
    cascade.evaluate(reasoner, SOURCE, [Single()], baselines=False, out=tmp_path)
    other = Reasoner(reasoner.model, max_batch=8, max_length=128, policy=Threshold(probability=0.9))
    with pytest.raises(RunDirectoryError, match=r"engine.max_length was 256, now 128.*policy"):
        cascade.evaluate(other, SOURCE, [Single()], baselines=False, out=tmp_path, resume=True)


# ---- recipes, records, summaries ----


def test_a_recipe_builds_the_same_reasoner(reasoner: Reasoner) -> None:
    again = Recipe.of(reasoner).build()
    assert LocalEngine(again).describe() == LocalEngine(reasoner).describe()
    assert again.max_batch == reasoner.max_batch


def test_a_model_too_large_for_memory_is_loaded_with_a_smaller_batch(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    real: Callable[..., Reasoner] = Reasoner.from_pretrained
    tried: list[int] = []

    def load(*args: Any, **kwargs: Any) -> Reasoner:
        tried.append(kwargs["max_batch"])
        if kwargs["max_batch"] > 4:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(*args, **kwargs)

    monkeypatch.setattr(Reasoner, "from_pretrained", load)
    assert Recipe(model="nano", max_batch=16, max_length=64).build().max_batch == 4
    assert tried == [16, 8, 4]


def test_a_record_survives_its_line(reasoner: Reasoner) -> None:
    run = {"name": "explore", "strategy": Explore(drafts=2, choose="vote")}
    found = cascade.evaluate(reasoner, SOURCE, [run, "stepwise"], baselines=False)
    for record in found.records:
        again = Record.from_line(record.to_line())
        assert again.to_line() == record.to_line()
        assert sum(step["tokens"] for step in record.steps) == record.tokens
    assert {len(r.candidates) for r in found.runs["explore"]} <= {1, 2}


def test_summaries_add_up(reasoner: Reasoner) -> None:
    runs = [Run(name="s", strategy=Stepwise()), Run(name="large", strategy=Single())]
    found = cascade.evaluate(reasoner, SOURCE, runs, baselines=False)
    for name, summary in found.summaries.items():
        records = found.runs[name]
        kept = sum(r.tokens for r in records)
        assert sum(map(sum, summary.timeline.tokens.values())) == kept
        assert sum(summary.share.values()) == pytest.approx(1)
        assert summary.tokens * summary.items == pytest.approx(kept)
        assert summary.latency["p50"] <= summary.latency["p95"] <= summary.seconds
        assert sum(n for n, _ in summary.by_kind.values()) == SIZE
    assert found.summaries["s"].positions and not found.summaries["large"].positions
    assert f"{100 * found.summaries['s'].accuracy.mean:.1f}" in table(found)


def table(found: Evaluation) -> str:
    from rich.console import Console

    printed = io.StringIO()
    Console(width=80, file=printed).print(found.table())
    return printed.getvalue()
