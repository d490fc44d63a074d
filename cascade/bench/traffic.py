"""What a pass must move: the bytes behind the floor.

Weights once each, of the routed experts only those that were chosen; the SSM states and windows of
every row; its keys and values. Activations are left out. Letters as in `cascade.weights`.
"""

from __future__ import annotations

from collections.abc import Sequence

from cascade.architecture import Architecture
from cascade.cache import Cache
from cascade.weights import ModelWeights, MoEWeights


def pass_bytes(
    weights: ModelWeights,
    cache: Cache,
    *,
    distinct: Sequence[float],
    rows: int,
    tokens: int,
    context: int,
) -> int:
    """Bytes of one pass over `tokens` tokens in `rows` rows of `context` tokens each.

    distinct: experts chosen by any of the tokens, for every MoE layer
    """
    return int(
        weight_bytes(weights, tokens, distinct)
        + rows * (_state_bytes(cache) + context * cache.arch.bytes_per_token(cache.dtype))
        + tokens * cache.arch.bytes_per_token(cache.dtype)
    )


def commit_bytes(cache: Cache, rows: int) -> int:
    """Bytes of folding journal entries: states and windows, read and written."""
    return 2 * rows * _state_bytes(cache)


def weight_bytes(weights: ModelWeights, tokens: int, distinct: Sequence[float]) -> float:
    """Bytes of weights that one pass reads; of the embeddings one row a token."""
    everything = sum(tensor.nbytes for _, tensor in weights.named_tensors())
    moe = [layer.mixer for layer in weights.layers if isinstance(layer.mixer, MoEWeights)]
    unread = sum(
        (mixer.up.nbytes + mixer.down.nbytes) * (1 - count / len(mixer.up))
        for mixer, count in zip(moe, distinct, strict=True)
    )
    table = weights.embeddings
    return everything - unread - table.nbytes + tokens * table[0].nbytes


def _state_bytes(cache: Cache) -> int:
    arch: Architecture = cache.arch
    return arch.state_bytes(cache.state_dtype) + arch.window_bytes(cache.dtype)
