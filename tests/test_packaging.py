"""Wheel, sdist, editable install and a plain run from the root hold the same package."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from importlib import metadata
from pathlib import Path, PurePosixPath

import pytest

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("cascade", "kernels", "policies")
DISTRIBUTION = "cascade-reasoning"
IMPORT_ALL = "import cascade, cascade.kernels, cascade.policies, cascade.strategies"
WHERE = f"{IMPORT_ALL}; print(cascade.__file__, cascade.kernels.__file__, sep='\\n')"

pytestmark = pytest.mark.slow


def run(*command: str | Path, cwd: Path) -> str:
    """Standard output of a command that must succeed; it sees no PYTHONPATH and no hub."""
    env = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    env["HF_HUB_OFFLINE"] = "1"
    done = subprocess.run(
        [str(part) for part in command],
        cwd=cwd, env=env, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def source_files() -> set[str]:
    """Every file of the three source folders, by its path once installed."""
    found = set()
    for folder in FOLDERS:
        for path in (ROOT / folder).rglob("*"):
            if path.is_file() and "__pycache__" not in path.parts:
                name = path.relative_to(ROOT).as_posix()
                found.add(name if folder == "cascade" else f"cascade/{name}")
    return found


@pytest.fixture(scope="session")
def distributions(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The sdist, and the wheel that is built from it; from a copy, to leave the tree clean."""
    base = tmp_path_factory.mktemp("build")
    junk = shutil.ignore_patterns(".*", "__pycache__", "build", "dist", "*.egg-info")
    shutil.copytree(ROOT, base / "tree", ignore=junk)
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", base, base / "tree", cwd=base)
    (sdist,) = base.glob("*.tar.gz")
    (wheel,) = base.glob("*.whl")
    return sdist, wheel


@pytest.fixture(scope="session")
def installed(distributions: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The `bin` folder of a new environment that holds the wheel and, of this one, only what
    it depends on: a .pth file shows this environment's packages, but the .pth files among
    them, an editable cascade's too, are not followed."""
    base = tmp_path_factory.mktemp("installed") / "venv"
    venv.create(base, symlinks=os.name != "nt")
    binaries = base / ("Scripts" if os.name == "nt" else "bin")
    python = binaries / Path(sys.executable).name
    run(
        sys.executable, "-m", "pip", "--python", python,
        "install", "--quiet", "--no-deps", "--no-index", distributions[1],
        cwd=base,
    )  # fmt: skip
    purelib = run(
        python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=base
    ).strip()
    Path(purelib, "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n", "utf-8")
    return binaries


def test_wheel_and_sdist_hold_every_source_file(distributions: tuple[Path, Path]) -> None:
    sdist, wheel = distributions
    with zipfile.ZipFile(wheel) as archive:
        in_wheel = {name for name in archive.namelist() if ".dist-info/" not in name}
        licences = [name for name in archive.namelist() if name.endswith("licenses/LICENSE")]
    with tarfile.open(sdist) as archive:
        names = [PurePosixPath(member.name) for member in archive if member.isfile()]
    in_sdist = {PurePosixPath(*name.parts[1:]).as_posix() for name in names}
    mapped = {
        name if name.startswith("cascade/") else f"cascade/{name}"
        for name in in_sdist
        if name.startswith(tuple(f"{folder}/" for folder in FOLDERS))
    }
    assert in_wheel == source_files()
    assert mapped == source_files()
    assert len(licences) == 1
    assert {"LICENSE", "README.md", "Makefile", "constraints.txt", "setup.py"} <= in_sdist
    assert "tests/conftest.py" in in_sdist


def test_wheel_holds_checkpoint_kernels_and_type_marker(distributions: tuple[Path, Path]) -> None:
    with zipfile.ZipFile(distributions[1]) as archive:
        names = archive.namelist()
    nano = ROOT / "cascade" / "checkpoints" / "nano"
    files = {f"cascade/checkpoints/nano/{file.name}" for file in nano.iterdir()}
    assert files <= set(names)
    needed = ("config.json", "elastic.json", "tokenizer.json", "README.md")
    assert {f"cascade/checkpoints/nano/{name}" for name in needed} <= files
    assert sum(file.stat().st_size for file in nano.iterdir()) <= 25e6
    assert "cascade/py.typed" in names
    cuda = list((ROOT / "kernels").rglob("*.cu"))
    assert len([name for name in names if name.endswith(".cu")]) == len(cuda)


def test_wheel_imports_outside_the_tree(installed: Path, tmp_path: Path) -> None:
    places = run(installed / "python", "-c", WHERE, cwd=tmp_path).split()
    for place in places:
        assert installed.parent in Path(place).parents


def test_wheel_solves_a_problem_outside_the_tree(installed: Path, tmp_path: Path) -> None:
    command = ("run", "57 + 87 + 70", "--json")
    printed = run(installed / "cascade", *command, cwd=tmp_path)
    assert json.loads(printed)["answer"] == "214"
    assert run(installed / "python", "-m", "cascade.cli", *command, cwd=tmp_path)


def test_editable_install_imports_outside_the_tree(tmp_path: Path) -> None:
    try:
        origin = metadata.distribution(DISTRIBUTION).read_text("direct_url.json")
    except metadata.PackageNotFoundError:
        pytest.skip("cascade is not installed here")
    if not json.loads(origin or "{}").get("dir_info", {}).get("editable"):
        pytest.skip("cascade is not installed here as editable")
    places = run(sys.executable, "-c", WHERE, cwd=tmp_path).split()
    assert places == [str(ROOT / name / "__init__.py") for name in ("cascade", "kernels")]


def test_a_plain_run_from_the_root_imports(tmp_path: Path) -> None:
    """Nothing installed, not even the dependencies: importing the three packages needs none but
    pydantic, which comes from this environment."""
    code = f"import sys; sys.path.append({sysconfig.get_path('purelib')!r}); {WHERE}"
    places = run(sys.executable, "-S", "-c", code, cwd=ROOT).split()
    assert places == [str(ROOT / name / "__init__.py") for name in ("cascade", "kernels")]


def test_the_version_is_stated_once_more_only() -> None:
    """`cascade.__version__` repeats pyproject.toml, so that a run from the root knows it too."""
    import tomllib

    import cascade

    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    assert cascade.__version__ == project["version"]
