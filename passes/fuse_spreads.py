"""Add a narrow summand where it belongs, without spreading it first.

Before: z = x + spread(y, dim, index, C)      After: z = add_at(x, dim, index, y)

Exact: the same sums, and nothing is added where zeros would be.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from srfx.ir.attrs import get_attr
from srfx.ir.plan import Edit, Plan
from srfx.ir.shapes import hint_inputs, propagate
from srfx.nn.selection import add_at, spread
from srfx.passes.base import Pass, register_pass

_ADDITIONS = (operator.add, operator.iadd, torch.add, torch.ops.aten.add.Tensor, "add")


@dataclass(frozen=True)
class FuseSpread(Edit):
    """``node`` adds what ``spread`` spreads to ``wide``."""

    wide: str = ""
    spread: str = ""


@register_pass("fuse-spreads")
class FuseSpreads(Pass):
    """Turn sums with a spread among zeros into add_at.

    Left alone: a spread with constants of its own, one that others read too, a sum that broadcasts or scales.

    Args:
        hints: one example or fake value for each placeholder; None takes metadata or probes.
    """

    takes_hints = True

    def __init__(self, hints: Sequence[Any] | None = None) -> None:
        self.hints = hints

    def plan(self, gm: fx.GraphModule) -> Plan:
        sums = [
            n
            for n in gm.graph.nodes
            if n.target in _ADDITIONS and any(_is_bare(gm, m) for m in n.all_input_nodes)
        ]
        if not sums:
            return Plan()
        values = propagate(gm, self.hints if self.hints is not None else hint_inputs(gm))
        edits: list[Edit] = []
        for node in sums:
            if len(node.args) != 2 or node.kwargs or not all(isinstance(a, fx.Node) for a in node.args):
                continue
            a, b = node.args
            assert isinstance(a, fx.Node)
            assert isinstance(b, fx.Node)
            narrow, wide = (b, a) if _is_bare(gm, b) else (a, b)
            if a is not b and _alike(values[wide], values[node]) and _alike(values[narrow], values[node]):
                edits.append(FuseSpread(node.name, wide.name, narrow.name))
        return Plan(edits)

    def apply(self, gm: fx.GraphModule, edit: Edit) -> None:
        assert isinstance(edit, FuseSpread)
        nodes = {n.name: n for n in gm.graph.nodes}
        node, narrow = nodes[edit.node], nodes[edit.spread]
        y, dim, index = narrow.args[:3]
        node.op, node.target = "call_function", add_at
        node.args = (nodes[edit.wide], dim, index, y)
        gm.graph.erase_node(narrow)


def _is_bare(gm: fx.GraphModule, node: fx.Node) -> bool:
    """A spread of some channels among zeros that one node reads."""
    is_plain = not node.kwargs and (len(node.args) < 5 or node.args[4] is None)
    if node.target is not spread or len(node.users) != 1 or not is_plain:
        return False
    index = node.args[2]
    return not isinstance(index, fx.Node) or get_attr(gm, str(index.target)).numel() > 0


def _alike(a: Any, b: Any) -> bool:
    return isinstance(a, Tensor) and isinstance(b, Tensor) and a.shape == b.shape and a.dtype == b.dtype
