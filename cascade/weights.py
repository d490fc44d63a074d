"""The weights of one model as plain tensors, and the prefix views that make its slices.

A slice keeps the first `hidden` channels of the residual stream and the first `ffn` channels
of each routed expert (arXiv 2605.07182). Everything else is shared whole, so `narrow` returns
views only: the same storage, no bytes allocated.

Letters in shapes: V vocabulary, H residual width, F routed expert width, E experts.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import TypeAlias

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class MambaWeights:
    """A Mamba-2 mixer. C = inner + 2 * groups * state channels pass the convolution."""

    in_proj: Tensor  # [inner + C + heads, H]
    in_bias: Tensor | None  # [inner + C + heads]
    conv: Tensor  # [C, K]
    conv_bias: Tensor | None  # [C]
    dt_bias: Tensor  # [heads]
    decay: Tensor  # [heads], fp32, A = -exp(A_log)
    skip: Tensor  # [heads], D
    norm: Tensor  # [inner]
    out_proj: Tensor  # [H, inner]
    out_bias: Tensor | None  # [H]

    def narrow(self, hidden: int, ffn: int) -> MambaWeights:
        return MambaWeights(
            in_proj=self.in_proj[:, :hidden],
            in_bias=self.in_bias,
            conv=self.conv,
            conv_bias=self.conv_bias,
            dt_bias=self.dt_bias,
            decay=self.decay,
            skip=self.skip,
            norm=self.norm,
            out_proj=self.out_proj[:hidden],
            out_bias=_head(self.out_bias, hidden),
        )


@dataclass(frozen=True, slots=True)
class AttentionWeights:
    """Grouped-query attention without rotary embedding."""

    q_proj: Tensor  # [q_heads * head_dim, H]
    k_proj: Tensor  # [kv_heads * head_dim, H]
    v_proj: Tensor  # [kv_heads * head_dim, H]
    o_proj: Tensor  # [H, q_heads * head_dim]

    def narrow(self, hidden: int, ffn: int) -> AttentionWeights:
        return AttentionWeights(
            self.q_proj[:, :hidden],
            self.k_proj[:, :hidden],
            self.v_proj[:, :hidden],
            self.o_proj[:hidden],
        )


@dataclass(frozen=True, slots=True)
class MLPWeights:
    """A dense feed-forward layer, or the shared expert: down(relu(up(x)) ** 2)."""

    up: Tensor  # [width, H]
    up_bias: Tensor | None  # [width]
    down: Tensor  # [H, width]
    down_bias: Tensor | None  # [H]

    def narrow(self, hidden: int, ffn: int) -> MLPWeights:
        return MLPWeights(
            self.up[:, :hidden],
            self.up_bias,
            self.down[:hidden],
            _head(self.down_bias, hidden),
        )


@dataclass(frozen=True, slots=True)
class MoEWeights:
    """Routed experts with one shared expert.

    With latent projections the routed experts work in a space that no slice narrows.
    """

    router: Tensor  # [E, H]
    router_bias: Tensor  # [E], fp32, added to the scores for the choice only
    up: Tensor  # [E, F, H] or [E, F, latent]
    down: Tensor  # [E, H, F] or [E, latent, F]
    shared: MLPWeights
    latent_in: Tensor | None = None  # [latent, H]
    latent_in_bias: Tensor | None = None  # [latent]
    latent_out: Tensor | None = None  # [H, latent]
    latent_out_bias: Tensor | None = None  # [H]

    def narrow(self, hidden: int, ffn: int) -> MoEWeights:
        inner = hidden if self.latent_in is None else self.up.shape[2]
        return MoEWeights(
            router=self.router[:, :hidden],
            router_bias=self.router_bias,
            up=self.up[:, :ffn, :inner],
            down=self.down[:, :inner, :ffn],
            shared=self.shared.narrow(hidden, ffn),
            latent_in=None if self.latent_in is None else self.latent_in[:, :hidden],
            latent_in_bias=self.latent_in_bias,
            latent_out=_head(self.latent_out, hidden),
            latent_out_bias=_head(self.latent_out_bias, hidden),
        )


Mixer: TypeAlias = MambaWeights | AttentionWeights | MLPWeights | MoEWeights


@dataclass(frozen=True, slots=True)
class LayerWeights:
    """One block: x + mixer(norm(x))."""

    norm: Tensor  # [H]
    mixer: Mixer

    def narrow(self, hidden: int, ffn: int) -> LayerWeights:
        return LayerWeights(self.norm[:hidden], self.mixer.narrow(hidden, ffn))


@dataclass(frozen=True, slots=True)
class ModelWeights:
    """A whole model, or a slice of one."""

    embeddings: Tensor  # [V, H]
    layers: tuple[LayerWeights, ...]
    norm: Tensor  # [H]
    head: Tensor  # [V, H]

    @property
    def hidden(self) -> int:
        return self.embeddings.shape[1]

    @property
    def device(self) -> torch.device:
        return self.embeddings.device

    @property
    def dtype(self) -> torch.dtype:
        return self.embeddings.dtype

    def narrow(self, hidden: int, ffn: int) -> ModelWeights:
        """The slice of residual width `hidden` and routed expert width `ffn`: views only."""
        return ModelWeights(
            embeddings=self.embeddings[:, :hidden],
            layers=tuple(layer.narrow(hidden, ffn) for layer in self.layers),
            norm=self.norm[:hidden],
            head=self.head[:, :hidden],
        )

    def named_tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Every tensor with a dotted name, `layers.3.mixer.up` for example."""
        return _walk("", self)


def _head(tensor: Tensor | None, count: int) -> Tensor | None:
    return None if tensor is None else tensor[:count]


def _walk(prefix: str, node: object) -> Iterator[tuple[str, Tensor]]:
    if isinstance(node, Tensor):
        yield prefix, node
    elif isinstance(node, tuple):
        for index, child in enumerate(node):
            yield from _walk(f"{prefix}.{index}", child)
    elif node is not None:
        for field in fields(node):  # type: ignore[arg-type]
            name = f"{prefix}.{field.name}" if prefix else field.name
            yield from _walk(name, getattr(node, field.name))
