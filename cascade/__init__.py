"""cascade: think small, verify large, on one nested checkpoint and one cache.

>>> from cascade import Reasoner
>>> reasoner = Reasoner.from_pretrained("nano")
>>> reasoner.generate("57 + 87 + 70").answer
'214'

Public names are loaded on first use, so that `import cascade` stays cheap.
"""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

# In a source tree `cascade.kernels` and `cascade.policies` are the folders beside this one.
_here = Path(__file__).parent
if not (_here / "kernels").exists() and (_here.parent / "kernels" / "reference.py").exists():
    __path__.append(str(_here.parent))

_WHERE = {
    "Batch": "batch",
    "Cache": "cache",
    "CascadeError": "errors",
    "ElasticModel": "model",
    "Reasoner": "reasoner",
    "Result": "results",
    "SamplingParams": "sampling",
    "Sequence": "sequence",
    "SliceSpec": "slices",
    "Step": "results",
    "evaluate": "evaluate",
    "handoff_report": "handoff",
}

__all__ = sorted(["__version__", *_WHERE])

if TYPE_CHECKING:
    from cascade.batch import Batch as Batch
    from cascade.cache import Cache as Cache
    from cascade.errors import CascadeError as CascadeError
    from cascade.evaluate import evaluate as evaluate
    from cascade.handoff import handoff_report as handoff_report
    from cascade.model import ElasticModel as ElasticModel
    from cascade.reasoner import Reasoner as Reasoner
    from cascade.results import Result as Result
    from cascade.results import Step as Step
    from cascade.sampling import SamplingParams as SamplingParams
    from cascade.sequence import Sequence as Sequence
    from cascade.slices import SliceSpec as SliceSpec


def __getattr__(name: str) -> Any:
    if name in _WHERE:
        module = import_module(f"cascade.{_WHERE[name]}")
        # A module of the same name stands here anyway once it is imported; it can be called.
        return module if _WHERE[name] == name else getattr(module, name)
    raise AttributeError(f"module 'cascade' has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
