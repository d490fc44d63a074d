"""The kernels on an NVIDIA GPU: CUDA C++ through CuPy, and the reference for what has none.

Same names and signatures as `reference`. Every function launches on torch's current stream of the
tensors' device, copies nothing to or from the host and waits for nothing, so all that have a
kernel may be captured into a CUDA graph. What the host can check is refused with a
`KernelArgumentError` before anything is launched (`checks`).
"""

from __future__ import annotations

import cupy  # noqa: F401  (missing CuPy must fail here, when the backend is chosen)

from cascade.kernels.accept_resample import accept_resample
from cascade.kernels.cache_digest import cache_digest
from cascade.kernels.checks import KernelArgumentError
from cascade.kernels.choose_experts import choose_experts
from cascade.kernels.conv_commit import conv_commit
from cascade.kernels.embed_tokens import embed_tokens
from cascade.kernels.experts_down import experts_down
from cascade.kernels.experts_up import experts_up
from cascade.kernels.fork_copy import fork_copy
from cascade.kernels.group_norm import rms_norm
from cascade.kernels.journal_keep import journal_keep
from cascade.kernels.kv_compact import kv_compact
from cascade.kernels.limits import short_pass_limits, short_pass_obstacle
from cascade.kernels.mamba_span import fits_spans, mamba_span
from cascade.kernels.mamba_step import mamba_step
from cascade.kernels.norm_linear import norm_linear
from cascade.kernels.pick_tokens import pick_tokens
from cascade.kernels.prefill import attention, experts, route, ssm_scan
from cascade.kernels.provenance_stamp import provenance_stamp
from cascade.kernels.race_sample import race_sample
from cascade.kernels.reference_layers import causal_conv, gated_norm
from cascade.kernels.slot_attention import slot_attention
from cascade.kernels.ssm_commit import ssm_commit

CAPTURABLE = True  # the cache's functions may be captured into a CUDA graph

__all__ = [
    "CAPTURABLE",
    "KernelArgumentError",
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
    "mamba_span",
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
