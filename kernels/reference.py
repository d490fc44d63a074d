"""Every kernel in plain PyTorch: the definition that the CUDA versions must match.

Functions named `*_commit`, `*_stamp`, `*_copy`, `*_keep` and `*_compact` write in place into the
cache; the others return new tensors. `rows [R]` are slot numbers, `sources [R]` the rows of the
journal that hold a slot's entries (the same numbers for the resident journal). Row numbers within
one call are distinct.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from cascade.kernels.plan import ANY, Limits
from cascade.kernels.reference_decode import (
    choose_experts,
    embed_tokens,
    experts_down,
    experts_up,
    mamba_step,
    norm_linear,
    pick_tokens,
    slot_attention,
)
from cascade.kernels.reference_layers import (
    advance,
    attention,
    causal_conv,
    experts,
    fits_spans,
    gated_norm,
    rms_norm,
    route,
    split_scanned,
    ssm_scan,
)

__all__ = [
    "CAPTURABLE",
    "accept_resample",
    "attention",
    "cache_digest",
    "causal_conv",
    "choose_experts",
    "conv_commit",
    "embed_tokens",
    "experts",
    "experts_down",
    "experts_up",
    "fits_spans",
    "fork_copy",
    "gated_norm",
    "journal_keep",
    "kv_compact",
    "mamba_step",
    "norm_linear",
    "pick_tokens",
    "provenance_stamp",
    "race_sample",
    "rms_norm",
    "route",
    "short_pass_limits",
    "short_pass_obstacle",
    "slot_attention",
    "ssm_commit",
    "ssm_scan",
]

CAPTURABLE = False  # some functions read numbers back to the host
GOLDEN = -7046029254386353131  # 2**64 / golden ratio, as a signed 64-bit integer

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
        x, write = split_scanned(entries, heads, head_dim, groups, size)
        cumulative = (steps * decay[layer]).cumsum(1)
        state[layer, rows] = advance(
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


def short_pass_obstacle(arch: object, dtype: torch.dtype, entries: int) -> str | None:
    """Nothing hinders plain PyTorch; see `cascade.kernels.limits`."""
    return None


def short_pass_limits(arch: object, depth: int, shared: bool, device: torch.device) -> Limits:
    """As much as there is; see `cascade.kernels.limits`."""
    return Limits(pairs=ANY, tokens=ANY)


# ---- shared pieces -----------------------------------------------------------------------------


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
