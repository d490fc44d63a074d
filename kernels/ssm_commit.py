"""Launcher of ssm_commit.cu."""

from __future__ import annotations

import torch
from torch import Tensor

from cascade.kernels import checks
from cascade.kernels.compiler import Kernel

CHUNK = 16  # journal entries in shared memory at once, as in the .cu
THREADS = 256
NUMBERS = 32  # state elements of a thread
LARGEST = 512  # state size N whose chunk fits into 48 KiB of shared memory

_FP32 = (torch.float32,)
_NAMES = {torch.float32: "f32", torch.bfloat16: "bf16"}
_KERNELS = {
    (state, entry): Kernel("ssm_commit", f"replay_{_NAMES[state]}_{_NAMES[entry]}", 17)
    for state in checks.STORED
    for entry in checks.STORED
}


def ssm_commit(
    state: Tensor,
    scanned: Tensor,
    dt: Tensor,
    decay: Tensor,
    rows: Tensor,
    sources: Tensor,
    counts: Tensor,
) -> None:
    """Replay journal entries into the SSM states: all layers and rows in one launch.

    See reference.ssm_commit. P must be a multiple of 4, N of 4 (fp32 state) or 8 (bf16 state) and
    at most 512. A slot whose count is zero is neither read nor written.
    """
    shape = layers, slots, heads, head_dim, size = checks.sizes("state", state, "L S H P N")
    states = checks.array("state", state, checks.STORED, shape)
    _, journal_rows, entries, channels = checks.sizes("scanned", scanned, "L S' J HP+GN")
    lines = layers, journal_rows, entries
    journal = checks.array("scanned", scanned, checks.STORED, (*lines, channels))
    steps = checks.array("dt", dt, _FP32, (*lines, heads))
    rates = checks.array("decay", decay, _FP32, (layers, heads))
    number = rows.numel()
    numbers = (
        checks.index("rows", rows, number),
        checks.index("sources", sources, number),
        checks.index("counts", counts, number),
    )
    width = 4 if state.dtype == torch.float32 else 8
    checks.within("the state size N", size, 1, LARGEST)
    checks.multiple("the state size N", size, width)
    checks.multiple("the head dim P", head_dim, 4)
    groups, rest = divmod(channels - heads * head_dim, size)
    if rest or groups < 1 or heads % groups:
        raise checks.KernelArgumentError(
            f"scanned has {channels} channels; expected H * P + G * N = {heads} * {head_dim} + "
            f"G * {size} with G a divisor of {heads}"
        )
    checks.aligned("state", states)
    checks.aligned("scanned", journal)
    largest = max(layers * slots, layers * journal_rows * entries, heads * head_dim * size)
    checks.within("the largest of L * S, L * S' * J and H * P * N", largest, 0, 1 << 31)
    device = checks.one_gpu(state, scanned, dt, decay, rows, sources, counts)
    if not (layers and number and entries and heads and head_dim):
        return
    across = size // width
    per_thread = NUMBERS // width
    wanted = min(32, THREADS // across, -(-head_dim // per_thread))
    down = max(wanted, -(-32 // across), 1)  # a whole warp weighs the entries
    block_rows = down * per_thread
    tiles = -(-head_dim // block_rows)
    _KERNELS[state.dtype, scanned.dtype].launch(
        device,
        (heads * tiles, number, layers),
        (across, down, 1),
        (
            states,
            journal,
            steps,
            rates,
            *numbers,
            slots,
            journal_rows,
            entries,
            heads,
            head_dim,
            size,
            channels,
            tiles,
            _inverse(tiles),
            _inverse(heads // groups),
        ),
        4 * (CHUNK * (size + block_rows) + CHUNK + 1),
    )


def _inverse(of: int) -> int:
    """ceil(2^32 / of), by which the kernel divides."""
    return -(-(1 << 32) // of)
