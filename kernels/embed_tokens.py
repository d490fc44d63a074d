"""Launcher of embed_tokens.cu."""

from __future__ import annotations

import torch
from torch import Tensor

from cascade.kernels import checks
from cascade.kernels.compiler import Kernel

THREADS = 256

_BF16 = (torch.bfloat16,)
_KERNEL = Kernel("embed_tokens", "embed", 10, overlaps=True)


def embed_tokens(
    hidden: Tensor, embeddings: Tensor, ids: Tensor, latest: Tensor, slots: Tensor
) -> None:
    """hidden <- the embeddings of ids, or of the token last picked for a slot.

    See reference_decode.embed_tokens. bf16, a width that is a multiple of 8.
    """
    rows, length = checks.sizes("ids", ids, "R T")
    vocabulary, width = checks.sizes("embeddings", embeddings, "V H")
    table, stride = checks.strided("embeddings", embeddings, _BF16, (vocabulary, width))
    target = checks.array("hidden", hidden, _BF16, (rows * length, width))
    slots_held = latest.numel()
    numbers = (
        checks.array("ids", ids, checks.INDEX, (rows, length)),
        checks.index("latest", latest, slots_held),
        checks.index("slots", slots, rows),
    )
    checks.multiple("the width H", width, 8)
    checks.aligned("hidden", target)
    device = checks.one_gpu(hidden, embeddings, ids, latest, slots)
    if not (rows and length and width):
        return
    _KERNEL.launch(
        device,
        (rows * length, 1, 1),
        (THREADS, 1, 1),
        (target, table, *numbers, stride, width, length, vocabulary, slots_held),
    )
