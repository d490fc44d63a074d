"""The kernels on a processor: fewer and larger operations of PyTorch than the reference's.

Same names and signatures as `reference`, which stays the definition and serves what is not
float32. Nothing is compiled at run time. Small models are bound by the time an operation takes
to start (about a microsecond), so what counts here is their number.

The functions named `*_step` (`cpu_steps`) come on top: what decoding on a processor is made of.
"""

from __future__ import annotations

from cascade.kernels.cpu_steps import (
    attention_step,
    conv_step,
    dt_step,
    experts_step,
    gated_norm_step,
    mlp_step,
    norm_step,
    route_step,
    ssm_step,
)
from cascade.kernels.reference import (
    accept_resample,
    attention,
    cache_digest,
    causal_conv,
    conv_commit,
    experts,
    fork_copy,
    gated_norm,
    journal_keep,
    kv_compact,
    provenance_stamp,
    race_sample,
    rms_norm,
    route,
    ssm_commit,
    ssm_scan,
)

CAPTURABLE = False

__all__ = [
    "CAPTURABLE",
    "accept_resample",
    "attention",
    "attention_step",
    "cache_digest",
    "causal_conv",
    "conv_commit",
    "conv_step",
    "dt_step",
    "experts",
    "experts_step",
    "fork_copy",
    "gated_norm",
    "gated_norm_step",
    "journal_keep",
    "kv_compact",
    "mlp_step",
    "norm_step",
    "provenance_stamp",
    "race_sample",
    "rms_norm",
    "route",
    "route_step",
    "ssm_commit",
    "ssm_scan",
    "ssm_step",
]
