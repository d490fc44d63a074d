"""Every error cascade raises on purpose.

CascadeError
├── CheckpointError          a checkpoint could not be found, read or trusted
│   └── UnsupportedModel     readable, but not an architecture cascade runs
├── SliceError               an unknown slice, or widths that do not fit the parent
├── RequestError             bad input: prompt, parameters, strategy or policy
│   └── PromptTooLong        more tokens than the cache holds
├── SequenceError            a verb called where it has no meaning; nothing changed
│   ├── SequenceClosed       use after close
│   ├── CapacityExceeded     longer than max_length, or more than the journal holds
│   └── CacheFull            every slot of the cache is in use
├── CalibrationError         no setting of a policy holds the target, or the runs are too few
├── NumericalError           NaN or infinity where a number was needed
├── PolicyError              a policy raised, or decided something that does not exist
└── KernelError              a kernel refused its arguments, or could not be compiled

Most of these are also the builtin that fits (`ValueError`, `RuntimeError`), so code that
knows nothing of cascade catches them too.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class CascadeError(Exception):
    """Base of all errors of this library."""


class CheckpointError(CascadeError, ValueError):
    """A checkpoint is missing, incomplete, corrupt or holds numbers that are not finite."""


class UnsupportedModel(CheckpointError):
    """The checkpoint is of an architecture, or uses a feature, that cascade does not run."""


class SliceError(CascadeError, ValueError):
    """A slice is unknown, or its widths do not fit its parent."""


class RequestError(CascadeError, ValueError):
    """A request cannot be served as asked: prompt, parameter, strategy or policy."""


class PromptTooLong(RequestError):
    """A prompt does not fit the cache."""


class SequenceError(CascadeError, RuntimeError):
    """A verb was called in a state where it has no meaning. The sequence is unchanged."""


class SequenceClosed(SequenceError):
    """The sequence was closed; its slot may hold somebody else's tokens."""


class CapacityExceeded(SequenceError):
    """More tokens than the slot, or the journal of uncommitted tokens, holds."""


class CacheFull(SequenceError):
    """Every slot of the cache is in use."""


class NumericalError(CascadeError, ArithmeticError):
    """NaN or infinity where a number was needed."""


class PolicyError(CascadeError, RuntimeError):
    """A policy raised, or returned a decision that does not exist."""


class CalibrationError(CascadeError, ValueError):
    """No setting of a policy holds the target on these runs, or they are too few to tell."""


class KernelError(CascadeError, ValueError):
    """A kernel refused its arguments, or could not be compiled."""


def unknown(kind: str, name: object, known: Iterable[str]) -> str:
    """The sentence every "unknown name" error uses: what was asked, the nearest, all known.

    >>> unknown("slice", "larg", ["small", "large"])
    "unknown slice 'larg'; did you mean 'large'? Known: large, small"
    """
    names = sorted(known)
    nearest = difflib.get_close_matches(str(name), names, n=1)
    hint = f"; did you mean {nearest[0]!r}?" if nearest else "."
    return f"unknown {kind} {name!r}{hint} Known: {', '.join(names) or 'none'}"
