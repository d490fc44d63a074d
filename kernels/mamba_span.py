"""Launcher of mamba_span.cu."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from cascade.kernels import checks
from cascade.kernels.compiler import Kernel
from cascade.kernels.mamba_decode import NAMES, SIZES
from cascade.kernels.mamba_step import TAPS, layer_sizes

THREADS, RUN, CHUNK, ROWS, LINE = 256, 16, 32, 32, 36  # as in the .cu

_BF16, _FP32 = (torch.bfloat16,), (torch.float32,)
_MEMBERS = 28
_CONVOLVE = Kernel("mamba_span", "convolve", _MEMBERS)
_SCANS = {
    (state, size): Kernel("mamba_span", f"scan_{NAMES[state]}_{size}", _MEMBERS)
    for state in NAMES
    for size in SIZES
}


def fits_spans(arch: Any, dtype: torch.dtype) -> bool:
    """Whether `mamba_span` takes a model's layers; `arch` has the sizes by Architecture's names."""
    return (
        dtype == torch.bfloat16
        and arch.conv_taps == TAPS
        and arch.state_size in SIZES
        and arch.heads % 4 == 0
        and arch.inner % (8 * arch.groups) == 0
    )


def mamba_span(
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
    begins: Tensor,
    counts: Tensor,
    longest: int,
) -> Tensor:
    """One Mamba-2 layer between its projections, for any number of tokens: y silu(gate) [n, H P].

    As reference_decode.mamba_step, but rows are packed: row r has tokens begins[r] to begins[r] +
    counts[r] of projected [n, W], at most `longest`. bf16 but for the state (fp32 or bf16), `dt`
    and `decay`; four taps, N of 16, 32, 64 or 128, H a multiple of 4. A row that is out of range is
    left out, and what it would have written is undefined.
    """
    inputs, scanned, dt = journal
    slots_held, heads, head_dim, size, groups = layer_sizes(projected, state, inputs)
    sources_held, held, channels = inputs.shape
    rows, (tokens, columns), inner = slots.numel(), projected.shape, heads * head_dim
    checks.multiple("the number of heads H", heads, 4)
    checks.within("the number of taps", conv.shape[-1], TAPS, TAPS)
    checks.within("the longest row", longest, 1, 16 * 65535)
    checks.within("the number of rows", rows, 1, 65535)
    lines = sources_held, held
    out = projected.new_empty(tokens, inner)
    read = projected.new_empty(tokens, groups * size)
    addresses = (
        checks.array("projected", projected, _BF16, (tokens, columns)),
        checks.array("state", state, checks.STORED, state.shape),
        checks.array("window", window, _BF16, (slots_held, TAPS - 1, channels)),
        checks.array("inputs", inputs, _BF16, (*lines, channels)),
        checks.array("scanned", scanned, _BF16, (*lines, inner + groups * size)),
        checks.array("dt", dt, _FP32, (*lines, heads)),
        read.data_ptr(),
        checks.array("conv", conv, _BF16, (channels, TAPS)),
        0 if conv_bias is None else checks.array("conv_bias", conv_bias, _BF16, (channels,)),
        checks.array("dt_bias", dt_bias, _BF16, (heads,)),
        checks.array("decay", decay, _FP32, (heads,)),
        checks.array("skip", skip, _BF16, (heads,)),
        out.data_ptr(),
        checks.index("slots", slots, rows),
        checks.index("sources", sources, rows),
        checks.index("entries", entries, rows),
        checks.index("begins", begins, rows),
        checks.index("counts", counts, rows),
    )
    for name, address in zip(("projected", "state", "window", "inputs"), addresses, strict=False):
        checks.aligned(name, address)
    given = [] if conv_bias is None else [conv_bias]
    device = checks.one_gpu(
        projected, state, window, *journal, conv, *given, dt_bias, decay, skip, slots, sources,
        entries, begins, counts,
    )  # fmt: skip
    if not tokens:
        return out
    arguments = (
        *addresses,
        columns,
        tokens,
        slots_held,
        sources_held,
        held,
        heads,
        head_dim,
        groups,
        size,
        checks.float_bits(min_step),
    )
    pieces = -(-channels // (4 * THREADS)) + 1
    _CONVOLVE.launch(device, (pieces, -(-longest // RUN), rows), (THREADS, 1, 1), arguments)
    _SCANS[state.dtype, size].launch(
        device,
        (heads * -(-head_dim // ROWS), rows, 1),
        (2 * size, 1, 1),
        arguments,
        4 * CHUNK * (2 * size + ROWS + LINE + 2),
    )
    return out
