"""Two models side by side: which tensors changed, and what that comes to."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch
from rich import box
from rich.table import Table
from torch import nn

from srfx.record.keep_plan import TensorPlan
from srfx.record.recorder import inventory
from srfx.report.text import render
from srfx.report.units import count, shape_text, share, size_text


@dataclass(frozen=True)
class TensorChange:
    """One tensor, by name; a shape is None where it does not exist."""

    name: str
    before: tuple[int, ...] | None
    after: tuple[int, ...] | None


@dataclass(frozen=True)
class Diff:
    """What differs between two models, ``str()`` shows it as a table.

    Attributes:
        changes: tensors whose shapes differ or that only one of the models has, in the order of the first.
        n_same: tensors of equal shape.
        params: elements of the parameters of both.
        bytes: of parameters and buffers of both.
    """

    changes: tuple[TensorChange, ...]
    n_same: int
    params: tuple[int, int]
    bytes: tuple[int, int]

    def to_dict(self) -> dict[str, Any]:
        """All of it as plain data."""
        return asdict(self)

    def to_json(self) -> str:
        """All of it as JSON."""
        return json.dumps(self.to_dict(), sort_keys=True)

    def __str__(self) -> str:
        table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
        table.add_column("tensor", overflow="fold")
        table.add_column("before")
        table.add_column("after")
        table.add_column("left", justify="right")
        for change in self.changes:
            b, a = (None if s is None else math.prod(s) for s in (change.before, change.after))
            left = share(a or 0, b) if b is not None else ""
            table.add_row(change.name, _text(change.before), _text(change.after), left)
        (p, q), (m, n) = self.params, self.bytes
        lines = [
            f"{len(self.changes)} tensors changed, {self.n_same} have the same shape",
            f"parameters  {count(p)} -> {count(q)} ({share(q, p)})",
            f"bytes       {size_text(m)} -> {size_text(n)} ({share(n, m)})",
        ]
        return render([table, *lines] if self.changes else lines)


def diff(before: nn.Module, after: nn.Module) -> Diff:
    """Compare the tensors of two models by name; ties count once.

    Example:
        >>> found = diff(nn.Linear(4, 8), nn.Linear(4, 3))
        >>> found.changes[0]
        TensorChange(name='weight', before=(8, 4), after=(3, 4))
        >>> found.params
        (40, 15)
    """
    old, new = inventory(before), inventory(after)
    by_name = {n: t for t in new.values() for n in (t.name, *t.aliases)}
    changes, n_same, seen = [], 0, set()
    for tensor in old.values():
        found = next((by_name[n] for n in (tensor.name, *tensor.aliases) if n in by_name), None)
        if found is not None:
            seen.add(found.name)
        shape = None if found is None else found.shape
        if shape == tensor.shape:
            n_same += 1
        else:
            changes.append(TensorChange(tensor.name, tensor.shape, shape))
    changes += [TensorChange(t.name, None, t.shape) for t in new.values() if t.name not in seen]
    totals = [list(_totals(found.values())) for found in (old, new)]
    return Diff(
        tuple(changes),
        n_same,
        (sum(p for p, _ in totals[0]), sum(p for p, _ in totals[1])),
        (sum(b for _, b in totals[0]), sum(b for _, b in totals[1])),
    )


def _totals(tensors: Any) -> Iterator[tuple[int, int]]:
    for t in tensors:
        assert isinstance(t, TensorPlan)
        n = math.prod(t.shape)
        yield (n if t.role == "parameter" else 0), n * getattr(torch, t.dtype).itemsize


def _text(shape: tuple[int, ...] | None) -> str:
    return "" if shape is None else shape_text(shape) or "1"
