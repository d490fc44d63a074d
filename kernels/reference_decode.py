"""The kernels of a short pass in plain PyTorch: what their CUDA versions must match.

A short pass runs `length` tokens of each of R rows, packed as n = R * length tokens of which the
first `counts[r]` of each row count. Everything is written into buffers that the caller owns, so
that a pass can be captured once and replayed. Letters in shapes as in the package's docstring;
besides: E experts, F width of a routed expert.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from cascade.kernels import reference_layers as layers
from cascade.kernels.plan import Choice, Plan

Kind = Literal["store", "relu2", "add"]


def embed_tokens(
    hidden: Tensor, embeddings: Tensor, ids: Tensor, latest: Tensor, slots: Tensor
) -> None:
    """hidden [n, width] <- the embeddings of ids [R, length].

    An id below zero stands for `latest[slot]`, the token last picked for the row's slot.
    """
    known = torch.where(ids < 0, latest[slots.clamp(min=0)][:, None], ids)
    known = known.clamp(0, embeddings.shape[0] - 1)
    hidden.copy_(F.embedding(known.flatten(), embeddings))


def norm_linear(
    x: Tensor,
    weights: Sequence[Tensor],
    outs: Sequence[Tensor],
    kinds: Sequence[Kind],
    norm: Tensor | None = None,
    squares: Tensor | None = None,
    groups: int = 1,
    eps: float = 0.0,
) -> None:
    """outs[i] <- x W_i^T, after an RMSNorm of x over each of `groups` groups of its columns.

    x:       [n, K]; weights: W_i [O_i, K], possibly prefix views; outs: [n, O_i], possibly views
    kinds:   `store`, `relu2` (the square of what is positive), `add` to what `out` holds
    norm:    [K], or None for no norm
    squares: [n, any multiple of groups], sums of squares of x by consecutive columns, where they
             are known already

    Products accumulate in fp32; an `out` in fp32 is stored as accumulated.
    """
    if norm is not None:
        parts = x.float().unflatten(-1, (groups, -1))
        if squares is None:
            mean = parts.pow(2).mean(-1)
        else:
            mean = squares.unflatten(-1, (groups, -1)).sum(-1) / parts.shape[-1]
        x = norm * (parts * torch.rsqrt(mean + eps)[..., None]).flatten(-2).to(x.dtype)
    for weight, out, kind in zip(weights, outs, kinds, strict=True):
        if out.dtype == torch.float32:
            y = F.linear(x.float(), weight.float())
        else:
            y = F.linear(x, weight)
        if kind == "relu2":
            y = y.relu().square()
        out.copy_(out + y if kind == "add" else y)


def mamba_step(
    projected: Tensor,
    state: Tensor,
    window: Tensor,
    journal: tuple[Tensor, Tensor, Tensor],
    conv: Tensor,
    conv_bias: Tensor | None,
    dt_bias: Tensor,
    decay: Tensor,
    skip: Tensor,
    min_step: float,
    slots: Tensor,
    sources: Tensor,
    entries: Tensor,
    counts: Tensor,
    out: Tensor,
    squares: Tensor,
) -> None:
    """One Mamba-2 layer between its projections; appends to the journal, writes nothing else.

    projected: [n, 2 H P + 2 G N + H]: gate, x, B, C, dt before softplus
    state:     [S, H, P, N]; window: [S, K - 1, C]; journal: inputs [S', J, C], scanned
               [S', J, H P + G N], dt [S', J, H] of this layer
    conv:      [C, K]; conv_bias: [C]; dt_bias, decay, skip: [H]
    entries:   [R], journal entries before the row's new tokens, which are read
    out:       [n, H P] <- y * silu(gate), zero for tokens that do not count
    squares:   [n, H] fp32 <- its sums of squares by head
    """
    inputs, scanned, dt = journal
    rows, heads = slots.numel(), state.shape[1]
    head_dim, size = state.shape[2:]
    inner, width, channels = heads * head_dim, scanned.shape[-1], conv.shape[0]
    length = projected.shape[0] // rows
    gate, new, step = projected.unflatten(0, (rows, length)).split([inner, channels, heads], -1)
    valid = (torch.arange(length, device=slots.device) < counts[:, None]) & (slots[:, None] >= 0)
    slots, sources = slots.clamp(min=0), sources.clamp(min=0)
    past = int(entries.max())
    old = torch.arange(past, device=slots.device) < entries[:, None]

    taps = conv.shape[1] - 1
    history = torch.cat([window[slots], inputs[sources, :past]], 1)
    at = entries[:, None] + torch.arange(taps, device=slots.device)
    history = history[torch.arange(rows, device=slots.device)[:, None], at]
    mixed = layers.causal_conv(history, new, conv, conv_bias)
    written, read = mixed.split([width, channels - width], -1)
    steps = F.softplus(step.float() + dt_bias.float()).clamp(min=min_step)

    row, t = valid.nonzero(as_tuple=True)
    place = sources[row], entries[row] + t
    inputs[place], scanned[place], dt[place] = new[row, t], written[row, t], steps[row, t]
    y = layers.ssm_scan(
        state[slots],
        torch.cat([scanned[sources, :past].masked_fill(~old[..., None], 0), written], 1),
        torch.cat(
            [dt[sources, :past].masked_fill(~old[..., None], 0), steps * valid[..., None]], 1
        ),
        read.unflatten(-1, (-1, size)),
        decay,
        skip,
    )
    z = (y * F.silu(gate.float())).masked_fill(~valid[..., None], 0).flatten(0, 1)
    out.copy_(z)
    squares.copy_(z.unflatten(-1, (heads, head_dim)).pow(2).sum(-1))


def slot_attention(
    query: Tensor,
    fresh_keys: Tensor,
    fresh_values: Tensor,
    keys: Tensor,
    values: Tensor,
    slots: Tensor,
    starts: Tensor,
    counts: Tensor,
    out: Tensor,
) -> None:
    """Causal grouped-query attention of the new tokens, which enter keys and values.

    query:  [n, heads * D]; fresh_keys, fresh_values: [n, kv_heads * D], possibly views
    keys, values: [S, M, kv_heads, D] of this layer; starts: [R], position of the first new token
    out:    [n, heads * D], zero for tokens that do not count
    """
    rows = slots.numel()
    kv_heads, dim = keys.shape[2:]
    length = query.shape[0] // rows
    t = torch.arange(length, device=slots.device)
    valid = (t < counts[:, None]) & (slots[:, None] >= 0)
    positions = starts[:, None] + t
    row, token = valid.nonzero(as_tuple=True)
    for cache, fresh in ((keys, fresh_keys), (values, fresh_values)):
        new = fresh.unflatten(0, (rows, length)).unflatten(-1, (kv_heads, dim))
        cache[slots[row], positions[row, token]] = new[row, token]
    rows_of = zip(slots.clamp(min=0).tolist(), starts.tolist(), strict=True)
    found = layers.attention(
        query.unflatten(0, (rows, length)).unflatten(-1, (-1, dim)), keys, values, list(rows_of)
    )
    out.copy_(found.masked_fill(~valid[..., None], 0).flatten(0, 1))


def choose_experts(
    logits: Tensor,
    bias: Tensor,
    counts: Tensor,
    top_k: int,
    normalise: bool,
    scale: float,
    plan: Plan,
) -> None:
    """Fill `plan` with the top-k experts of every token that counts; see `reference.route`.

    logits: [n, E] fp32 of the router; bias: [E] fp32; counts: [R]
    """
    length = logits.shape[0] // counts.numel()
    scores = logits.sigmoid()
    chosen = (scores + bias).topk(top_k, -1).indices
    weights = scores.gather(1, chosen)
    if normalise:
        weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
    weights = weights * scale
    plan.shares.copy_(weights.flatten())
    plan.places.fill_(-1)
    of_expert: dict[int, list[tuple[int, int, float]]] = {}
    for token, (row, shares) in enumerate(zip(chosen.tolist(), weights.tolist(), strict=True)):
        if token % length < counts[token // length]:
            for choice, (expert, share) in enumerate(zip(row, shares, strict=True)):
                of_expert.setdefault(expert, []).append((token, token * top_k + choice, share))
    item = pair = 0
    for expert in sorted(of_expert):
        members = of_expert[expert]
        for begin in range(0, len(members), plan.item_tokens):
            part = members[begin : begin + plan.item_tokens]
            plan.items[:, item] = torch.tensor([expert, pair, len(part)])
            span = slice(pair, pair + len(part))
            plan.tokens[span] = torch.tensor([token for token, _, _ in part])
            plan.weights[span] = torch.tensor([share for _, _, share in part])
            plan.places[[choice for _, choice, _ in part]] = torch.arange(
                pair, pair + len(part), dtype=torch.int32, device=logits.device
            )
            item, pair = item + 1, pair + len(part)
    plan.counts.copy_(torch.tensor([item, len(of_expert)]))


def experts_up(
    x: Tensor,
    norm: Tensor,
    eps: float,
    choice: Choice,
    up: Tensor,
    plan: Plan,
    inner: Tensor,
    shared_up: Tensor,
    dense: Tensor,
) -> None:
    """The choice of experts, and their first half after an RMSNorm of x [n, K].

    plan <- the experts that `choice` gives, whose logits are router(x)
    dense [n, Fs] <- relu(shared_up(x)) ** 2, shared_up [Fs, K], possibly a prefix view
    inner [n * k, F] <- relu(up(x)) ** 2 of the pairs, in their order; up [E, F, K], likewise
    """
    logits = torch.empty(len(x), len(choice.router), dtype=torch.float32, device=x.device)
    norm_linear(x, [choice.router, shared_up], [logits, dense], ["store", "relu2"], norm, eps=eps)
    choose_experts(logits, *choice[1:], plan)
    x = layers.rms_norm(x, norm, eps)
    for expert, first, count in plan.items[:, : int(plan.counts[0])].T.tolist():
        tokens = plan.tokens[first : first + count].long()
        inner[first : first + count] = F.linear(x[tokens], up[expert]).relu().square()


def experts_down(
    x: Tensor,
    inner: Tensor,
    down: Tensor,
    plan: Plan,
    shared_inner: Tensor,
    shared_down: Tensor,
) -> None:
    """x [n, K] += the weighted sum of down(inner) over each token's experts, and the shared one's.

    inner: [n * k, F]; down: [E, K, F], possibly a prefix view; shared_inner: [n, Fs];
    shared_down: [K, Fs]
    """
    total = torch.zeros(x.shape, dtype=torch.float32, device=x.device)
    for expert, first, count in plan.items[:, : int(plan.counts[0])].T.tolist():
        span = slice(first, first + count)
        out = F.linear(inner[span], down[expert]).float() * plan.weights[span, None]
        total.index_add_(0, plan.tokens[span].long(), out)
    total += F.linear(shared_inner, shared_down).float()
    x += total.to(x.dtype)


def pick_tokens(
    logits: Tensor, picked: Tensor, latest: Tensor, slots: Tensor, table: Tensor | None = None
) -> None:
    """picked [R], latest[slots] <- the likeliest id of each row of logits [R, V] fp32.

    The lowest among equals; -1 for a row with a logit that is not finite.

    table: [5, R] slots, starts, entries, counts and ids of the pass that ends here, moved on to
           the pass over what was picked: starts and entries behind what was run, ids -1
    """
    best = torch.where(logits.isfinite().all(1), logits.argmax(1), -1)
    picked.copy_(best)
    latest[slots[slots >= 0]] = best[slots >= 0]
    if table is not None:
        _, starts, entries, counts, ids = table
        starts += counts
        entries += counts
        ids.fill_(-1)
