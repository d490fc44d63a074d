"""`cascade bench`: what this machine makes of a model, next to what its memory bus allows."""

from __future__ import annotations

from cascade.bench.report import Report
from cascade.bench.run import Settings, run

__all__ = ["Report", "Settings", "run"]
