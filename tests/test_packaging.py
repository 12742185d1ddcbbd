"""The wheel and the sdist as a stranger gets them: every source file once, one top-level name, importable."""

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SHIPPED = ("srfx", "passes")
NEEDED = ("setup.cfg", "pyproject.toml", "README.md", "LICENSE")


def run(*command: str, cwd: Path, **extra: str) -> str:
    """Run a command in `cwd` with no trace of this session's paths; returns what it printed."""
    environment = {key: value for key, value in os.environ.items() if key not in {"PYTHONPATH", "PYTHONHOME"}}
    done = subprocess.run(command, cwd=cwd, env=environment | extra, capture_output=True, text=True)
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module", params=["linked", "unlinked"])
def dist(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An sdist and the wheel built from it; once with the link srfx/passes, once from a tree without it."""
    tree = tmp_path_factory.mktemp("tree")
    for folder in SHIPPED:
        shutil.copytree(
            ROOT / folder, tree / folder, symlinks=True, ignore=shutil.ignore_patterns("__pycache__", "*.pyc")
        )
    for name in NEEDED:
        shutil.copy(ROOT / name, tree / name)
    if request.param == "unlinked":
        (tree / "srfx" / "passes").unlink()
    out = tmp_path_factory.mktemp("dist")
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", str(out), cwd=tree)
    return out


@pytest.fixture(scope="module")
def wheel(dist: Path) -> Path:
    """The one wheel in `dist`."""
    (found,) = dist.glob("*.whl")
    return found


def expected_modules() -> set[str]:
    """Where each source file has to be in the wheel."""
    files = set()
    for path in (ROOT / "srfx").rglob("*.py"):
        relative = path.relative_to(ROOT / "srfx")
        if relative.parts[0] != "passes":
            files.add(f"srfx/{relative.as_posix()}")
    for path in (ROOT / "passes").rglob("*.py"):
        files.add(f"srfx/passes/{path.relative_to(ROOT / 'passes').as_posix()}")
    return files


def test_link_is_tracked_as_a_link() -> None:
    assert (ROOT / "srfx" / "passes").is_symlink()
    assert os.readlink(ROOT / "srfx" / "passes") == "../passes"


def test_wheel_holds_every_module_once(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    assert len(names) == len(set(names))
    assert {name for name in names if name.endswith(".py")} == expected_modules()
    assert "srfx/py.typed" in names


def test_wheel_claims_one_top_level_name(wheel: Path) -> None:
    tops = {name.split("/")[0] for name in zipfile.ZipFile(wheel).namelist()}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"srfx"}


def test_sdist_holds_the_licence_and_the_passes(dist: Path) -> None:
    (sdist,) = dist.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {*NEEDED, "passes/__init__.py", "srfx/__init__.py"} <= names


def test_wheel_works_outside_the_tree(wheel: Path, tmp_path: Path) -> None:
    site, elsewhere = tmp_path / "site", tmp_path / "elsewhere"
    elsewhere.mkdir()
    run(sys.executable, "-m", "pip", "install", "--no-deps", "--target", str(site), str(wheel), cwd=elsewhere)
    program = "import srfx, srfx.passes; print(srfx.__file__); print(srfx.passes.__file__)"
    printed = run(sys.executable, "-c", program, cwd=elsewhere, PYTHONPATH=str(site))
    assert [Path(line) for line in printed.split()] == [
        site / "srfx" / "__init__.py",
        site / "srfx" / "passes" / "__init__.py",
    ]
    program = "import torch; print(torch._dynamo.lookup_backend('srfx').__module__)"
    assert run(sys.executable, "-c", program, cwd=elsewhere, PYTHONPATH=str(site)).strip() == "srfx.dynamo"
