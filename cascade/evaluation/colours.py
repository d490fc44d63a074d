"""Colours of figures and pages: hues that colour-blind readers can tell apart, by role."""

from __future__ import annotations

from collections.abc import Sequence as Seq

# Slices from small to large, on white.
SLICES = ("#0f9d8c", "#d98a0b", "#6c4fd0", "#2f7ed8", "#c2457f")
RUNS = ("#1f6feb", "#d9480f", "#2b8a3e", "#c2255c", "#5f3dc4", "#846200")
BASELINE = "#6b7280"


def slice_colours(names: Seq[str]) -> dict[str, str]:
    """A colour for each slice. With two the second is the third colour: large is violet."""
    palette = SLICES if len(names) != 2 else (SLICES[0], SLICES[2])
    return {name: palette[i % len(palette)] for i, name in enumerate(names)}
