"""The operations on the cache and on a layer's activations: one signature, three implementations.

`load(device)` is called once, when a model is built, and returns a namespace of functions:
`cascade.kernels.reference` (plain PyTorch, any device: the definition), `cascade.kernels.cpu`
(PyTorch in fewer operations) or `cascade.kernels.cuda` (CUDA C++ through CuPy, with the reference
for what has no kernel). Callers keep what `load` returned and never ask again. Shapes and
promises of every function stand in `reference`.

Letters in shapes:
    L layers of one kind, S slots of the cache, M positions a slot holds, J journal entries,
    R rows of a call, T tokens of a row, H heads, G groups, P head dim, N state size,
    C convolution channels (H * P + 2 * G * N), K convolution taps, D attention head dim,
    V vocabulary.
"""

from __future__ import annotations

from types import ModuleType
from typing import Literal

Backend = Literal["auto", "reference", "cpu", "cuda"]


def load(device: object, backend: Backend = "auto") -> ModuleType:
    """The kernels for `device` (a `torch.device` or its name).

    `auto` takes the CUDA kernels where the device is a GPU and CuPy is installed, `cpu` on a
    processor, and the reference everywhere else. `cuda` raises ImportError where CuPy is missing.
    """
    from importlib import import_module
    from importlib.util import find_spec

    on_gpu = str(device).startswith("cuda")
    if backend == "cuda" or (backend == "auto" and on_gpu and find_spec("cupy") is not None):
        return import_module("cascade.kernels.cuda")
    if backend == "cpu" or (backend == "auto" and str(device).startswith("cpu")):
        return import_module("cascade.kernels.cpu")
    return import_module("cascade.kernels.reference")
