"""Which rule covers which spellings? Writes docs/ops.md from the registry.

Run: python -m benchmarks.op_table [--check]
"""

from __future__ import annotations

import argparse
import inspect
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional

import srfx.ops  # noqa: F401  # registers all rules
from srfx.ops.registry import known_rules
from srfx.ops.rule import OpRule

PAGE = Path(__file__).parent.parent / "docs" / "ops.md"
KINDS = ("modules", "functions", "methods", "ATen")

HEAD = """# Ops

Every op that minimize knows, by the file of `srfx/ops` that has its rule. Written by `python -m benchmarks.op_table`
from the registry; a test holds it to the code. All spellings of an op share one rule. An op that is not here is a barrier: what it
reads keeps every channel, and the report names it. [Adding an op](adding-an-op.md) says how to teach it.
"""


def spelling(target: Any) -> tuple[str, str]:
    """Kind and text of a target: ("modules", "nn.Linear"), ("ATen", "aten.add.Tensor")."""
    if isinstance(target, str) and "::" in target:
        return "ATen", target.replace("::", ".")
    if isinstance(target, str):
        return "methods", f".{target}"
    if isinstance(target, torch._ops.OpOverload):
        return "ATen", str(target)
    if inspect.isclass(target) and issubclass(target, nn.Module):
        home = "nn" if getattr(nn, target.__name__, None) is target else "srfx.nn"
        return "modules", f"{home}.{target.__name__}"
    name = getattr(target, "__name__", str(target))
    for home, text in ((functional, "F"), (torch, "torch"), (torch.special, "torch.special")):
        if getattr(home, name, None) is target:
            return "functions", f"{text}.{name}"
    module = str(getattr(target, "__module__", "")).lstrip("_").replace("srfx.nn.functional", "srfx.nn")
    return "functions", f"{module}.{name}" if module not in ("", "builtins") else name


def table() -> dict[tuple[str, str], dict[str, list[str]]]:
    """(file, rule) -> kind -> spellings, all sorted."""
    found: dict[tuple[str, str], dict[str, set[str]]] = defaultdict(lambda: defaultdict(set))
    for target, rule in known_rules():
        kind, text = spelling(target)
        found[_place(type(rule))][kind].add(text)
    return {
        place: {kind: sorted(kinds[kind], key=str.lower) for kind in KINDS if kind in kinds}
        for place, kinds in sorted(found.items())
    }


def _place(rule: type[OpRule]) -> tuple[str, str]:
    return rule.__module__.rpartition(".")[2], rule.__name__


def _overloads(names: list[str]) -> list[str]:
    """``aten.add.Tensor, aten.add.Scalar`` as ``aten.add.{Scalar,Tensor}``."""
    by_op: dict[str, list[str]] = defaultdict(list)
    for name in names:
        op, _, overload = name.rpartition(".")
        by_op[op].append(overload)
    return [f"{op}.{o[0]}" if len(o) == 1 else f"{op}.{{{','.join(o)}}}" for op, o in by_op.items()]


def render() -> str:
    """The page."""
    lines, family = [HEAD], ""
    for (file, name), kinds in table().items():
        if file != family:
            family = file
            title = (sys.modules[f"srfx.ops.{file}"].__doc__ or "").strip().splitlines()[0].rstrip(".")
            lines.append(f"## {file}\n\n{title}.\n")
        rule = getattr(sys.modules[f"srfx.ops.{file}"], name)
        lines.append(f"**{name}** {_first_sentence(rule)}\n")
        for kind, names in kinds.items():
            shown = _overloads(names) if kind == "ATen" else names
            lines.append(f"* {kind}: " + ", ".join(f"`{n}`" for n in shown))
        lines.append("")
    return "\n".join(lines).rstrip() + "\n"


def _first_sentence(rule: type[OpRule]) -> str:
    text = inspect.cleandoc(rule.__doc__ or "").split("\n\n")[0].replace("\n", " ")
    return text.replace("|", "\\|")


def main() -> None:
    """Write the page, or say whether it is current."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true", help="fail where the page differs, write nothing")
    options = parser.parse_args()
    text = render()
    if options.check:
        sys.exit(0 if PAGE.read_text() == text else f"{PAGE} is not current: python -m benchmarks.op_table")
    PAGE.write_text(text)
    print(
        f"{PAGE}: {len(table())} rules, {sum(len(n) for k in table().values() for n in k.values())} spellings"
    )


if __name__ == "__main__":
    main()
