"""Every tensor of a `nemotron_h` checkpoint, by name and shape, from its config alone.

Counting parameters, checking a file before it is read and telling what is missing all use this
one table. Names are transformers' own; `canonical` maps the Hub's names to them.

Letters in shapes: V vocabulary, H residual width, F routed expert width, E experts, C channels
that pass the convolution, K its taps.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any, TypeAlias

Shape: TypeAlias = tuple[int, ...]

ROUTED = ("mixer.experts.up_proj", "mixer.experts.down_proj")
ROUTER_BIAS = "mixer.gate.e_score_correction_bias"
EMBEDDINGS, HEAD, FINAL_NORM = "model.embeddings.weight", "lm_head.weight", "model.norm_f.weight"

_EXPERT = re.compile(r"^(.*mixer\.experts)\.(\d+)\.(up_proj|down_proj)\.weight$")
_MTP = re.compile(r"(^|\.)mtp\.")


def tensor_shapes(
    config: Any, hidden: int | None = None, ffn: int | None = None
) -> dict[str, Shape]:
    """Name and shape of every tensor of a `NemotronHConfig`, narrowed to a slice's widths.

    With tied embeddings the head is not listed. Expert weights are listed stacked, [E, F, H] and
    [E, H, F].
    """
    hidden = hidden or config.hidden_size
    ffn = ffn or config.moe_intermediate_size
    shapes: dict[str, Shape] = {EMBEDDINGS: (config.vocab_size, hidden)}
    for index, kind in enumerate(config.layers_block_type):
        layer = f"model.layers.{index}"
        shapes[f"{layer}.norm.weight"] = (hidden,)
        for name, shape in _MIXERS[kind](config, hidden, ffn):
            shapes[f"{layer}.mixer.{name}"] = shape
    shapes[FINAL_NORM] = (hidden,)
    if not config.tie_word_embeddings:
        shapes[HEAD] = (config.vocab_size, hidden)
    return shapes


def canonical(name: str) -> tuple[str, int | None]:
    """transformers' name of a stored tensor, and the expert it belongs to if stored singly.

    >>> canonical("backbone.layers.1.mixer.experts.7.up_proj.weight")
    ('model.layers.1.mixer.experts.up_proj', 7)
    """
    if name.startswith("backbone."):
        name = "model." + name.removeprefix("backbone.")
    if match := _EXPERT.match(name):
        return f"{match[1]}.{match[3]}", int(match[2])
    return name, None


def stored_names(name: str, experts: int) -> list[str]:
    """The Hub's name of a tensor; for stacked experts one name for each, in order.

    >>> stored_names("model.layers.1.mixer.experts.up_proj", 1)
    ['backbone.layers.1.mixer.experts.0.up_proj.weight']
    """
    hub = "backbone." + name.removeprefix("model.") if name.startswith("model.") else name
    if not name.endswith(ROUTED):
        return [hub]
    stem, _, projection = hub.rpartition(".")
    return [f"{stem}.{expert}.{projection}.weight" for expert in range(experts)]


def is_ignored(name: str) -> bool:
    """Multi-token prediction heads (`mtp.*`) are not part of the model that cascade runs."""
    return _MTP.search(name) is not None


def _mamba(config: Any, hidden: int, ffn: int) -> Iterator[tuple[str, Shape]]:
    heads = config.mamba_num_heads
    inner = heads * config.mamba_head_dim
    channels = inner + 2 * config.n_groups * config.ssm_state_size
    projected = inner + channels + heads
    yield "in_proj.weight", (projected, hidden)
    yield "conv1d.weight", (channels, 1, config.conv_kernel)
    yield "dt_bias", (heads,)
    yield "A_log", (heads,)
    yield "D", (heads,)
    yield "norm.weight", (inner,)
    yield "out_proj.weight", (hidden, inner)
    if config.use_conv_bias:
        yield "conv1d.bias", (channels,)
    if config.use_bias:
        yield "in_proj.bias", (projected,)
        yield "out_proj.bias", (hidden,)


def _attention(config: Any, hidden: int, ffn: int) -> Iterator[tuple[str, Shape]]:
    queries = config.num_attention_heads * config.head_dim
    keys = config.num_key_value_heads * config.head_dim
    yield "q_proj.weight", (queries, hidden)
    yield "k_proj.weight", (keys, hidden)
    yield "v_proj.weight", (keys, hidden)
    yield "o_proj.weight", (hidden, queries)


def _linear(name: str, out: int, into: int, bias: bool) -> Iterator[tuple[str, Shape]]:
    yield f"{name}.weight", (out, into)
    if bias:
        yield f"{name}.bias", (out,)


def _mlp(config: Any, hidden: int, ffn: int) -> Iterator[tuple[str, Shape]]:
    yield from _linear("up_proj", config.intermediate_size, hidden, config.mlp_bias)
    yield from _linear("down_proj", hidden, config.intermediate_size, config.mlp_bias)


def _moe(config: Any, hidden: int, ffn: int) -> Iterator[tuple[str, Shape]]:
    experts, latent, bias = config.n_routed_experts, config.moe_latent_size, config.mlp_bias
    shared = config.moe_shared_expert_intermediate_size
    inner = latent or hidden
    yield "gate.weight", (experts, hidden)
    yield "gate.e_score_correction_bias", (experts,)
    yield "experts.up_proj", (experts, ffn, inner)
    yield "experts.down_proj", (experts, inner, ffn)
    yield from _linear("shared_experts.up_proj", shared, hidden, bias)
    yield from _linear("shared_experts.down_proj", hidden, shared, bias)
    if latent:
        yield from _linear("fc1_latent_proj", latent, hidden, bias)
        yield from _linear("fc2_latent_proj", hidden, latent, bias)


_MIXERS = {
    "linear_attention": _mamba,
    "full_attention": _attention,
    "mlp": _mlp,
    "moe": _moe,
}
