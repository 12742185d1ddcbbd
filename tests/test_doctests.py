"""Runs every example in the docstrings of srfx and srfx.passes, and the README's Python as it is read."""

import doctest
import importlib
import linecache
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
def test_examples(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # Each example would look whether any file that torch ever named in a trace has changed meanwhile.
    monkeypatch.setattr(linecache, "checkcache", lambda filename=None: None)
    options = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
    outcome = doctest.testmod(importlib.import_module(name), optionflags=options, verbose=False)
    assert outcome.failed == 0, f"{outcome.failed} of {outcome.attempted} examples of {name}"


@pytest.mark.parametrize(
    "page", ["README.md", "docs/files.md", "docs/apply.md", "docs/explain.md", "docs/report.md"]
)
def test_pages(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks marked ``python notest`` need what is not installed everywhere."""
    blocks = re.findall(r"^```python\n(.*?)^```", (ROOT / page).read_text(), re.DOTALL | re.MULTILINE)
    assert blocks, f"{page} shows no Python"
    monkeypatch.chdir(tmp_path)  # what an example writes stays out of the tree
    scope: dict[str, object] = {"__name__": "page"}
    printed: list[str] = []
    scope["print"] = lambda value: printed.append(str(value))
    text = (ROOT / page).read_text()
    for block in blocks:
        exec(compile(block, page, "exec"), scope)
    if page == "README.md":  # what it says is printed
        lines = [line.strip() for line in printed[0].splitlines() if line.strip()]
        shown = [line.strip() for line in text.splitlines()]
        assert [line for line in lines if line not in shown] == []
