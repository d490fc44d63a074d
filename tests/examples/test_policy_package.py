"""A policy that somebody else ships: installed into a fresh environment, found by its name."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "examples" / "fading_policy"

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The interpreter of an environment that holds the package, and sees cascade's source tree
    and this environment's packages."""
    base = tmp_path_factory.mktemp("plugin") / "venv"
    venv.create(base, symlinks=os.name != "nt")
    found = base / ("Scripts" if os.name == "nt" else "bin") / Path(sys.executable).name
    paths = f"{ROOT}\n{sysconfig.get_path('purelib')}\n"
    where = run(found, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))")
    Path(where.strip(), "seen.pth").write_text(paths, "utf-8")
    copy = base.parent / "package"
    copy.mkdir()
    for file in PACKAGE.iterdir():
        if file.is_file():
            (copy / file.name).write_bytes(file.read_bytes())
    run(
        sys.executable, "-m", "pip", "--python", found,
        "install", "--quiet", "--no-deps", "--no-index", "--no-build-isolation", copy,
    )  # fmt: skip
    return found


def run(*command: str | Path) -> str:
    env = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    done = subprocess.run(
        [str(part) for part in command], env=env, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def test_it_is_found_by_its_name_and_can_be_stored(python: Path) -> None:
    code = (
        "from cascade.policies import dumps, find, known, loads, all_of, Threshold\n"
        "assert 'fading' in known()\n"
        "policy = find('fading')(first=0.8)\n"
        "assert type(policy).__module__ == 'cascade_fading'\n"
        "both = all_of(policy, Threshold())\n"
        "assert loads(dumps(both)) == both\n"
        "print(dumps(policy))"
    )
    stored = json.loads(run(python, "-c", code))
    assert stored == {"kind": "fading", "first": 0.8, "fade": 0.8, "least": 0.1}


def test_the_command_line_runs_it(python: Path, tmp_path: Path) -> None:
    file = tmp_path / "fading.json"
    file.write_text(json.dumps({"kind": "fading", "first": 0.99}))
    for policy in ("fading", str(file)):
        printed = run(python, "-m", "cascade", "run", "57 + 87 + 70", "--policy", policy, "--json")
        assert json.loads(printed)["answer"] == "214"


def test_without_the_package_its_name_is_unknown() -> None:
    from cascade.policies import UnknownPolicy, find

    with pytest.raises(UnknownPolicy, match="unknown policy 'fading'"):
        find("fading")
