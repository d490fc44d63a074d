"""Every kernel in plain PyTorch: the definition that the CUDA versions must match.

Functions named `*_commit`, `*_stamp`, `*_copy`, `*_keep` and `*_compact` write in place into the
cache; the others return new tensors. `rows [R]` are slot numbers, `sources [R]` the rows of the
journal that hold a slot's entries (the same numbers for the resident journal). Row numbers within
one call are distinct.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

CAPTURABLE = False  # some functions read numbers back to the host
GOLDEN = -7046029254386353131  # 2**64 / golden ratio, as a signed 64-bit integer
SCAN_CHUNK = 128
GATHER_LIMIT = 8  # (token, expert) pairs up to which experts are gathered rather than looped

# ---- committing what was run -------------------------------------------------------------------


def ssm_commit(
    state: Tensor,
    scanned: Tensor,
    dt: Tensor,
    decay: Tensor,
    rows: Tensor,
    sources: Tensor,
    counts: Tensor,
) -> None:
    """Replay the first `counts[r]` journal entries into the SSM states, all layers at once.

    state:   [L, S, H, P, N] fp32 or bf16, updated in place for slots `rows`
    scanned: [L, S', J, H * P + G * N], x and B after the convolution
    dt:      [L, S', J, H] fp32, after softplus
    decay:   [L, H] fp32, A (negative)

    h <- exp(A dt) h + dt x B^T, entry by entry (Mamba-2, arXiv 2405.21060, eq. 1). Arithmetic in
    fp32; a count of zero leaves the slot as it was.
    """
    longest = int(counts.max()) if counts.numel() else 0
    if longest == 0:
        return
    heads, head_dim, size = state.shape[2:]
    groups = (scanned.shape[-1] - heads * head_dim) // size
    used = torch.arange(longest, device=dt.device) < counts[:, None]
    for layer in range(state.shape[0]):
        # Entries past a row's count may hold anything, NaN of a failed pass included.
        entries = scanned[layer, sources, :longest].float().masked_fill(~used[..., None], 0)
        steps = dt[layer, sources, :longest].masked_fill(~used[..., None], 0)
        x, write = _split(entries, heads, head_dim, groups, size)
        cumulative = (steps * decay[layer]).cumsum(1)
        state[layer, rows] = _advance(
            state[layer, rows].float(), x * steps[..., None], write, cumulative
        ).to(state.dtype)


def conv_commit(
    window: Tensor, inputs: Tensor, rows: Tensor, sources: Tensor, counts: Tensor
) -> None:
    """Shift the first `counts[r]` journalled inputs into the convolution windows.

    window: [L, S, K - 1, C], the last K - 1 inputs of the convolution, oldest first
    inputs: [L, S', J, C], inputs before the convolution
    """
    if counts.numel() == 0 or int(counts.max()) == 0:
        return
    taps = window.shape[2]
    longest = int(counts.max())
    joined = torch.cat([window[:, rows], inputs[:, sources, :longest]], dim=2)
    last = counts[:, None] + torch.arange(taps, device=counts.device)
    index = last[None, :, :, None].expand(window.shape[0], -1, -1, window.shape[3])
    window[:, rows] = joined.gather(2, index)


def journal_keep(
    targets: Sequence[Tensor],
    journals: Sequence[Tensor],
    rows: Tensor,
    sources: Tensor,
    entries: Tensor,
) -> None:
    """Copy entry `entries[r]` of journal row `sources[r]` to entry 0 of the target's row `rows[r]`.

    targets: the parts of a journal, each [L, S, J, X] with an X of its own
    journals: as many, [L, S', J', X], possibly the same tensors
    """
    for target, journal in zip(targets, journals, strict=True):
        target[:, rows, 0] = journal[:, sources, entries]


def kv_compact(keys: Tensor, values: Tensor, rows: Tensor, starts: Tensor, kept: Tensor) -> None:
    """Move accepted positions together: `start + kept[r, i]` moves to `start + i`.

    keys, values: [L, S, M, heads, D]
    starts: [R], first position after the committed ones
    kept:   [R, X] strictly increasing offsets, padded with -1; kept[r, i] >= i
    """
    width = kept.shape[1]
    valid = kept >= 0
    row = rows[:, None].expand(-1, width)[valid]
    source = (starts[:, None] + kept)[valid]
    target = (starts[:, None] + torch.arange(width, device=kept.device))[valid]
    for cache in (keys, values):
        cache[:, row, target] = cache[:, row, source].clone()


def fork_copy(
    keys: Tensor,
    values: Tensor,
    window: Tensor,
    state: Tensor,
    source: int,
    targets: Tensor,
    length: int,
) -> None:
    """Copy one slot's first `length` positions, windows and states to every slot in `targets`."""
    for cache in (keys, values):
        cache[:, targets, :length] = cache[:, source, :length].unsqueeze(1).clone()
    for part in (window, state):
        part[:, targets] = part[:, source].unsqueeze(1).clone()


def provenance_stamp(
    provenance: Tensor, rows: Tensor, starts: Tensor, counts: Tensor, writers: Tensor
) -> None:
    """Record the writer of positions `[starts[r], starts[r] + counts[r])`.

    provenance: [S, M] int8, index of the slice that wrote a position, -1 where none did
    writers:    [R] slice numbers
    """
    position = torch.arange(provenance.shape[1], device=provenance.device)
    inside = (position >= starts[:, None]) & (position < (starts + counts)[:, None])
    provenance[rows] = torch.where(inside, writers[:, None].to(provenance.dtype), provenance[rows])


def cache_digest(
    keys: Tensor,
    values: Tensor,
    window: Tensor,
    state: Tensor,
    rows: Tensor,
    lengths: Tensor,
    block: int = 64,
) -> tuple[Tensor, Tensor]:
    """64-bit digests by which two caches can be compared without moving them.

    Returns (attention [La, R, ceil(M / block)], recurrent [Lm, R]), int64. A digest is the wrapping
    sum over elements of a hash of the element's index within its block and its bits, so the
    order of summation does not matter. Positions at or after `lengths[r]` do not count; a block
    without positions has digest 0. Equal bits give equal digests; unequal bits collide with
    probability about 2**-64. Not cryptographic.
    """
    blocks = -(-keys.shape[2] // block)
    attention = torch.zeros(
        keys.shape[0], rows.numel(), blocks, dtype=torch.int64, device=keys.device
    )
    recurrent = torch.zeros(state.shape[0], rows.numel(), dtype=torch.int64, device=state.device)
    for part, cache in enumerate((keys, values)):
        per_position = cache.shape[3] * cache.shape[4]
        for i in range(rows.numel()):
            length = int(lengths[i])
            bits = _bits(cache[:, rows[i], :length]).reshape(cache.shape[0], length, per_position)
            offset = torch.arange(length, device=bits.device) % block * per_position
            index = offset[:, None] + torch.arange(per_position, device=bits.device)
            hashed = _hash(bits, index * 4 + part).sum(2)
            where = torch.arange(length, device=bits.device) // block
            attention[:, i].index_add_(1, where, hashed)
    for part, cache in enumerate((window, state)):
        bits = _bits(cache[:, rows]).reshape(cache.shape[0], rows.numel(), -1)
        index = torch.arange(bits.shape[2], device=bits.device)
        recurrent += _hash(bits, index * 4 + 2 + part).sum(2)
    return attention, recurrent


# ---- sampling ----------------------------------------------------------------------------------


def race_sample(weights: Tensor, seeds: Tensor, positions: Tensor, stream: int = 0) -> Tensor:
    """Draw one index a row with probability proportional to `weights`.

    weights: [R, V] >= 0, any scale; seeds, positions: [R] int64; returns [R] int64.

    The exponential race: argmax of w_i / E_i with E_i = -ln U_i, where U_i depends on
    (seed, position, stream, i) alone. A row's draw is therefore the same whatever else is in
    the batch, and the same on every device up to the last bit of the logarithm.
    """
    index = torch.arange(weights.shape[1], device=weights.device)
    clock = -_uniform(seeds[:, None], positions[:, None], stream, index).log()
    return (weights.double() / clock).argmax(1)


def accept_resample(
    target: Tensor, draft: Tensor, ids: Tensor, counts: Tensor, seeds: Tensor, positions: Tensor
) -> tuple[Tensor, Tensor]:
    """Lossless speculative sampling (arXiv 2211.17192, algorithm 1), ragged over rows.

    target: [R, X + 1, V] probabilities of the verifier; row i is for drafted id i
    draft:  [R, X, V] probabilities that the drafted ids were really sampled from
    ids:    [R, X] drafted ids; counts: [R], how many of them are valid (0 <= count <= X)
    positions: [R], absolute position of the first drafted id

    Returns (accepted [R], following [R]): the length of the accepted prefix, and the id after it,
    drawn from the residual max(p - q, 0) after a rejection and from the bonus row otherwise.
    """
    number, width = ids.shape
    at = torch.arange(width, device=ids.device)
    p = target[:, :width].gather(2, ids[..., None]).squeeze(2).double()
    q = draft.gather(2, ids[..., None]).squeeze(2).double()
    coin = _uniform(seeds[:, None], positions[:, None] + at, 1, torch.zeros_like(at))
    kept = (coin * q < p) & (at < counts[:, None])
    accepted = kept.long().cumprod(1).sum(1)
    row = torch.arange(number, device=ids.device)
    after = target[row, accepted].double()
    if width:
        rejected = accepted < counts
        proposal = draft[row, accepted.clamp(max=width - 1)].double()
        residual = (after - proposal).clamp(min=0)
        # p == q up to rounding leaves no residual: then p itself is the right distribution.
        usable = rejected & (residual.sum(1) > 0)
        after = torch.where(usable[:, None], residual, after)
    return accepted, race_sample(after, seeds, positions + accepted, stream=2)


# ---- one layer's activations -------------------------------------------------------------------


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """RMSNorm over the last dimension, in fp32, scaled in the dtype of `x`."""
    wide = x.float()
    wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    return weight * wide.to(x.dtype)


def gated_norm(y: Tensor, gate: Tensor, weight: Tensor, groups: int, eps: float) -> Tensor:
    """RMSNorm of y * silu(gate) over each of `groups` equal parts of the last dimension."""
    wide = y.float() * F.silu(gate.float())
    parts = wide.unflatten(-1, (groups, -1))
    parts = parts * torch.rsqrt(parts.pow(2).mean(-1, keepdim=True) + eps)
    normed: Tensor = weight * parts.flatten(-2).to(gate.dtype)
    return normed


def causal_conv(history: Tensor, inputs: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Depthwise causal convolution and SiLU.

    history: [R, K - 1, C], the inputs before; inputs: [R, T, C]; weight: [C, K]; returns [R, T, C].
    """
    joined = torch.cat([history, inputs], dim=1)
    length, taps = inputs.shape[1], weight.shape[1]
    out = joined[:, :length] * weight[:, 0]
    for tap in range(1, taps):
        out = torch.addcmul(out, joined[:, tap : tap + length], weight[:, tap])
    return F.silu(out if bias is None else out + bias)


def ssm_scan(
    state: Tensor, scanned: Tensor, dt: Tensor, read: Tensor, decay: Tensor, skip: Tensor
) -> Tensor:
    """The Mamba-2 scan over a state and a journal, without writing either.

    state:   [R, H, P, N], before the first entry
    scanned: [R, J + T, H * P + G * N], x and B of the journal's J entries and of T new tokens
    dt:      [R, J + T, H] fp32; zero marks an entry that does not exist
    read:    [R, T, G, N], C of the new tokens
    decay:   [H] fp32; skip: [H]
    Returns y [R, T, H * P] fp32 of the new tokens: the chunked state-space-dual form.
    """
    rows, length, groups, size = read.shape
    heads, head_dim = state.shape[1:3]
    total = scanned.shape[1]
    first_new = total - length
    x, write = _split(scanned.float(), heads, head_dim, groups, size)
    weighted = x * dt[..., None]
    read_heads = read.float().transpose(1, 2).repeat_interleave(heads // groups, 1)  # [R, H, T, N]
    running = state.float()
    outputs = []
    for begin in range(0, total, SCAN_CHUNK):
        end = min(begin + SCAN_CHUNK, total)
        cumulative = (dt[:, begin:end] * decay).cumsum(1)  # [R, n, H]
        first = max(begin, first_new)
        if first < end:
            now = cumulative[:, first - begin :].transpose(1, 2)  # [R, H, m]
            query = read_heads[:, :, first - first_new : end - first_new]
            gap = now[..., None] - cumulative.transpose(1, 2)[:, :, None]  # [R, H, m, n]
            future = torch.ones(gap.shape[2:], dtype=torch.bool, device=gap.device).triu(
                first - begin + 1
            )
            write_heads = (
                write[:, begin:end].permute(0, 2, 3, 1).repeat_interleave(heads // groups, 1)
            )
            mix = (query @ write_heads) * gap.masked_fill(future, -torch.inf).exp()
            y = mix @ weighted[:, begin:end].transpose(1, 2)  # [R, H, m, P]
            y = y + (query @ running.transpose(-1, -2)) * now.exp()[..., None]
            outputs.append(y.transpose(1, 2))
        if end < total:
            running = _advance(running, weighted[:, begin:end], write[:, begin:end], cumulative)
    y = torch.cat(outputs, 1) if len(outputs) > 1 else outputs[0]
    return (y + skip.float()[:, None] * x[:, first_new:]).reshape(rows, length, heads * head_dim)


def attention(
    query: Tensor, keys: Tensor, values: Tensor, rows: Tensor, positions: Tensor
) -> Tensor:
    """Causal grouped-query attention of new tokens over their slots.

    query: [R, T, heads, D]; keys, values: [S, M, kv_heads, D], holding the new tokens already
    positions: [R, T], absolute; a token sees positions up to its own. Returns [R, T, heads * D].
    """
    longest = min(int(positions.max()) + 1, keys.shape[1])  # a padded token may lie past the end
    if rows.numel() == 1:
        row = int(rows[0])
        keys, values = keys[row : row + 1, :longest], values[row : row + 1, :longest]
    else:
        keys, values = keys[rows, :longest], values[rows, :longest]
    visible = torch.arange(longest, device=query.device) <= positions[..., None]  # [R, T, longest]
    out = F.scaled_dot_product_attention(
        query.transpose(1, 2),
        keys.transpose(1, 2),
        values.transpose(1, 2),
        attn_mask=visible[:, None],
        enable_gqa=True,
    )
    return out.transpose(1, 2).flatten(2)


def route(
    x: Tensor,
    router: Tensor,
    bias: Tensor,
    top_k: int,
    num_groups: int,
    top_groups: int,
    normalise: bool,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Sigmoid routing with a choice-only bias and optional expert groups (arXiv 2412.19437).

    x: [T, H]; router: [E, H]; bias: [E] fp32. Returns (experts [T, k] int64, weights [T, k] fp32).
    """
    scores = F.linear(x.float(), router.float()).sigmoid()
    choice = scores + bias
    if num_groups > 1:
        grouped = choice.unflatten(-1, (num_groups, -1))
        best = grouped.topk(2, -1).values.sum(-1).topk(top_groups, -1).indices
        allowed = torch.zeros_like(grouped[..., 0], dtype=torch.bool).scatter_(1, best, True)
        choice = grouped.masked_fill(~allowed[..., None], -torch.inf).flatten(-2)
    experts = choice.topk(top_k, -1, sorted=False).indices
    weights = scores.gather(1, experts)
    if normalise:
        weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
    return experts, weights * scale


def experts(x: Tensor, up: Tensor, down: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
    """Weighted sum of the chosen experts, down(relu(up(x)) ** 2) each.

    x: [T, H]; up: [E, F, H]; down: [E, H, F]; chosen: [T, k] int64; weights: [T, k] fp32.
    `up` and `down` may be prefix views. Returns [T, H] in the dtype of `x`.
    """
    tokens, top_k = chosen.shape
    if tokens * top_k <= GATHER_LIMIT:
        flat = chosen.flatten()
        wide = x.repeat_interleave(top_k, 0)[:, :, None]  # [T * k, H, 1]
        inner = torch.bmm(up[flat], wide).relu().square()
        out = torch.bmm(down[flat], inner).view(tokens, top_k, -1)
        return (out * weights[..., None]).sum(1).to(x.dtype)
    result = torch.zeros(x.shape, dtype=weights.dtype, device=x.device)
    order = chosen.flatten().argsort()
    sizes = torch.bincount(chosen.flatten(), minlength=up.shape[0]).tolist()
    for expert, members in enumerate(order.split(sizes)):
        if members.numel():
            token = members // top_k
            inner = F.linear(x[token], up[expert]).relu().square()
            out = F.linear(inner, down[expert]) * weights.flatten()[members, None]
            result.index_add_(0, token, out.to(result.dtype))
    return result.to(x.dtype)


# ---- shared pieces -----------------------------------------------------------------------------


def _split(
    scanned: Tensor, heads: int, head_dim: int, groups: int, size: int
) -> tuple[Tensor, Tensor]:
    """x [R, T, H, P] and B [R, T, G, N] out of their joint storage."""
    x, write = scanned.split([heads * head_dim, groups * size], dim=-1)
    return x.unflatten(-1, (heads, head_dim)), write.unflatten(-1, (groups, size))


def _advance(state: Tensor, weighted: Tensor, write: Tensor, cumulative: Tensor) -> Tensor:
    """The state after a run of tokens: [R, H, P, N].

    weighted: [R, T, H, P], dt x; write: [R, T, G, N]; cumulative: [R, T, H], running sum of A dt.
    """
    last = cumulative[:, -1]
    remaining = (last[:, None] - cumulative).exp()
    left = (weighted * remaining[..., None]).permute(0, 2, 3, 1)  # [R, H, P, T]
    right = write.transpose(1, 2).repeat_interleave(state.shape[1] // write.shape[2], 1)
    return state * last.exp()[..., None, None] + left @ right


def _bits(tensor: Tensor) -> Tensor:
    """The bit patterns of a 16- or 32-bit tensor, as int64 without sign."""
    if tensor.element_size() == 2:
        return tensor.contiguous().view(torch.int16).long() & 0xFFFF
    return tensor.contiguous().view(torch.int32).long() & 0xFFFFFFFF


def _mix(x: Tensor) -> Tensor:
    """The finaliser of splitmix64 on int64 tensors (wrapping arithmetic, logical shifts)."""
    x = (x ^ ((x >> 30) & ((1 << 34) - 1))) * -4658895280553007687
    x = (x ^ ((x >> 27) & ((1 << 37) - 1))) * -7723592293110705685
    return x ^ ((x >> 31) & ((1 << 33) - 1))


def _hash(bits: Tensor, index: Tensor) -> Tensor:
    return _mix(_mix(index * GOLDEN + 1) ^ bits)


def _uniform(seeds: Tensor, positions: Tensor, stream: int, index: Tensor) -> Tensor:
    """Uniform in (0, 1), fp64, a function of its arguments alone (broadcast)."""
    key = _mix(seeds + (positions * 4 + (stream + 1)) * GOLDEN)
    drawn = _mix(key + (index + 1) * GOLDEN)
    # 52 bits: with 53, adding a half rounds the largest up, and U would be 1.
    return (((drawn >> 12) & ((1 << 52) - 1)).double() + 0.5) * 2.0**-52
