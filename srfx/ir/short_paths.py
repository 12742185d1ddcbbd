"""Look up what modules have in common once in a generated forward.

Before: a = self.layer1.conv1(x)        After: layer1 = self.layer1
        b = self.layer1.conv2(a)               a = layer1.conv1(x)
                                               b = layer1.conv2(a)

nn.Module finds its children by a Python function.  In a network of small layers a twentieth of a run goes there.
"""

from __future__ import annotations

import ast
import keyword
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

from torch import fx

Path = tuple[str, ...]

_NAME = re.compile(r"""(?<![\w."'])[^\W\d]\w*""")
_TAKEN = ("self", "getattr")


class ShortPaths:
    """A code transformer for `torch.fx.Graph.on_generate_code`; it has no state, so that graphs can be copied.

    Modules are found anew in each call, so that one that is exchanged counts.
    """

    def __call__(self, body: list[str]) -> list[str]:
        """Fragments of code, statements among them, to fragments that do the same."""
        lookups = [_lookup(fragment) for fragment in body]
        shared = _shared(Counter(at.path[:-1] for at in lookups if at is not None))
        names = _names(shared, set(_NAME.findall("".join(body))))
        known: dict[Path, str] = {(): "self"}
        found: list[str] = []
        for fragment, at in zip(body, lookups, strict=True):
            if at is not None:
                for path in _prefixes(at.path[:-1]):
                    if path in shared and path not in known:
                        found.append(f"{names[path]} = {_spelled(path, known)}\n")
                        known[path] = names[path]
                fragment = at.before + _spelled(at.path, known) + at.after
            found.append(fragment)
        return found


def shorten_paths(gm: fx.GraphModule) -> None:
    """Let ``gm``, and copies of its graph, look shared containers up once; the graph stays as it is."""
    codegen = gm.graph._codegen
    if codegen._body_transformer is None:  # what somebody else does with the code goes first
        gm.graph.on_generate_code(lambda _: ShortPaths())
        gm.recompile()


@dataclass(frozen=True)
class _Lookup:
    """A statement that calls or takes ``self.path``, and what stands before and after these words."""

    before: str
    path: Path
    after: str


def _lookup(fragment: str) -> _Lookup | None:
    if "self" not in fragment:
        return None
    text = fragment.lstrip()
    try:
        statements = ast.parse(text).body
    except SyntaxError:
        return None  # no whole statement
    value = getattr(statements[0], "value", None) if statements else None
    for part in (value, getattr(value, "func", None)):
        path = _path(part)
        if path and part is not None and part.lineno == part.end_lineno == 1:
            code, begin = text.encode(), fragment[: len(fragment) - len(text)]
            before, after = code[: part.col_offset].decode(), code[part.end_col_offset :].decode()
            return _Lookup(begin + before, path, after)
    return None


def _path(expression: ast.AST | None) -> Path | None:
    """("a", "0") of ``getattr(self.a, "0")``; None for what is no such chain."""
    match expression:
        case ast.Name(id="self"):
            return ()
        case ast.Attribute(value=inner, attr=last):
            pass
        case ast.Call(func=ast.Name(id="getattr"), args=[inner, ast.Constant(value=str(last))]):
            pass
        case _:
            return None
    above = _path(inner)
    return None if above is None else (*above, last)


def _shared(containers: Counter[Path]) -> set[Path]:
    """Containers that would be looked up more than once, when those below them are looked up once."""
    counts, shared = Counter(containers), set[Path]()
    everything = {prefix for path in containers for prefix in _prefixes(path)}
    for path in sorted(everything, key=len, reverse=True):
        if counts[path] > 1:
            shared.add(path)
        counts[path[:-1]] += 1 if path in shared else counts[path]
    return shared


def _prefixes(path: Path) -> Iterator[Path]:
    """("a",), ("a", "b"), and so on."""
    return (path[:n] for n in range(1, len(path) + 1))


def _names(paths: set[Path], taken: set[str]) -> dict[Path, str]:
    names: dict[Path, str] = {}
    taken = taken.union(_TAKEN)
    for path in sorted(paths):
        name = re.sub(r"\W", "_", "_".join(path))
        name = f"_{name}" if name[0].isdigit() else name
        while name in taken or keyword.iskeyword(name):
            name += "_"
        taken.add(name)
        names[path] = name
    return names


def _spelled(path: Path, known: dict[Path, str]) -> str:
    """An expression for a path that begins at the longest one known."""
    n = max(n for n in range(len(path) + 1) if path[:n] in known)
    words = known[path[:n]]
    for part in path[n:]:
        words = f"{words}.{part}" if part.isidentifier() else f'getattr({words}, "{part}")'
    return words
