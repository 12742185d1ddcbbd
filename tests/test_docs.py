"""The pages of docs/: their Python runs, their links lead somewhere, and the site knows each of them."""

import importlib.util
import os
import pkgutil
import re
import runpy
from collections.abc import Iterator
from pathlib import Path

import pytest

import srfx

ROOT = Path(__file__).parents[1]
PAGES = sorted((ROOT / "docs").rglob("*.md"))
BLOCK = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\(([^)#\s]+)(?:#[^)]*)?\)")


def programs(page: Path) -> Iterator[tuple[list[str], str]]:
    """The Python blocks of a page, each with the packages that its first line says it needs."""
    for match in BLOCK.finditer(page.read_text()):
        first = match[1].splitlines()[0]
        needs = first.removeprefix("# needs:").split(",") if first.startswith("# needs:") else []
        yield [name.strip() for name in needs], match[1]


RUNNABLE = [page for page in PAGES if any(True for _ in programs(page))]


def run(page: Path, tmp_path: Path, is_wanted: bool) -> None:
    """All blocks of a page in one namespace; those that need other packages only when they are asked for."""
    text, skipped = "", []
    for needs, program in programs(page):
        missing = [name for name in needs if importlib.util.find_spec(name) is None]
        if needs and (not is_wanted or missing):
            skipped += missing
            continue
        text += program
    if is_wanted and skipped:
        pytest.skip(f"not installed: {', '.join(skipped)}")
    file = tmp_path / f"{page.stem}.py"
    file.write_text(text)
    was = Path.cwd()
    os.chdir(tmp_path)  # what a recipe writes lands there
    try:
        runpy.run_path(str(file))
    finally:
        os.chdir(was)


@pytest.mark.parametrize("page", RUNNABLE, ids=lambda page: page.stem)
def test_python_of_a_page_runs(page: Path, tmp_path: Path) -> None:
    run(page, tmp_path, is_wanted=False)


@pytest.mark.slow
@pytest.mark.parametrize(
    "page", [p for p in RUNNABLE if any(n for n, _ in programs(p))], ids=lambda p: p.stem
)
def test_python_that_needs_other_packages_runs(page: Path, tmp_path: Path) -> None:
    run(page, tmp_path, is_wanted=True)


@pytest.mark.parametrize("page", [ROOT / "README.md", *PAGES], ids=lambda page: page.stem)
def test_links_lead_to_files(page: Path) -> None:
    targets = [
        t for t in LINK.findall(BLOCK.sub("", page.read_text())) if not t.startswith(("http", "mailto:"))
    ]
    gone = [t for t in targets if not (page.parent / t).resolve().exists()]
    assert not gone, f"{page.name} links to {gone}"


def test_the_site_knows_every_page() -> None:
    listed = set(re.findall(r"[\w/-]+\.md", (ROOT / "mkdocs.yml").read_text()))
    found = {page.relative_to(ROOT / "docs").as_posix() for page in PAGES}
    assert found == listed


def test_the_api_page_has_every_public_name() -> None:
    """By the place where each is defined: `srfx.minimize` is a function and a module, of which the page would show one."""
    entries = re.findall(r"^::: (\S+)$", (ROOT / "docs" / "api.md").read_text(), re.MULTILINE)
    wanted = {f"{getattr(srfx, name).__module__}.{getattr(srfx, name).__qualname__}" for name in srfx.__all__}
    assert wanted <= set(entries)
    for entry in entries:
        assert pkgutil.resolve_name(entry) is not None
