"""Add a narrow summand where it belongs, without spreading it first.

Before: z = x + spread(y, dim, index, C)      After: z = add_at(x, dim, index, y)

Exact: the same sums, and nothing is added where zeros would be.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from srfx.ir.attrs import get_attr
from srfx.ir.plan import Edit, Plan
from srfx.ir.shapes import propagate
from srfx.nn.selection import add_at, spread
from srfx.passes.base import HintedPass, register_pass

_ADDITIONS = (operator.add, operator.iadd, torch.add, torch.ops.aten.add.Tensor, "add")


@dataclass(frozen=True)
class FuseSpread(Edit):
    """``node`` adds what ``spread`` spreads to ``wide``."""

    wide: str = ""
    spread: str = ""


@register_pass("fuse-spreads")
class FuseSpreads(HintedPass):
    """Turn sums with a spread among zeros into add_at.

    Left alone: a spread with constants of its own, one that others read too, a sum that broadcasts or scales.
    """

    def plan(self, gm: fx.GraphModule) -> Plan:
        if not any(is_bare(gm, n) for n in gm.graph.nodes):
            return Plan()
        values = propagate(gm, self.hints)
        edits: list[Edit] = []
        for node, a, b in plain_sums(gm, values):
            if is_bare(gm, b):
                edits.append(FuseSpread(node.name, a.name, b.name))
            elif is_bare(gm, a):
                edits.append(FuseSpread(node.name, b.name, a.name))
        return Plan(edits)

    def apply(self, gm: fx.GraphModule, edit: Edit) -> None:
        assert isinstance(edit, FuseSpread)
        nodes = {n.name: n for n in gm.graph.nodes}
        node, narrow = nodes[edit.node], nodes[edit.spread]
        y, dim, index = narrow.args[:3]
        node.op, node.target = "call_function", add_at
        node.args = (nodes[edit.wide], dim, index, y)
        gm.graph.erase_node(narrow)


def plain_sums(gm: fx.GraphModule, values: dict[fx.Node, Any]) -> Iterator[tuple[fx.Node, fx.Node, fx.Node]]:
    """Sums of two different values of one shape and dtype, each with its summands."""
    for node in gm.graph.nodes:
        if node.target not in _ADDITIONS or len(node.args) != 2 or node.kwargs:
            continue
        a, b = node.args
        if not isinstance(a, fx.Node) or not isinstance(b, fx.Node) or a is b:
            continue
        if _alike(values[a], values[node]) and _alike(values[b], values[node]):
            yield node, a, b


def is_bare(gm: fx.GraphModule, node: fx.Node) -> bool:
    """A spread of some channels among zeros that one node reads."""
    is_plain = not node.kwargs and (len(node.args) < 5 or node.args[4] is None)
    if node.target is not spread or len(node.users) != 1 or not is_plain:
        return False
    index = node.args[2]
    return not isinstance(index, fx.Node) or get_attr(gm, str(index.target)).numel() > 0


def _alike(a: Any, b: Any) -> bool:
    return isinstance(a, Tensor) and isinstance(b, Tensor) and a.shape == b.shape and a.dtype == b.dtype
