"""Stands in for pycosat, which is published as source only and needs a C compiler.

reasoning-gym imports pycosat whenever it is imported, and uses it for zebra puzzles alone.
The Makefile installs this where the real one does not build.
"""

from typing import NoReturn


def _unavailable(*_args: object, **_kwargs: object) -> NoReturn:
    raise ImportError(
        "pycosat was not built: install a C compiler and Python's headers, then run "
        "`.venv/bin/python -m pip install --force-reinstall --no-deps pycosat==0.6.6`"
    )


solve = itersolve = _unavailable
