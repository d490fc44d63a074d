"""The README's Python runs as it stands, and prints what its comments say."""

import re
from pathlib import Path
from typing import Any

import pytest

README = Path(__file__).parents[1] / "README.md"


def test_its_python_prints_what_it_says(capsys: pytest.CaptureFixture[str]) -> None:
    blocks = re.findall(r"^```python\n(.*?)^```", README.read_text(), re.DOTALL | re.MULTILINE)
    names: dict[str, Any] = {}
    said = []
    for block in blocks:
        exec(compile(block, str(README), "exec"), names)
        said += re.findall(r"^ *print\(.*\)  # (.*)$", block, re.MULTILINE)
    printed = capsys.readouterr().out.splitlines()
    assert len(blocks) >= 3
    assert len(said) >= 3
    assert [line for line in printed if line in said] == said
