"""Colours of figures and pages: hues that colour-blind readers can tell apart, by role."""

from __future__ import annotations

from collections.abc import Sequence as Seq

# Slices from small to large; as ink, for text on white and on black.
SLICES = ("#0f9d8c", "#d98a0b", "#7a5be0", "#2f7ed8", "#c2457f")
INKS = (
    "light-dark(#0a7265, #45d0bd)",
    "light-dark(#945a00, #f0b550)",
    "light-dark(#5a3cc0, #ac97f7)",
    "light-dark(#1c5fae, #7db4f2)",
    "light-dark(#a02d67, #ec8fbb)",
)
RUNS = ("#2f7bf0", "#e0590f", "#2f9e44", "#d6336c", "#9c36b5", "#a58200")
BASELINE = "#6b7280"
BASELINES = ("#5f6876", "#98a1ae", "#7c8694")


def slice_colours(names: Seq[str]) -> dict[str, str]:
    """A colour for each slice, the largest of two being the third: large is violet."""
    return {name: SLICES[i] for name, i in _places(names).items()}


def slice_inks(names: Seq[str]) -> dict[str, str]:
    """The same hues as CSS colours for text."""
    return {name: INKS[i] for name, i in _places(names).items()}


def _places(names: Seq[str]) -> dict[str, int]:
    order = (0, 2) if len(names) == 2 else range(len(names))
    return {name: i % len(SLICES) for name, i in zip(names, order, strict=True)}
