"""ElasticModel: one resident copy of the weights, and every slice of it as views."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import torch

from cascade import checkpoint, kernels
from cascade.architecture import Architecture
from cascade.cache import Cache, DraftCache
from cascade.errors import SequenceError, SliceError, unknown
from cascade.runner import Runner, runner_for
from cascade.sequence import Consistency, Sequence
from cascade.slices import SliceSpec, custom_slice, resolve_slices, slice_for
from cascade.weights import MambaWeights, ModelWeights, MoEWeights

if TYPE_CHECKING:
    from cascade.slices import SliceLike

DEFAULT_BATCH = 16
DEFAULT_LENGTH = 4096
DEFAULT_DRAFT = 64


class ElasticModel:
    """A nested checkpoint: its parent's weights, once, and named prefix slices of them.

    Build it with `from_pretrained`. `slices` maps names to `SliceSpec`, smallest first; the parent
    is always among them. Wherever a slice is asked for, a width in between may be named as well,
    `"320x128"` for residual width 320 and routed expert width 128; such slices are not trained.
    """

    def __init__(
        self,
        config: Any,
        weights: ModelWeights,
        slices: Mapping[str, SliceSpec],
        *,
        name: str = "model",
        directory: Path | None = None,
        backend: kernels.Backend = "auto",
    ) -> None:
        self.config, self.name, self.directory = config, name, directory
        self.arch = Architecture.from_config(config)
        self.kernels: ModuleType = kernels.load(weights.device, backend)
        self._slices = dict(slices)
        self._names = list(slices)
        self._parent = weights
        self._views = [self._view(spec) for spec in slices.values()]
        self.runner: Runner = runner_for(self.arch, self.kernels, self._views)
        self._decay = torch.stack(
            [layer.mixer.decay for layer in weights.layers if isinstance(layer.mixer, MambaWeights)]
        )
        self._default_caches: dict[DraftCache, Cache] = {}

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path,
        *,
        slices: Mapping[str, SliceLike] | None = None,
        device: str | torch.device = "auto",
        dtype: str | torch.dtype = "auto",
        device_map: Any = None,
        revision: str | None = None,
        trust_remote_code: bool = False,
        backend: kernels.Backend = "auto",
    ) -> ElasticModel:
        """Load a nested checkpoint: `"nano"`, a directory, or a Hub id.

        slices: widths by name, in place of what the checkpoint declares
        device: `auto` is the GPU where there is one
        dtype:  `auto` is the checkpoint's own on a GPU and float32 on a CPU

        Raises CheckpointError (missing, corrupt, not finite), UnsupportedModel, SliceError.
        """
        loaded = checkpoint.load(
            path,
            device=device,
            dtype=dtype,
            device_map=device_map,
            revision=revision,
            trust_remote_code=trust_remote_code,
        )
        specs = resolve_slices(loaded.config, slices, loaded.directory)
        return cls(
            loaded.config,
            loaded.weights,
            specs,
            name=loaded.name,
            directory=loaded.directory,
            backend=backend,
        )

    # ---- slices ----

    @property
    def slices(self) -> Mapping[str, SliceSpec]:
        """Every slice by name, smallest first; widths named on the way come last."""
        return dict(self._slices)

    @property
    def smallest(self) -> str:
        return self._names[0]

    @property
    def largest(self) -> str:
        """The name of the parent."""
        return max(self._slices.values(), key=lambda spec: spec.parameters).name

    @property
    def device(self) -> torch.device:
        return self._parent.device

    @property
    def dtype(self) -> torch.dtype:
        return self._parent.dtype

    @property
    def nbytes(self) -> int:
        """Bytes of the resident weights: the parent's, whatever the number of slices."""
        seen = {t.data_ptr(): t.nbytes for _, t in self._parent.named_tensors()}
        return sum(seen.values())

    def slice_index(self, slice: str) -> int:
        """The number that provenance stores for a slice. Raises SliceError where unknown."""
        if slice not in self._slices:
            self._name_width(slice)
        return self._names.index(slice)

    def slice_spec(self, slice: str) -> SliceSpec:
        """The spec of a slice. Raises SliceError where unknown."""
        self.slice_index(slice)
        return self._slices[slice]

    def weights(self, slice: str | int) -> ModelWeights:
        """The weights of a slice, by name or number: views of the parent's storage."""
        return self._views[slice if isinstance(slice, int) else self.slice_index(slice)]

    def pass_bytes(self, slice: str, tokens: int) -> int:
        """Bytes of weights that one pass over `tokens` tokens reads: embeddings rows aside.

        Of the routed experts those that tokens reach, expected for evenly spread routing:
        E * (1 - (1 - k / E) ** tokens) distinct ones of E, each read once.
        """
        spec, arch = self._slices[slice], self.arch
        routed = sum(
            layer.mixer.up.numel() + layer.mixer.down.numel()
            for layer in self.weights(slice).layers
            if isinstance(layer.mixer, MoEWeights)
        )
        reached = 1 - (1 - arch.top_k / arch.experts) ** tokens if routed else 0.0
        dense = spec.parameters - routed - arch.vocab_size * spec.hidden_size
        return int((dense + routed * reached) * self.dtype.itemsize)

    def slice_for(self, *, params: int | str | None = None, memory: int | str | None = None) -> str:
        """The name of the largest trained slice within a number of parameters or of bytes.

        params: `12_500_000_000` or `"12.5B"`; memory: bytes or `"24GB"`, of weights in this
        model's dtype if that slice were exported alone.
        """
        return slice_for(
            self._slices, params=params, memory=memory, bytes_per_parameter=self.dtype.itemsize
        ).name

    def export(self, slice: str, directory: str | Path, *, overwrite: bool = False) -> Path:
        """Write a slice as an ordinary transformers checkpoint; returns its directory."""
        from cascade.export import export

        index = self.slice_index(slice)
        return export(
            self._views[index],
            self.config,
            self._slices[slice],
            Path(directory),
            tokenizer_files_from=self.directory,
            overwrite=overwrite,
        )

    # ---- sequences ----

    def cache(
        self,
        *,
        max_batch: int = DEFAULT_BATCH,
        max_length: int | None = None,
        max_draft: int = DEFAULT_DRAFT,
        state_dtype: torch.dtype | None = None,
        draft_cache: DraftCache = "shared",
    ) -> Cache:
        """Preallocate a cache for `max_batch` sequences of `max_length` tokens.

        max_draft:   the most ids that one sequence may have drafted and not committed
        draft_cache: `own` lets sequences be opened with draft_cache="own" (see `Sequence`), beside
                     others, and takes twice the memory
        """
        return Cache(
            arch=self.arch,
            decay=self._decay,
            max_batch=max_batch,
            max_length=(
                min(self.arch.max_positions, DEFAULT_LENGTH) if max_length is None else max_length
            ),
            max_draft=max_draft,
            device=self.device,
            dtype=self.dtype,
            state_dtype=state_dtype or torch.float32,
            kernels=self.kernels,
            draft_cache=draft_cache,
        )

    def sequence(
        self,
        *,
        cache: Cache | None = None,
        consistency: Consistency = "exact",
        draft_cache: DraftCache = "shared",
    ) -> Sequence:
        """Open a sequence in a slot of `cache`, or of a default cache of this model.

        consistency, draft_cache: what the cache promises; see `Sequence`

        Raises CacheFull where no slot is left, RequestError for an unknown mode or a cache without
        slots for draft slices, SequenceError for a cache of another model.
        """
        if cache is None:
            if draft_cache not in self._default_caches:
                self._default_caches[draft_cache] = self.cache(draft_cache=draft_cache)
            cache = self._default_caches[draft_cache]
        elif cache.decay is not self._decay:
            raise SequenceError("this cache was built by another model")
        return Sequence(self, cache, consistency, draft_cache)

    def __repr__(self) -> str:
        return (
            f"ElasticModel({self.name!r}, {', '.join(self._names)}, "
            f"{self.nbytes / 1e6:,.1f} MB, {self.device})"
        )

    # ---- inside ----

    def _view(self, spec: SliceSpec) -> ModelWeights:
        return self._parent.narrow(spec.hidden_size, spec.moe_intermediate_size)

    def _name_width(self, slice: str) -> None:
        """Add a slice named by its widths, `320x128`."""
        if not isinstance(slice, str) or "x" not in slice.replace("X", "x"):
            raise SliceError(unknown("slice", slice, self._names))
        try:
            spec = custom_slice(self.config, slice)
        except SliceError as error:
            raise SliceError(f"{error} ({unknown('slice', slice, self._names)})") from None
        if len(self._names) >= 127:
            raise SliceError("no more than 127 slices can be named in one model")
        self._slices[slice] = spec.model_copy(update={"name": slice})
        self._names.append(slice)
        self._views.append(self._view(spec))
