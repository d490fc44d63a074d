"""Batch evaluation: problems, graders, runs, run directories that survive, statistics, reports.

`cascade.evaluate` is the entry; this package holds the parts. Names are loaded on first use.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

_WHERE = {
    "Evaluation": "cascade.evaluation.evaluation",
    "FileSource": "cascade.evaluation.sources",
    "GymSource": "cascade.evaluation.sources",
    "HubSource": "cascade.evaluation.sources",
    "Problem": "cascade.problems",
    "Recipe": "cascade.evaluation.engine",
    "Run": "cascade.evaluation.runs",
}

__all__ = sorted(_WHERE)

if TYPE_CHECKING:
    from cascade.evaluation.engine import Recipe as Recipe
    from cascade.evaluation.evaluation import Evaluation as Evaluation
    from cascade.evaluation.runs import Run as Run
    from cascade.evaluation.sources import FileSource as FileSource
    from cascade.evaluation.sources import GymSource as GymSource
    from cascade.evaluation.sources import HubSource as HubSource
    from cascade.problems import Problem as Problem


def __getattr__(name: str) -> Any:
    if name in _WHERE:
        return getattr(import_module(_WHERE[name]), name)
    raise AttributeError(f"module 'cascade.evaluation' has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
