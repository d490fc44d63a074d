"""Muon for matrices, AdamW for everything else, with state that fits safetensors.

Muon (Jordan et al. 2024): momentum, then the nearest semi-orthogonal matrix by five Newton-Schulz
steps. Stacked experts are a batch of matrices.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping

import torch
from torch import Tensor, nn


def orthogonalise(update: Tensor) -> Tensor:
    """The five-step quintic Newton-Schulz iteration on the last two dimensions, in bf16."""
    a, b, c = 3.4445, -4.7750, 2.0315
    x = update.bfloat16()
    tall = x.shape[-2] > x.shape[-1]
    if tall:
        x = x.mT
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(5):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return (x.mT if tall else x).to(update.dtype)


class Optimizer:
    """One step for all parameters; `rate` in [0, 1] scales both learning rates."""

    def __init__(self, parameters: Mapping[str, nn.Parameter]) -> None:
        self.matrices = {
            name: p
            for name, p in parameters.items()
            if p.dim() >= 2
            and not any(k in name for k in ("embeddings", "lm_head", "gate", "conv1d"))
        }
        self.others = {n: p for n, p in parameters.items() if n not in self.matrices}
        self.momentum = {n: torch.zeros_like(p) for n, p in self.matrices.items()}
        some = next(iter(parameters.values()))
        self.adam = torch.optim.AdamW(
            list(self.others.values()),
            lr=torch.zeros((), device=some.device),
            betas=(0.9, 0.95),
            weight_decay=0.0,
            capturable=some.is_cuda,
        )
        # Its state must be there before a graph is captured: a step that changes nothing makes it.
        for p in self.others.values():
            p.grad = torch.zeros_like(p)
        with warnings.catch_warnings(action="ignore"):  # that a capturable step was not captured
            self.adam.step()
        self.zero_grad()
        self.load({})

    @torch.no_grad()
    def step(self, rate: Tensor) -> None:
        """Update all parameters from their gradients; can be captured in a CUDA graph."""
        lr = 0.02 * rate
        groups: dict[torch.Size, list[str]] = {}
        for name, p in self.matrices.items():
            groups.setdefault(p.shape, []).append(name)
        for names in groups.values():
            params = [self.matrices[n] for n in names]
            grads = [p.grad if p.grad is not None else torch.zeros_like(p) for p in params]
            momenta = [self.momentum[n] for n in names]
            torch._foreach_lerp_(momenta, grads, 0.05)
            updates = torch._foreach_lerp(grads, momenta, 0.95)
            whole = orthogonalise(torch.stack(list(updates)))
            scale = max(1.0, whole.shape[-2] / whole.shape[-1]) ** 0.5
            torch._foreach_mul_(params, 1 - 0.05 * lr)
            torch._foreach_add_(params, list((whole * (-scale * lr)).unbind(0)))
        self.adam.param_groups[0]["lr"].copy_(3e-3 * rate)
        self.adam.step()

    def zero_grad(self) -> None:
        for p in (*self.matrices.values(), *self.others.values()):
            p.grad = None

    def state(self) -> dict[str, Tensor]:
        """Every tensor that resuming needs."""
        tensors = {f"momentum.{n}": t for n, t in self.momentum.items()}
        for name, p in self.others.items():
            for key, value in self.adam.state[p].items():
                tensors[f"{key}.{name}"] = value
        return tensors

    @torch.no_grad()
    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Set the state in place; what `tensors` has not starts from zero."""
        for name, held in self.state().items():
            held.copy_(tensors[name]) if name in tensors else held.zero_()
