"""What happens between the projections of a Mamba-2 layer: checks, and which kernel does it."""

from __future__ import annotations

import torch
from torch import Tensor

from cascade.kernels import checks, mamba_decode, mamba_verify

TAPS = 4  # as in mamba.cuh
LARGEST_SHARED = 200 * 1024

_BF16, _FP32 = (torch.bfloat16,), (torch.float32,)


def largest_size(head_dim: int) -> int:
    """The state size that goes with a head dim: two channels of P + 2 N a thread of 4 P."""
    return 7 * head_dim // 2


def shared_bytes(entries: int, head_dim: int, size: int) -> int:
    """Shared memory that a block needs at least, for journals of `entries` tokens."""
    return max(
        mamba_decode.shared_bytes(entries, head_dim, size, 1),
        mamba_verify.shared_bytes(entries, head_dim, size),
    )


def layer_sizes(projected: Tensor, state: Tensor, inputs: Tensor) -> tuple[int, ...]:
    """S, H, P, N and G of a layer, from tensors [n, W], [S, H, P, N] and [S', J, C] that agree."""
    slots_held, heads, head_dim, size = checks.sizes("state", state, "S H P N")
    channels = checks.sizes("inputs", inputs, "S' J C")[2]
    columns = checks.sizes("projected", projected, "n W")[1]
    inner = heads * head_dim
    groups, rest = divmod(channels - inner, 2 * size)
    if rest or groups < 1 or heads % groups or columns != inner + channels + heads:
        raise checks.KernelArgumentError(
            f"inputs have {channels} channels and projected {columns} columns; expected "
            f"{inner} + 2 G * {size} with G a divisor of {heads}, and {inner} + C + {heads}"
        )
    if size not in mamba_decode.SIZES:
        raise checks.KernelArgumentError(
            f"the state size N is {size}; expected one of {mamba_decode.SIZES}"
        )
    return slots_held, heads, head_dim, size, groups


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
    """One Mamba-2 layer between its projections, for the tokens of a short pass.

    See reference_decode.mamba_step. bf16 but for the state (fp32 or bf16), `dt` and `decay`; four
    taps, N of 16, 32, 64 or 128, P a multiple of 8 and at most 64. A row of a negative slot, or
    whose tokens do not fit into the journal, is left out.
    """
    inputs, scanned, dt = journal
    slots_held, heads, head_dim, size, groups = layer_sizes(projected, state, inputs)
    sources_held, held, channels = inputs.shape
    rows, (tokens, columns), inner = slots.numel(), projected.shape, heads * head_dim
    checks.within("the head dim P", head_dim, 8, 64)
    checks.multiple("the head dim P", head_dim, 8)
    checks.within("the state size N", size, 1, largest_size(head_dim))
    checks.within("the number of taps", conv.shape[-1], TAPS, TAPS)
    checks.multiple("the number of tokens", tokens, max(rows, 1))
    address, stride = checks.strided("projected", projected, _BF16, (tokens, columns))
    shared = shared_bytes(held, head_dim, size)
    checks.within("the journal's entries J, by shared memory,", shared, 0, LARGEST_SHARED)
    lines = sources_held, held
    places = (
        checks.array("state", state, checks.STORED, state.shape),
        checks.array("window", window, _BF16, (slots_held, TAPS - 1, channels)),
        checks.array("inputs", inputs, _BF16, (*lines, channels)),
        checks.array("scanned", scanned, _BF16, (*lines, inner + groups * size)),
        checks.array("dt", dt, _FP32, (*lines, heads)),
        checks.array("conv", conv, _BF16, (channels, TAPS)),
        0 if conv_bias is None else checks.array("conv_bias", conv_bias, _BF16, (channels,)),
        checks.array("dt_bias", dt_bias, _BF16, (heads,)),
        checks.array("decay", decay, _FP32, (heads,)),
        checks.array("skip", skip, _BF16, (heads,)),
        checks.array("out", out, _BF16, (tokens, inner)),
        checks.array("squares", squares, _FP32, (tokens, heads)),
        checks.index("slots", slots, rows),
        checks.index("sources", sources, rows),
        checks.index("entries", entries, rows),
        checks.index("counts", counts, rows),
    )
    vectors = "state", "window", "inputs", "scanned", "dt", "conv", "conv_bias"
    for name, place in zip(vectors, places, strict=False):
        checks.aligned(name, place)
    given = [] if conv_bias is None else [conv_bias]
    device = checks.one_gpu(
        projected, state, window, *journal, conv, *given, dt_bias, decay, skip, slots, sources,
        entries, counts, out, squares,
    )  # fmt: skip
    if not (rows and tokens and heads):
        return
    arguments = [
        address,
        *places,
        stride,
        tokens // rows,
        slots_held,
        sources_held,
        held,
        heads,
        groups,
        checks.float_bits(min_step),
    ]
    if tokens == rows:
        mamba_decode.launch(device, state, rows, groups, held, arguments)
    else:
        mamba_verify.launch(device, state, rows, tokens // rows, held, arguments)
