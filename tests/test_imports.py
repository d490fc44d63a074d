"""Imports go one way, examples, tests -> cascade -> {kernels, policies}, and cost little."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import cascade

ROOT = Path(__file__).resolve().parents[1]

# What the two independent packages may import besides the standard library and themselves.
ALLOWED = {
    "cascade.kernels": {"torch", "numpy", "cupy", "cupy_backends", "cupyx"},
    "cascade.policies": {"pydantic", "pydantic_core", "yaml"},
}


def module_name(path: Path) -> str:
    parts = list(path.relative_to(ROOT).with_suffix("").parts)
    if parts[-1] == "__init__":
        parts.pop()
    if parts[0] in ("kernels", "policies"):
        parts.insert(0, "cascade")
    return ".".join(parts)


def imported_names(source: str, module: str, *, is_package: bool = False) -> Iterator[str]:
    """The dotted name of every import in `source`, wherever it stands.

    `from a import b` gives `a.b`, relative imports are resolved, and literal arguments of
    `import_module` count.
    """
    package = module.split(".") if is_package else module.split(".")[:-1]
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            base = base + (node.module.split(".") if node.module else [])
            yield from (".".join([*base, alias.name]) for alias in node.names)
        elif isinstance(node, ast.Call):
            name = node.func.attr if isinstance(node.func, ast.Attribute) else None
            name = node.func.id if isinstance(node.func, ast.Name) else name
            if name in ("import_module", "__import__") and node.args:
                target = node.args[0]
                if isinstance(target, ast.Constant) and isinstance(target.value, str):
                    yield target.value


def within(name: str, package: str) -> bool:
    return name == package or name.startswith(f"{package}.")


def is_forbidden(module: str, name: str) -> bool:
    """Whether `module` must not import `name`."""
    top = name.partition(".")[0]
    if top in ("kernels", "policies"):  # a second copy of the module under another name
        return True
    for package, allowed in ALLOWED.items():
        if within(module, package):
            return not (top in sys.stdlib_module_names or top in allowed or within(name, package))
    if within(module, "tests"):
        return False
    return top == "tests" or (top == "examples" and not within(module, "examples"))


def sources() -> list[Path]:
    folders = ("cascade", "kernels", "policies", "examples", "tests")
    return sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py"))


@pytest.mark.parametrize("path", sources(), ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_go_one_way(path: Path) -> None:
    module = module_name(path)
    names = imported_names(path.read_text("utf-8"), module, is_package=path.name == "__init__.py")
    assert [name for name in names if is_forbidden(module, name)] == []


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("cascade.kernels.fork", "from cascade.errors import CascadeError"),
        ("cascade.kernels.fork", "from ..errors import CascadeError"),
        ("cascade.kernels.fork", "from cascade import cache"),
        ("cascade.kernels.fork", "def late():\n    import transformers"),
        ("cascade.kernels.fork", "import_module('cascade.policies')"),
        ("cascade.policies.threshold", "import torch"),
        ("cascade.policies.threshold", "from cascade.kernels import reference"),
        ("cascade.cache", "from kernels import reference"),
        ("cascade.cache", "from tests import support"),
        ("cascade.cache", "import examples.train_nano"),
        ("examples.train_nano", "from tests.support import tiny"),
    ],
)
def test_a_wrong_import_is_found(module: str, source: str) -> None:
    assert any(is_forbidden(module, name) for name in imported_names(source, module))


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("cascade.kernels.fork", "from . import reference\nimport math, torch, cupy"),
        ("cascade.policies.threshold", "from .base import Policy\nfrom pydantic import Field"),
        ("cascade.cache", "from .kernels import reference\nimport cascade.policies, torch"),
        ("examples.train_nano", "from cascade import Reasoner"),
        ("tests.test_cache", "from tests.support import tiny\nfrom examples import train_nano"),
    ],
)
def test_a_right_import_is_allowed(module: str, source: str) -> None:
    assert not any(is_forbidden(module, name) for name in imported_names(source, module))


def run_fresh(code: str) -> dict[str, object]:
    """What `code`, run in a new interpreter, prints as its last line of JSON."""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    result: dict[str, object] = json.loads(done.stdout.splitlines()[-1])
    return result


def test_import_cascade_loads_nothing_heavy() -> None:
    loaded = run_fresh("import cascade, json, sys; print(json.dumps(dict.fromkeys(sys.modules)))")
    heavy = ("torch", "transformers", "accelerate", "cupy", "numpy", "pydantic", "typer", "rich")
    assert [name for name in heavy if name in loaded] == []


def test_import_cascade_is_quick() -> None:
    code = (
        "import json, time, torch; start = time.perf_counter(); import cascade;"
        "print(json.dumps({'seconds': time.perf_counter() - start}))"
    )
    seconds = run_fresh(code)["seconds"]
    assert isinstance(seconds, float)
    assert seconds < 0.3


@pytest.mark.parametrize("name", cascade.__all__)
def test_every_public_name_loads(name: str) -> None:
    assert getattr(cascade, name) is not None
