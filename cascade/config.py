"""Read a checkpoint's config, refusing what cascade does not run before any weight is read."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from cascade.errors import CheckpointError, UnsupportedModel
from cascade.files import CONFIG, check_model_type, read_json

_POSITIVE: tuple[str, ...] = (
    "vocab_size", "hidden_size", "moe_intermediate_size", "max_position_embeddings",
    "mamba_num_heads", "mamba_head_dim", "n_groups", "ssm_state_size",
    "num_attention_heads", "num_key_value_heads", "head_dim",
)  # fmt: skip
_POSITIVE_ROUTED = ("n_routed_experts", "num_experts_per_tok", "n_group", "topk_group")
_MULTIPLES: tuple[tuple[str, str], ...] = (
    ("mamba_num_heads", "n_groups"),
    ("num_attention_heads", "num_key_value_heads"),
)
_MULTIPLES_ROUTED = (("n_routed_experts", "n_group"),)
_LIMITS = (("n_routed_experts", "num_experts_per_tok"), ("n_group", "topk_group"))


def read_config(directory: Path) -> Any:
    """The `NemotronHConfig` of a directory; its `auto_map` is not followed.

    Raises CheckpointError for one that is missing, unreadable or contradicts itself,
    UnsupportedModel for another architecture or a feature that cascade does not run.
    """
    path = directory / CONFIG
    raw = read_json(path)
    check_model_type(raw, path)
    _check_supported(raw, path)
    from transformers import NemotronHConfig

    try:
        with quiet():
            config = NemotronHConfig.from_dict(raw)
    except Exception as error:  # a strict dataclass: its errors, KeyError, TypeError, ...
        raise CheckpointError(
            f"{path} is not a valid config: {type(error).__name__}: {error}"
        ) from error
    _check_sizes(config, raw, path)
    return config


def _check_supported(raw: Mapping[str, Any], path: Path) -> None:
    """Raises UnsupportedModel for a feature that neither transformers nor cascade would run."""
    refused = {
        "quantization_config": "quantized weights are not read; use the bf16 checkpoint",
        "tie_word_embeddings": "transformers gives this architecture a head of its own",
        "attention_bias": "attention has no biases here",
        "sliding_window": "attention sees the whole context here",
    }
    for field, why in refused.items():
        if raw.get(field):
            raise UnsupportedModel(f"{path} sets {field}={raw[field]!r}: {why}")
    if raw.get("mamba_proj_bias") and not raw.get("use_bias"):
        raise UnsupportedModel(f"{path} sets mamba_proj_bias without use_bias, which alone counts")
    for field, known in (("mlp_hidden_act", ("relu2",)), ("mamba_hidden_act", ("silu", "swish"))):
        if raw.get(field, known[0]) not in known:
            raise UnsupportedModel(f"{path} sets {field}={raw[field]!r}; cascade runs {known[0]!r}")


def _check_sizes(config: Any, raw: Mapping[str, Any], path: Path) -> None:
    """Sizes that contradict each other, and that would otherwise fail deep in a forward pass."""
    kinds = config.layers_block_type
    if raw.get("num_hidden_layers") not in (None, len(kinds)):
        raise CheckpointError(
            f"{path} has num_hidden_layers={raw['num_hidden_layers']}, but its pattern has "
            f"{len(kinds)} layers"
        )
    if "linear_attention" not in kinds:
        raise UnsupportedModel(f"{path} has no Mamba layer ({config.hybrid_override_pattern})")
    routed = "moe" in kinds
    for field in _POSITIVE + (_POSITIVE_ROUTED if routed else ()):
        if getattr(config, field) < 1:
            raise CheckpointError(f"{path}: {field}={getattr(config, field)} is not positive")
    if config.conv_kernel < 2:
        raise UnsupportedModel(f"{path}: conv_kernel={config.conv_kernel}; cascade needs 2 or more")
    for whole, part in _MULTIPLES + (_MULTIPLES_ROUTED if routed else ()):
        if getattr(config, whole) % getattr(config, part):
            raise CheckpointError(
                f"{path}: {whole}={getattr(config, whole)} is no multiple of "
                f"{part}={getattr(config, part)}"
            )
    for most, part in _LIMITS if routed else ():
        if getattr(config, part) > getattr(config, most):
            raise CheckpointError(
                f"{path}: {part}={getattr(config, part)} is more than "
                f"{most}={getattr(config, most)}"
            )


@contextmanager
def quiet() -> Iterator[None]:
    """transformers without progress bars, log lines below errors, or warnings."""
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()
