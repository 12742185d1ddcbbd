"""Who may import whom: reads every import in srfx/ and passes/ and fails on the wrong direction."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parents[1]

# A module may import its own layer and whatever stands after it. `nn` stands beside `ops`: a rule may name
# the modules that it puts into results, never the other way round.
LAYERS = (
    "testing",
    "__main__",
    "cli",
    "completion",
    "dynamo",
    "report",
    "cycle",
    "apply",
    "files",
    "explain",
    "minimize",
    "verify",
    "record",
    "passes",
    "analysis",
    "ops",
    "nn",
    "ir",
    "lattice",
    "errors",
)
RANK = {layer: rank for rank, layer in enumerate(LAYERS)}
PUBLIC = "__init__"  # srfx/__init__.py: the public names; may import every layer, no layer may import it


class Import(NamedTuple):
    """One import statement: where it stands, what it names."""

    where: str
    line: int
    target: str

    def __str__(self) -> str:
        return f"{self.where}:{self.line} imports {self.target}"


def sources() -> Iterator[tuple[Path, str]]:
    """Each source file with its layer; passes/ is read where it lives, not through the link."""
    for path in sorted((ROOT / "passes").rglob("*.py")):
        yield path, "passes"
    package = ROOT / "srfx"
    for path in sorted(package.rglob("*.py")):
        parts = path.relative_to(package).parts
        if parts[0] != "passes":
            yield path, parts[0].removesuffix(".py")


def imports(text: str, where: str = "<text>") -> Iterator[Import]:
    """Every import in the text, also those inside functions and under TYPE_CHECKING."""
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield Import(where, node.lineno, alias.name)
        elif isinstance(node, ast.ImportFrom):
            module = "." * node.level + (node.module or "")
            if module == "srfx":  # `from srfx import ops` names a layer
                for alias in node.names:
                    yield Import(where, node.lineno, f"srfx.{alias.name}")
            else:
                yield Import(where, node.lineno, module)


def complaint(layer: str, target: str) -> str | None:
    """Why a module of `layer` may not import `target`, or None."""
    if target.startswith("."):
        return "imports are absolute"
    head, _, rest = target.partition(".")
    if head in {"benchmarks", "tests", "passes"}:
        return f"{head} is not importable from the package"
    if head != "srfx" or layer == PUBLIC:
        return None
    if not rest:
        return "a module imports layers, not the public names of srfx"
    other = rest.split(".")[0]
    if other not in RANK:
        return f"no layer named {other!r}"
    if RANK[other] < RANK[layer]:
        return f"{other} stands above {layer}"
    return None


def test_every_file_has_a_layer() -> None:
    stray = [str(path) for path, layer in sources() if layer not in RANK and layer != PUBLIC]
    assert not stray, f"not in a layer (add it to LAYERS, at its place): {stray}"


def test_imports_point_right() -> None:
    wrong = []
    for path, layer in sources():
        if layer not in RANK and layer != PUBLIC:
            continue  # told by the test above
        for found in imports(path.read_text(), str(path.relative_to(ROOT))):
            why = complaint(layer, found.target)
            if why:
                wrong.append(f"{found}: {why}")
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize(
    ("layer", "text", "allowed"),
    [
        ("analysis", "from srfx.ops.registry import op_rule", True),
        ("passes", "import srfx.analysis.solver", True),
        ("ops", "from srfx.nn import CompensatedLayerNorm", True),
        ("analysis", "from srfx.analysis.labels import Labels", True),
        ("lattice", "import torch", True),
        ("__init__", "from srfx.minimize import minimize", True),
        ("analysis", "from srfx.passes.base import Pass", False),
        ("analysis", "from srfx import passes", False),
        ("nn", "from srfx.ops.registry import op_rule", False),
        ("errors", "import srfx.ir", False),
        ("ir", "def late():\n    from srfx.minimize import minimize", False),
        ("passes", "from passes.base import Pass", False),
        ("passes", "from .base import Pass", False),
        ("report", "import srfx", False),
        ("report", "from srfx.nowhere import x", False),
        ("report", "from benchmarks.demo import digits", False),
    ],
)
def test_the_reader_itself(layer: str, text: str, allowed: bool) -> None:
    reasons = [complaint(layer, found.target) for found in imports(text)]
    assert reasons, "no import found"
    assert all(reason is None for reason in reasons) is allowed, reasons


def test_passes_has_one_name() -> None:
    """A second copy of passes/ under its folder's name would register every pass twice."""
    done = subprocess.run([sys.executable, "-c", "import passes"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode != 0
    assert "srfx.passes" in done.stderr, done.stderr
