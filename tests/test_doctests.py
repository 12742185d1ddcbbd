"""Runs every example in the docstrings of srfx and srfx.passes, and the README's Python as it is read."""

import doctest
import importlib
import pkgutil
import re
from pathlib import Path

import pytest

import srfx

ROOT = Path(__file__).parents[1]
MODULES = ["srfx", *(found.name for found in pkgutil.walk_packages(srfx.__path__, prefix="srfx."))]


def test_passes_are_among_the_modules() -> None:
    assert "srfx.passes" in MODULES


@pytest.mark.parametrize("name", MODULES)
def test_examples(name: str) -> None:
    options = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
    outcome = doctest.testmod(importlib.import_module(name), optionflags=options, verbose=False)
    assert outcome.failed == 0, f"{outcome.failed} of {outcome.attempted} examples of {name}"


def test_readme(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    blocks = re.findall(r"^```python\n(.*?)^```", (ROOT / "README.md").read_text(), re.DOTALL | re.MULTILINE)
    assert blocks, "the README shows no Python"
    monkeypatch.chdir(tmp_path)  # what an example writes stays out of the tree
    scope: dict[str, object] = {"__name__": "readme"}
    for block in blocks:
        exec(compile(block, "README.md", "exec"), scope)
