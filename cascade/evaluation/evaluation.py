"""The outcome of an evaluation, finished or not: records, summaries, tables, reports."""

from __future__ import annotations

from collections.abc import Mapping
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from functools import cached_property
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cascade.evaluation.manifest import Manifest
from cascade.evaluation.records import Record
from cascade.evaluation.statistics import Comparison, compare
from cascade.evaluation.store import RunDirectory
from cascade.evaluation.summary import Summary, summarise

if TYPE_CHECKING:
    from rich.table import Table


@dataclass(frozen=True)
class Evaluation:
    """Runs over one set of problems.

    manifest:  what was asked of which model; problems: the questions, as mappings
    records:   one an item, by run and then by problem; directory: where they are, if anywhere
    """

    manifest: Manifest
    problems: Seq[Mapping[str, Any]]
    records: Seq[Record]
    directory: Path | None = None

    @classmethod
    def load(cls, directory: str | Path) -> Evaluation:
        """What a run directory holds so far. Raises RunDirectoryError."""
        store = RunDirectory(Path(directory))
        manifest = store.manifest
        return cls(manifest, store.problems(), store.records(), store.path)

    @cached_property
    def runs(self) -> Mapping[str, list[Record]]:
        """Records by run, in the manifest's order; runs without any are left out."""
        found: dict[str, list[Record]] = {name: [] for name in self.manifest.runs}
        for record in self.records:
            found.setdefault(record.run, []).append(record)
        return {name: records for name, records in found.items() if records}

    @cached_property
    def summaries(self) -> Mapping[str, Summary]:
        return {
            name: summarise(name, records, baseline=self._is_baseline(name))
            for name, records in self.runs.items()
        }

    @property
    def reference(self) -> str | None:
        """The run that the others are compared with: the first baseline, which is large alone."""
        return next((name for name in self.runs if self._is_baseline(name)), None)

    @cached_property
    def against_reference(self) -> Mapping[str, Comparison]:
        """Every other run compared with the reference, p-values adjusted over these."""
        if self.reference is None:
            return {}
        pairs = [(name, self.reference) for name in self.runs if name != self.reference]
        return {c.first: c for c in compare(self._scores, pairs)}

    @cached_property
    def comparisons(self) -> list[Comparison]:
        """Every pair of runs, p-values adjusted over all of them."""
        return compare(self._scores, list(combinations(self.runs, 2)))

    @property
    def finished(self) -> bool:
        return len(self.records) == len(self.problems) * len(self.manifest.runs)

    def table(self) -> Table:
        """The table of the terminal: accuracy with intervals, paired tests, time and cost."""
        from cascade.evaluation.tables import comparison_table

        return comparison_table(self)

    def report(self, path: str | Path | None = None) -> Path:
        """Write `report.html`, one file that needs no network."""
        from cascade.evaluation.page import write_report

        return write_report(self, self._place(path, "report.html"))

    def figures(self, directory: str | Path | None = None) -> list[Path]:
        """Write every figure as PNG and SVG. Needs matplotlib."""
        from cascade.evaluation.figures import write_figures

        return write_figures(self, self._place(directory, "figures"))

    @property
    def _scores(self) -> dict[str, dict[str, float]]:
        return {name: {r.id: r.score for r in records} for name, records in self.runs.items()}

    def _is_baseline(self, run: str) -> bool:
        return bool(self.manifest.runs.get(run, {}).get("baseline"))

    def _place(self, path: str | Path | None, name: str) -> Path:
        if path is not None:
            return Path(path)
        return (self.directory or Path()) / name
