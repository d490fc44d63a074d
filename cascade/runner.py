"""How the passes of a model are run: the seam at which a device brings a faster route.

`passes` and `Batch` decide which tokens run where and what is committed; a runner turns feeds into
hidden states and logits. It writes K and V at uncommitted positions and journal entries, and
nothing else, so a pass that fails leaves nothing to undo (`cache`).
"""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from cascade.architecture import Architecture
from cascade.cache import Cache, Journal
from cascade.forward import Feed, forward, logits
from cascade.weights import ModelWeights

if TYPE_CHECKING:
    from cascade.graphs import Decoder


class Runner:
    """The plain route: `forward` for everything, on any device.

    Built once with its model. A faster runner overrides what it speeds up and falls back to
    `super()` for the rest; results agree up to rounding.

    views: the weights by slice number; the model's own list, which grows as widths are named
    prefill_tokens: that a long append runs at once, over all rows; 0 for no such limit
    """

    prefill_tokens = 0

    def __init__(self, views: Sequence[ModelWeights]) -> None:
        self.views = views

    def hidden(
        self, writer: int, cache: Cache, journal: Journal, feeds: Sequence[Feed]
    ) -> list[Tensor]:
        """Run every row's tokens under slice number `writer`: prefill, verification, repair.

        Returns, for each row, the hidden states of its ids after the final norm, [len(ids), H].
        """
        return forward(self.views[writer], cache.arch, cache.kernels, cache, journal, feeds)

    def logits(self, writer: int, hidden: Tensor) -> Tensor:
        """[n, H] -> [n, V] fp32."""
        return logits(self.views[writer], hidden)

    def decode(self, writer: int, cache: Cache, feeds: Sequence[Feed]) -> Tensor:
        """One token a row into the resident journal; logits [R, V] fp32 of the token after it."""
        return self.logits(writer, torch.cat(self.hidden(writer, cache, cache.journal, feeds)))

    def verify(self, writer: int, cache: Cache, feeds: Sequence[Feed]) -> Tensor:
        """Several tokens a row into the resident journal; logits [n, V] fp32 after each of them."""
        return self.logits(writer, torch.cat(self.hidden(writer, cache, cache.journal, feeds)))

    def chain(self, cache: Cache, rows: int) -> Decoder | None:
        """What drafts greedily without the host in between; None where nothing does."""
        return None


def runner_for(arch: Architecture, kernels: ModuleType, views: Sequence[ModelWeights]) -> Runner:
    """The runner that goes with the kernels that `kernels.load` has chosen."""
    if kernels.CAPTURABLE:
        from cascade.graphs import GraphRunner

        return GraphRunner(views, arch, kernels)
    if kernels.__name__ == "cascade.kernels.cpu":
        from cascade.cpu import CpuRunner

        return CpuRunner(views)
    return Runner(views)
