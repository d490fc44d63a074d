"""The short pass: a few new tokens of every row, in few launches and in buffers that stay.

It computes what `forward` does for the same tokens, for the decode step (one token a row) and for
verification (k tokens a row), written so that it can be captured into a CUDA graph: every number
that changes from pass to pass is read on the device, from a `Table`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from types import ModuleType

import torch
from torch import Tensor

from cascade.architecture import Architecture
from cascade.cache import Cache
from cascade.kernels.plan import Choice, Limits, Plan
from cascade.weights import AttentionWeights, MambaWeights, MLPWeights, ModelWeights, MoEWeights

Row = tuple[int, int, int, Sequence[int]]  # slot, position of the first id, its journal entry, ids

COLUMNS = 4  # slots, starts, entries, counts
FROM_DEVICE = -1  # an id: the token that was last picked for the slot
NO_SLOT = -1  # of a row that only fills up the bucket


class Table:
    """What a pass runs: numbers of R rows and their ids [R, length], on the device.

    One tensor, so that one copy sets all of it; and none does where the pass before has left there
    what the next one runs.
    """

    def __init__(self, rows: int, length: int, device: torch.device) -> None:
        self.rows, self.length = rows, length
        self.numbers = torch.zeros(rows * (COLUMNS + length), dtype=torch.int64, device=device)
        columns = self.numbers[: rows * COLUMNS].view(COLUMNS, rows)
        self.slots, self.starts, self.entries, self.counts = columns
        self.ids = self.numbers[rows * COLUMNS :].view(rows, length)
        self._held: list[int] | None = None  # the numbers, where the host knows them

    def fill(self, rows: Sequence[Row]) -> None:
        """Set the rows, at most as many as there are; the others count for nothing."""
        numbers = self._numbers(rows)
        held, self._held = self._held, None  # until `moved_on`: a pass may fail half-way
        if numbers == held:
            return
        on_gpu = self.numbers.is_cuda
        values = torch.tensor(numbers, dtype=torch.int64, pin_memory=on_gpu)
        self.numbers.copy_(values, non_blocking=on_gpu)

    def moved_on(self, rows: Sequence[Row]) -> None:
        """A pass over these rows was launched whole, with `pick_tokens` at its end."""
        self._held = self._numbers(
            [
                (slot, start + len(ids), entry + len(ids), [FROM_DEVICE] * len(ids))
                for slot, start, entry, ids in rows
            ]
        )

    def _numbers(self, rows: Sequence[Row]) -> list[int]:
        idle = self.rows - len(rows)
        slots = [slot for slot, *_ in rows] + [NO_SLOT] * idle
        starts = [start for _, start, *_ in rows] + [0] * idle
        entries = [entry for *_, entry, _ in rows] + [0] * idle
        counts = [len(ids) for *_, ids in rows] + [0] * idle
        padding = [FROM_DEVICE] * self.length
        flat = [i for *_, ids in rows for i in (*ids, *padding[len(ids) :])]
        return [*slots, *starts, *entries, *counts, *flat, *padding * idle]


class Arena:
    """Memory for the buffers of passes of at most `tokens` tokens, one pass at a time.

    Graphs of all slices and sizes are captured over it; a larger arena makes them void.
    """

    def __init__(self, tokens: int, device: torch.device) -> None:
        self.tokens, self.device = tokens, device
        self._flat: dict[str, Tensor] = {}

    def take(self, name: str, tokens: int, width: int, most: int, dtype: torch.dtype) -> Tensor:
        """A buffer [tokens, width], dense; `most` is the largest width that any slice asks for.

        Lines are padded to 16 bytes, as the kernels need them.
        """
        unit = 16 // dtype.itemsize
        padded, largest = (-(-w // unit) * unit for w in (width, most))
        if name not in self._flat:
            self._flat[name] = torch.zeros(self.tokens * largest, dtype=dtype, device=self.device)
        return self._flat[name][: tokens * padded].view(tokens, padded)[:, :width]


@dataclass(frozen=True, slots=True)
class Buffers:
    """What a pass of n = R * length tokens under one slice writes."""

    hidden: Tensor  # [n, H]
    projected: Tensor  # [n, inner + C + heads]
    mixed: Tensor  # [n, inner]
    squares: Tensor  # [n, heads] fp32
    attended: Tensor  # [n, query heads * D]
    qkv: Tensor  # [n, (query + 2 kv heads) * D]
    routed: Tensor  # [n * top_k, F]
    dense: Tensor  # [n, width of the shared expert or of a dense layer]
    logits: Tensor  # [n, V] fp32

    @classmethod
    def over(
        cls,
        arena: Arena,
        weights: ModelWeights,
        parent: ModelWeights,
        arch: Architecture,
        tokens: int,
    ) -> Buffers:
        dtype, fp32 = weights.dtype, torch.float32
        projected = arch.inner + arch.conv_channels + arch.heads
        query = arch.query_heads * arch.attention_dim
        qkv = query + 2 * arch.kv_heads * arch.attention_dim
        routed, most_routed = _routed_width(weights), _routed_width(parent)
        dense = max(_dense_widths(weights), default=1)

        def take(
            name: str, width: int, dtype: torch.dtype, most: int = 0, times: int = 1
        ) -> Tensor:
            most = (most or width) * times
            if times == 1:
                return arena.take(name, tokens, width, most, dtype)
            return arena.take(name, tokens, times * width, most, dtype).view(tokens * times, width)

        return cls(
            hidden=take("hidden", weights.hidden, dtype, parent.hidden),
            projected=take("projected", projected, dtype),
            mixed=take("mixed", arch.inner, dtype),
            squares=take("squares", arch.heads, fp32),
            attended=take("attended", query, dtype),
            qkv=take("qkv", qkv, dtype),
            routed=take("routed", routed, dtype, most_routed, max(arch.top_k, 1)),
            dense=take("dense", dense, dtype),
            logits=take("logits", arch.vocab_size, fp32),
        )


def short_pass(
    weights: ModelWeights,
    arch: Architecture,
    kernels: ModuleType,
    cache: Cache,
    table: Table,
    latest: Tensor,
    buffers: Buffers,
    plans: Sequence[Plan],
) -> None:
    """Run a table's tokens under one slice into the resident journal; logits of every token.

    latest: [S], the token last picked for each slot; read where an id is `FROM_DEVICE`
    plans:  one a MoE layer, written
    """
    b, hidden = buffers, buffers.hidden
    kernels.embed_tokens(hidden, weights.embeddings, table.ids, latest, table.slots)
    mamba = attention = moe = 0
    for layer in weights.layers:
        match layer.mixer:
            case MambaWeights() as w:
                _mamba(w, layer.norm, arch, kernels, cache, table, b, mamba)
                mamba += 1
            case AttentionWeights() as w:
                _attention(w, layer.norm, arch, kernels, cache, table, b, attention)
                attention += 1
            case MoEWeights() as w:
                _moe(w, layer.norm, arch, kernels, table, b, plans[moe])
                moe += 1
            case MLPWeights() as w:
                kernels.norm_linear(hidden, [w.up], [b.dense], ["relu2"], layer.norm, eps=arch.eps)
                kernels.norm_linear(b.dense, [w.down], [hidden], ["add"])
    kernels.norm_linear(hidden, [weights.head], [b.logits], ["store"], weights.norm, eps=arch.eps)


def _mamba(
    w: MambaWeights,
    norm: Tensor,
    arch: Architecture,
    kernels: ModuleType,
    cache: Cache,
    table: Table,
    b: Buffers,
    layer: int,
) -> None:
    kernels.norm_linear(b.hidden, [w.in_proj], [b.projected], ["store"], norm, eps=arch.eps)
    inputs, scanned, dt = cache.journal.tensors()
    kernels.mamba_step(
        b.projected,
        cache.state[layer],
        cache.window[layer],
        (inputs[layer], scanned[layer], dt[layer]),
        w.conv,
        w.conv_bias,
        w.dt_bias,
        w.decay,
        w.skip,
        arch.min_step,
        table.slots,
        table.slots,  # the resident journal's rows are the slots
        table.entries,
        table.counts,
        b.mixed,
        b.squares,
    )
    kernels.norm_linear(
        b.mixed, [w.out_proj], [b.hidden], ["add"], w.norm, b.squares, arch.groups, arch.eps
    )


def _attention(
    w: AttentionWeights,
    norm: Tensor,
    arch: Architecture,
    kernels: ModuleType,
    cache: Cache,
    table: Table,
    b: Buffers,
    layer: int,
) -> None:
    kv = arch.kv_heads * arch.attention_dim
    query, keys, values = b.qkv.split([b.qkv.shape[1] - 2 * kv, kv, kv], 1)
    kernels.norm_linear(
        b.hidden,
        [w.q_proj, w.k_proj, w.v_proj],
        [query, keys, values],
        ["store"] * 3,
        norm,
        eps=arch.eps,
    )
    kernels.slot_attention(
        query,
        keys,
        values,
        cache.keys[layer],
        cache.values[layer],
        table.slots,
        table.starts,
        table.counts,
        b.attended,
    )
    kernels.norm_linear(b.attended, [w.o_proj], [b.hidden], ["add"])


def _moe(
    w: MoEWeights,
    norm: Tensor,
    arch: Architecture,
    kernels: ModuleType,
    table: Table,
    b: Buffers,
    plan: Plan,
) -> None:
    choice = Choice(
        w.router, w.router_bias, table.counts, arch.top_k, arch.normalise, arch.routed_scale
    )
    kernels.experts_up(b.hidden, norm, arch.eps, choice, w.up, plan, b.routed, w.shared.up, b.dense)
    kernels.experts_down(b.hidden, b.routed, w.down, plan, b.dense, w.shared.down)


def runs_short(weights: ModelWeights, arch: Architecture) -> bool:
    """Whether a short pass computes this model: no biases, no latent experts, no expert groups."""
    if arch.expert_groups != 1:
        return False
    for layer in weights.layers:
        match layer.mixer:
            case MambaWeights() as w:
                plain = w.in_bias is None and w.out_bias is None
            case MLPWeights() as w:
                plain = w.up_bias is None and w.down_bias is None
            case MoEWeights() as w:
                plain = (
                    w.latent_in is None and w.shared.up_bias is None and w.shared.down_bias is None
                )
            case _:
                plain = True
        if not plain:
            return False
    return len(_dense_widths(weights)) <= 1


def limits(
    weights: ModelWeights, arch: Architecture, kernels: ModuleType, device: torch.device
) -> Limits:
    """How much a short pass of this slice may take on a device."""
    depth = max(weights.hidden, _routed_width(weights))  # columns of either half of the experts
    shared: bool = min(_dense_widths(weights), default=0) > 0
    found: Limits = kernels.short_pass_limits(arch, depth, shared, device)
    return found


def _routed_width(weights: ModelWeights) -> int:
    widths = [x.mixer.up.shape[1] for x in weights.layers if isinstance(x.mixer, MoEWeights)]
    return max(widths, default=1)


def _dense_widths(weights: ModelWeights) -> set[int]:
    return {
        mixer.shared.up.shape[0] if isinstance(mixer, MoEWeights) else mixer.up.shape[0]
        for mixer in (layer.mixer for layer in weights.layers)
        if isinstance(mixer, (MoEWeights, MLPWeights))
    }
