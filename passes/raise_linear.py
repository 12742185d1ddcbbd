"""Raise what decomposition made of linear layers back to one op.

Before: w = t(weight); y = addmm(bias, x, w)      After: y = linear(x, weight, bias)
Before: w = t(weight); y = mm(x, w)               After: y = linear(x, weight)         [the same sums]

The weight then stands where rules look for it, its zeros are seen, and the result is the smaller graph.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import fx

from srfx.ir.attrs import get_attr
from srfx.ir.plan import Edit, Plan
from srfx.passes.base import Pass, register_pass

aten = torch.ops.aten
_TRANSPOSES = {aten.t.default: (), aten.permute.default: ([1, 0],), aten.transpose.int: (0, 1)}


@dataclass(frozen=True)
class RaiseLinear(Edit):
    """``node`` becomes ``linear(x, weight, bias)``; all named by node."""

    x: str = ""
    weight: str = ""
    bias: str | None = None


@register_pass("raise-linear")
class RaiseLinears(Pass):
    """Turn addmm and mm with a transposed stored weight into linear.

    Left alone: scaled addmm, a bias that is not one stored vector, a weight that is computed.
    """

    def plan(self, gm: fx.GraphModule) -> Plan:
        edits: list[Edit] = []
        for node in gm.graph.nodes:
            if node.op != "call_function":
                continue
            if node.target is aten.mm.default:
                weight = _transposed(node.args[1])
                if weight is not None:
                    edits.append(RaiseLinear(node.name, node.args[0].name, weight.name))
            elif node.target is aten.addmm.default and all(v == 1 for v in node.kwargs.values()):
                bias, weight = node.args[0], _transposed(node.args[2])
                if weight is not None and _stored_rank(bias) == 1:
                    edits.append(RaiseLinear(node.name, node.args[1].name, weight.name, bias.name))
        return Plan(edits)

    def apply(self, gm: fx.GraphModule, edit: Edit) -> None:
        assert isinstance(edit, RaiseLinear)
        nodes = {n.name: n for n in gm.graph.nodes}
        node, names = nodes[edit.node], (edit.x, edit.weight, edit.bias)
        node.target = aten.linear.default
        node.args, node.kwargs = tuple(nodes[n] for n in names if n is not None), {}

    def finish(self, gm: fx.GraphModule) -> None:
        for node in reversed(gm.graph.nodes):
            if not node.users and node.op == "call_function" and node.target in _TRANSPOSES:
                gm.graph.erase_node(node)


def _transposed(node: object) -> fx.Node | None:
    """The stored matrix whose transpose a node is."""
    if not isinstance(node, fx.Node) or node.op != "call_function" or node.target not in _TRANSPOSES:
        return None
    source, *rest = node.args
    wanted = _TRANSPOSES[node.target]
    if not isinstance(source, fx.Node) or _stored_rank(source) != 2 or tuple(rest) != tuple(wanted):
        return None
    return source


def _stored_rank(node: object) -> int | None:
    """Number of axes of a stored tensor; None for anything computed."""
    if not isinstance(node, fx.Node) or node.op != "get_attr":
        return None
    owner = node.graph.owning_module
    assert owner is not None
    found = get_attr(owner, str(node.target))
    return found.dim() if isinstance(found, torch.Tensor) else None
