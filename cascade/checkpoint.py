"""Load a `nemotron_h` checkpoint, once, as plain tensors.

Everything that can be wrong with the files or the config is found before a weight is read;
transformers reads the weights, and of its model only the tensors are kept.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cascade.config import quiet, read_config
from cascade.errors import CheckpointError
from cascade.fetch import locate
from cascade.files import Stored, check_tensors, some, stored_tensors
from cascade.placement import own_dtype, resolve_device, resolve_dtype
from cascade.tensors import (
    EMBEDDINGS,
    FINAL_NORM,
    HEAD,
    ROUTED,
    canonical,
    is_ignored,
    stored_names,
)
from cascade.weights import (
    AttentionWeights,
    LayerWeights,
    MambaWeights,
    Mixer,
    MLPWeights,
    ModelWeights,
    MoEWeights,
)


@dataclass(frozen=True, slots=True)
class LoadedCheckpoint:
    """A checkpoint in memory.

    config:    `NemotronHConfig`
    weights:   the parent's, the one resident copy; on a CPU in the files' own dtype they are
               mapped from the files, which must not be rewritten in place meanwhile
    directory: where config, tokenizer and `elastic.json` stand; None if nowhere
    """

    config: Any
    weights: ModelWeights
    directory: Path | None
    name: str


def load(
    path: str | Path,
    *,
    device: str | torch.device = "auto",
    dtype: str | torch.dtype = "auto",
    device_map: Any = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> LoadedCheckpoint:
    """Load `"nano"`, a directory, or a Hub id, onto one device.

    device:     `auto` is the GPU where there is one
    dtype:      `auto` is float32 on a CPU and the checkpoint's own elsewhere; `checkpoint` is its
                own everywhere. The router's correction bias is float32 in any case.
    device_map: as in transformers, as long as it names one device
    trust_remote_code: a permission that nothing needs: transformers has this architecture, and
                code of a checkpoint is not run either way

    Raises CheckpointError (missing, corrupt, not finite), UnsupportedModel (another architecture
    or feature), RequestError (device, dtype or device_map).
    """
    target = resolve_device(device, device_map)
    chosen = resolve_dtype(dtype)
    directory, name = locate(path, revision)
    config = read_config(directory)
    stored = stored_tensors(directory)
    check_tensors(config, stored)
    if chosen is None:
        wide = dtype == "auto" and target.type == "cpu"
        chosen = torch.float32 if wide else own_dtype(config, stored)
    tensors = _read(directory, config, chosen, target)
    _check_finite(tensors, stored, config.n_routed_experts)
    return LoadedCheckpoint(config, assemble(config, tensors), directory, name)


def assemble(config: Any, tensors: Mapping[str, Tensor]) -> ModelWeights:
    """Tensors by transformers' names as ModelWeights: the same storage, nothing copied.

    Only `decay`, [heads] fp32, is computed: A = -exp(A_log).
    """
    makers = {
        "linear_attention": _mamba,
        "full_attention": _attention,
        "mlp": _mlp,
        "moe": _moe,
    }
    return ModelWeights(
        embeddings=tensors[EMBEDDINGS],
        layers=tuple(
            LayerWeights(
                tensors[f"model.layers.{index}.norm.weight"],
                makers[kind](tensors, f"model.layers.{index}.mixer"),
            )
            for index, kind in enumerate(config.layers_block_type)
        ),
        norm=tensors[FINAL_NORM],
        head=tensors[HEAD],
    )


def _mamba(t: Mapping[str, Tensor], at: str) -> Mixer:
    return MambaWeights(
        in_proj=t[f"{at}.in_proj.weight"],
        in_bias=t.get(f"{at}.in_proj.bias"),
        conv=t[f"{at}.conv1d.weight"][:, 0],
        conv_bias=t.get(f"{at}.conv1d.bias"),
        dt_bias=t[f"{at}.dt_bias"],
        decay=-t[f"{at}.A_log"].float().exp(),
        skip=t[f"{at}.D"],
        norm=t[f"{at}.norm.weight"],
        out_proj=t[f"{at}.out_proj.weight"],
        out_bias=t.get(f"{at}.out_proj.bias"),
    )


def _attention(t: Mapping[str, Tensor], at: str) -> Mixer:
    return AttentionWeights(*(t[f"{at}.{name}_proj.weight"] for name in "qkvo"))


def _mlp(t: Mapping[str, Tensor], at: str) -> MLPWeights:
    return MLPWeights(
        up=t[f"{at}.up_proj.weight"],
        up_bias=t.get(f"{at}.up_proj.bias"),
        down=t[f"{at}.down_proj.weight"],
        down_bias=t.get(f"{at}.down_proj.bias"),
    )


def _moe(t: Mapping[str, Tensor], at: str) -> Mixer:
    return MoEWeights(
        router=t[f"{at}.gate.weight"],
        router_bias=t[f"{at}.gate.e_score_correction_bias"].float(),
        up=t[f"{at}.experts.up_proj"],
        down=t[f"{at}.experts.down_proj"],
        shared=_mlp(t, f"{at}.shared_experts"),
        latent_in=t.get(f"{at}.fc1_latent_proj.weight"),
        latent_in_bias=t.get(f"{at}.fc1_latent_proj.bias"),
        latent_out=t.get(f"{at}.fc2_latent_proj.weight"),
        latent_out_bias=t.get(f"{at}.fc2_latent_proj.bias"),
    )


def _read(
    directory: Path, config: Any, dtype: torch.dtype, device: torch.device
) -> dict[str, Tensor]:
    """Every tensor by transformers' name, detached; the model that held them is dropped."""
    from transformers import NemotronHForCausalLM

    reader: Any = NemotronHForCausalLM  # with loading info it returns a pair, unknown to its types
    try:
        with quiet():
            model, report = reader.from_pretrained(
                directory,
                config=config,
                dtype=dtype,
                device_map={"": device},
                use_safetensors=True,
                local_files_only=True,
                output_loading_info=True,
            )
    except torch.OutOfMemoryError as error:
        raise CheckpointError(
            f"{directory} in {dtype} does not fit the memory of {device}: {error}"
        ) from error
    except Exception as error:  # files that changed since they were checked, a bad disk, ...
        raise CheckpointError(f"{directory} could not be read: {error}") from error
    for problem in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        names = sorted(str(name) for name in report[problem] if not is_ignored(str(name)))
        if names:
            raise CheckpointError(
                f"{directory}: transformers reports {problem.replace('_', ' ')}: {some(names)}"
            )
    return {
        name: tensor.detach()
        for source in (model.named_parameters(), model.named_buffers())
        for name, tensor in source
    }


def _check_finite(
    tensors: Mapping[str, Tensor], stored: Mapping[str, Stored], experts: int
) -> None:
    """Raises CheckpointError naming a tensor, and its file, that holds NaN or infinity."""
    for name, tensor in tensors.items():
        if _is_finite(tensor.float().exp() if name.endswith("A_log") else tensor):
            continue
        bad = None
        if name.endswith(ROUTED):
            bad = next(expert for expert in range(experts) if not _is_finite(tensor[expert]))
        files = {canonical(found): at.file for found, at in stored.items()}
        file = files.get((name, bad)) or files[name, None]
        raise CheckpointError(
            f"{stored_names(name, experts)[bad or 0]} in {file} holds NaN or infinity as "
            f"{tensor.dtype}; the checkpoint is damaged, or too wide for this dtype"
        )


def _is_finite(tensor: Tensor) -> bool:
    # Both ends at once, NaN included, without a temporary of the tensor's size.
    low, high = torch.aminmax(tensor)
    return bool((low.isfinite() & high.isfinite()).item())
