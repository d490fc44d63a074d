"""Manifests and records that no model had to make."""

from __future__ import annotations

from typing import Any

from cascade.evaluation.manifest import Engine, Manifest, problems_digest, session
from cascade.evaluation.records import Record
from cascade.evaluation.runs import plan
from cascade.problems import Problem

PROBLEMS = [Problem(f"p{i}", f"{i} + {i}?", str(2 * i), kind="sum") for i in range(4)]


def manifest(runs: Any = ("stepwise",), **changes: Any) -> Manifest:
    engine = Engine(
        model="nano", digest="sha256:1", dtype="float32", slices={"small": 1, "large": 9},
        draft="small", verify="large", policy={"kind": "threshold"}, consistency="exact",
        max_length=64,
    )  # fmt: skip
    planned = plan(runs, small="small", large="large", baselines=False)
    values: dict[str, Any] = {
        "created": "2026-11-24T10:00:00+0000",
        "engine": engine,
        "source": {"kind": "list"},
        "size": len(PROBLEMS),
        "problems": problems_digest(PROBLEMS),
        "grader": "auto",
        "seed": 0,
        "params": {},
        "runs": {run.name: run.model_dump(mode="json", exclude={"name"}) for run in planned},
        "sessions": (session(1, 8, "cpu"),),
    }
    return Manifest(**(values | changes))


def step(index: int = 0, **changes: Any) -> dict[str, Any]:
    values = {
        "index": index, "text": "2 + 2 = 4\n", "slice": "small", "phase": "thinking", "score": 0.9,
        "mean_score": 0.95, "decision": "accept", "drafter": "small", "drafted_tokens": 10,
        "milliseconds": 100.0, "retracted": None, "tokens": 10,
    }  # fmt: skip
    return values | changes


def record(id: str = "p0", run: str = "stepwise", **changes: Any) -> Record:
    values: dict[str, Any] = {
        "id": id, "run": run, "answer": "4", "score": 1.0, "reference": "4", "kind": "sum",
        "finish": "stop", "error": None, "seed": 1, "tries": 1, "session": 0, "worker": 0,
        "clock": 1.0, "steps": (step(),),
        "usage": {"reasoning": 10, "answer": 0, "by_slice": {"small": 10}, "drafted": 10,
                  "accepted": 10, "thinking_by_slice": {"small": 10}},
        "metrics": {"seconds": 0.5, "passes": {"small": 10, "large": 1},
                    "bytes": {"small": 100, "large": 50}},
    }  # fmt: skip
    return Record(**(values | changes))
