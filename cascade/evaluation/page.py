"""`report.html`: one file with tables, figures and traces, which needs nothing from anywhere."""

from __future__ import annotations

import base64
import gzip
import json
import time
from collections.abc import Mapping
from collections.abc import Sequence as Seq
from dataclasses import asdict
from html import escape
from importlib.resources import files
from pathlib import Path
from typing import Any

from cascade.errors import RunDirectoryError
from cascade.evaluation.colours import BASELINES, RUNS, slice_colours, slice_inks
from cascade.evaluation.evaluation import Evaluation
from cascade.evaluation.manifest import write_atomically
from cascade.evaluation.records import Record
from cascade.evaluation.summary import confidence, retracted
from cascade.evaluation.tables import source_name

BLOCK = 50  # problems whose traces are compressed together, and unpacked when one is opened


def write_report(evaluation: Evaluation, path: Path) -> Path:
    """Write the page. Raises RunDirectoryError where it cannot be written."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, render(evaluation).encode())
    except OSError as error:
        raise RunDirectoryError(f"{path} could not be written: {error.strerror}") from error
    return path


def render(evaluation: Evaluation) -> str:
    """The page as text."""
    runs = list(evaluation.runs)
    places = {problem["id"]: i for i, problem in enumerate(evaluation.problems)}
    rows = [_by_place(evaluation.runs[name], places) for name in runs]
    facts = _facts(evaluation)
    facts["items"] = [[None if r is None else _cell(r) for r in row] for row in rows]
    parts = {
        "title": escape(facts["title"]),
        "css": _part("report.css"),
        "js": "\n".join(map(_part, ("charts.js", "report.js", "viewer.js"))),
        "data": _json(facts),
        "blocks": "\n".join(_block(n, i, row) for n, row in enumerate(rows) for i in _starts(row)),
    }
    before, *pieces = _part("report.html").split("{{")
    filled = [before]
    for piece in pieces:
        name, _, rest = piece.partition("}}")
        filled += [parts[name], rest]
    return "".join(filled)


def _facts(evaluation: Evaluation) -> dict[str, Any]:
    manifest = evaluation.manifest
    colours = slice_colours(list(manifest.engine.slices))
    fresh = greys = 0
    runs = []
    for name, summary in evaluation.summaries.items():
        palette, number = (BASELINES, greys) if summary.baseline else (RUNS, fresh)
        greys, fresh = greys + summary.baseline, fresh + (not summary.baseline)
        colour = palette[number % len(palette)]
        runs.append({**summary.to_dict(), "colour": colour, "settings": manifest.runs.get(name)})
    inks = slice_inks(list(manifest.engine.slices))
    fields = ("id", "question", "answer", "kind", "choices")
    return {
        "title": f"{manifest.engine.model} on {source_name(manifest.source)}",
        "subtitle": _subtitle(evaluation),
        "slices": [{"name": n, "colour": c, "ink": inks[n]} for n, c in colours.items()],
        "runs": runs,
        "reference": evaluation.reference if len(runs) > 1 else None,
        "against": {name: asdict(c) for name, c in evaluation.against_reference.items()},
        "pairs": [asdict(c) for c in evaluation.comparisons],
        "problems": [{field: p[field] for field in fields} for p in evaluation.problems],
        "block": BLOCK,
        "manifest": manifest.model_dump(mode="json"),
    }


def _subtitle(evaluation: Evaluation) -> str:
    manifest = evaluation.manifest
    sampling = manifest.params.get("temperature")
    parts = [
        f"{manifest.size:,} problems",
        f"{len(evaluation.runs)} runs",
        f"temperature {sampling:g}" if sampling else "greedy",
        f"grader {manifest.grader}",
        f"{manifest.engine.dtype} on {(manifest.sessions or ({},))[-1].get('device', '?')}",
        time.strftime("%d %B %Y", time.strptime(manifest.created[:10], "%Y-%m-%d")).lstrip("0"),
    ]
    return " · ".join(parts)


def _by_place(records: Seq[Record], places: Mapping[str, int]) -> list[Record | None]:
    row: list[Record | None] = [None] * len(places)
    for record in records:
        if record.id in places:
            row[places[record.id]] = record
    return row


def _cell(record: Record) -> list[Any]:
    """What the list of problems needs: score, tokens, seconds, failed, drafts dropped, doubt."""
    return [
        record.score,
        record.tokens,
        round(record.seconds, 3),
        int(record.error is not None),
        sum(map(retracted, record.steps)),
        confidence("min", record),
    ]


def _starts(row: Seq[Record | None]) -> range:
    return range(0, len(row), BLOCK)


def _block(run: int, start: int, row: Seq[Record | None]) -> str:
    """Traces of some problems of a run, compressed."""
    traces = [None if r is None else _trace(r) for r in row[start : start + BLOCK]]
    packed = gzip.compress(json.dumps(traces, separators=(",", ":")).encode(), 6, mtime=0)
    text = base64.b64encode(packed).decode()
    return f'<script type="text/plain" id="b{run}-{start // BLOCK}">{text}</script>'


def _trace(record: Record) -> dict[str, Any]:
    return {
        "answer": record.answer,
        "finish": record.finish,
        "error": record.error,
        "seconds": record.seconds,
        "steps": record.steps,
        "candidates": record.candidates,
    }


def _part(name: str) -> str:
    return (files("cascade.evaluation") / "assets" / name).read_text("utf-8").rstrip()


def _json(value: Any) -> str:
    """JSON that cannot end the script element it stands in."""
    return json.dumps(value, separators=(",", ":")).replace("<", "\\u003c")
