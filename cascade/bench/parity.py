"""Is what will be timed right? The model's own route against the plain reference, slice by slice.

A model of a few of the layers, one of every kind, at their full widths and with the same weights:
deep random models send a token to other experts at the smallest rounding, and then nothing can be
compared. In float32 the largest error of any logits counts. In 16 bits a few tokens still go to
other experts (at the 30b shape one in a hundred is off by 20 %), so there it is the median error,
against that of the plain reference in the same 16 bits, and the median of the worst row.
"""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass, field, fields, is_dataclass, replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from cascade.batch import Batch
from cascade.bench.report import Agreement
from cascade.cache import Journal
from cascade.forward import Feed, forward
from cascade.kernels import reference
from cascade.model import ElasticModel
from cascade.sampling import SamplingParams
from cascade.slices import resolve_slices
from cascade.weights import ModelWeights

EXACT = 1e-4  # largest relative error in float32
SPREAD = 2.0  # the median error in 16 bits, over that of the plain reference
WRONG = 0.3  # the median error of a row that reads what is not its own is above 1
WORSE, WORSE_16 = 1e-3, 0.5  # how far a greedy choice may lie from the best logit to the mean one
PROMPT, DRAFT = 21, 5  # tokens, neither a multiple of anything


def agreement(
    model: ElasticModel, slices: Sequence[str], batches: Sequence[int]
) -> list[Agreement]:
    """Every slice at every batch size, in ragged prompts, drafts and verifications."""
    few = few_layers(model)
    truth = ElasticModel(
        few.config, _wide(few.weights(few.largest)), few.slices, backend="reference"
    )
    plain = ElasticModel(few.config, few.weights(few.largest), few.slices, backend="reference")
    return [
        one
        for slice in slices
        for batch in batches
        for one in _compare(few, truth, plain, slice, batch)
    ]


def few_layers(model: ElasticModel) -> ElasticModel:
    """The first layer of every kind and the last Mamba layer: views of the same storage."""
    kinds = model.arch.kinds
    last = max(i for i, kind in enumerate(kinds) if kind == "mamba")
    kept = sorted({last, *(kinds.index(kind) for kind in kinds)})
    config = deepcopy(model.config)
    config.layers_block_type = [config.layers_block_type[i] for i in kept]
    whole = model.weights(model.largest)
    layers = tuple(whole.layers[i] for i in kept)
    weights = ModelWeights(whole.embeddings, layers, whole.norm, whole.head)
    widths = {name: spec.widths for name, spec in model.slices.items()}
    return ElasticModel(config, weights, resolve_slices(config, widths, None), name=model.name)


def _wide(node: Any) -> Any:
    """A copy of weights in float32; the same where they are float32 already."""
    if isinstance(node, Tensor):
        return node.float()
    if isinstance(node, tuple):
        return tuple(_wide(child) for child in node)
    if is_dataclass(node):
        parts = {f.name: _wide(getattr(node, f.name)) for f in fields(node)}
        return replace(node, **parts)  # type: ignore[type-var]
    return node


def _compare(
    model: ElasticModel, truth: ElasticModel, plain: ElasticModel, slice: str, batch: int
) -> list[Agreement]:
    told = _Told(model, slice, batch)
    exact = _from_scratch(truth, slice, told.texts)
    errors = _errors([(exact[r][p], one) for r, p, one in told.logits])
    short = max(_shortfall(exact[r][p], token) for r, p, token in told.greedy)
    agreement = partial(Agreement, slice, batch)
    if model.dtype == torch.float32:
        return [
            agreement("logits", len(errors), float(errors.max()), EXACT),
            agreement("greedy", len(told.greedy), short, WORSE),
        ]
    rounded = _from_scratch(plain, slice, told.texts)
    own = _errors([(exact[r][p], rounded[r][p]) for r, p, _ in told.logits])
    worst = _worst_row(errors, [r for r, _, _ in told.logits])
    return [
        agreement("logits", len(errors), float(errors.median()), SPREAD * float(own.median())),
        agreement("worst row", batch, worst, WRONG),
        agreement("greedy", len(told.greedy), short, WORSE_16),
    ]


def _worst_row(errors: Tensor, rows: Sequence[int]) -> float:
    """The largest of the rows' median errors. `rows` names the row of every error."""
    of = torch.tensor(rows, device=errors.device)
    return max(float(errors[of == row].median()) for row in set(rows))


def _shortfall(logits: Tensor, chosen: int) -> float:
    """0 where the best was chosen, about 1 where any other: a share of best minus mean."""
    best = logits.max()
    return float((best - logits[chosen]) / (best - logits.mean()))


@dataclass
class _Told:
    """What the verbs of a model say of random rows, and the tokens that these hold in the end.

    logits: (row, position, logits [V] behind the token there)
    greedy: (row, position, the id drafted greedily behind it)
    """

    model: ElasticModel
    slice: str
    batch: int
    texts: list[list[int]] = field(init=False)
    logits: list[tuple[int, int, Tensor]] = field(init=False, default_factory=list)
    greedy: list[tuple[int, int, int]] = field(init=False, default_factory=list)

    def __post_init__(self) -> None:
        batch, slice = self.batch, self.slice
        random = torch.Generator().manual_seed(batch)
        cache = self.model.cache(
            max_batch=batch, max_length=PROMPT + 4 * DRAFT, max_draft=2 * DRAFT
        )
        rows = Batch([self.model.sequence(cache=cache) for _ in range(batch)])
        counts = [DRAFT - r % DRAFT for r in range(batch)]

        def ids(count: int) -> list[int]:
            drawn = torch.randint(self.model.arch.vocab_size, (count,), generator=random)
            return list(map(int, drawn))

        first = rows.append([ids(PROMPT - r % DRAFT) for r in range(batch)], slice)
        self._note(rows, [[one] for one in first])
        for temperature in (1.0, 0.0):  # drawn by the host; chosen where the logits are
            params = [SamplingParams(temperature=temperature, seed=r) for r in range(batch)]
            drafted = rows.draft(counts, slice, params)
            if not temperature:
                for r, (row, tokens) in enumerate(zip(rows.sequences, drafted, strict=True)):
                    self.greedy += [(r, row.length - 1 + i, t) for i, t in enumerate(tokens)]
            rows.propose([ids(1 + r % 2) for r in range(batch)])
            tables = rows.verify(slice)
            # What follows the proposed ids says nothing of the text that is kept.
            self._note(rows, [list(t[: n + 1]) for t, n in zip(tables, counts, strict=True)])
            rows.commit(counts)
        self.texts = [row.tokens for row in rows.sequences]
        for row in rows.sequences:
            row.close()

    def _note(self, rows: Batch, tables: Sequence[Sequence[Tensor]]) -> None:
        for r, (row, table) in enumerate(zip(rows.sequences, tables, strict=True)):
            self.logits += [(r, row.length - 1 + i, one.clone()) for i, one in enumerate(table)]


@torch.no_grad()
def _from_scratch(model: ElasticModel, slice: str, texts: list[list[int]]) -> list[Tensor]:
    """Logits [len(text), V] of every text in one plain pass."""
    longest = max(map(len, texts))
    cache = model.cache(max_batch=len(texts), max_length=longest, max_draft=1)
    journal = Journal(model.arch, len(texts), longest, cache.device, cache.dtype)
    weights = model.weights(slice)
    feeds = [Feed(r, r, 0, 0, text) for r, text in enumerate(texts)]
    hidden = forward(weights, model.arch, reference, cache, journal, feeds)
    return [F.linear(one, weights.head).float() for one in hidden]


def _errors(pairs: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
    """|mine - exact| / |exact| of every row of logits; infinite where it is not a number."""
    errors = [(mine - exact).norm() / exact.norm() for exact, mine in pairs]
    return torch.stack(errors).nan_to_num(nan=torch.inf)
