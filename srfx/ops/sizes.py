"""Rewriting the sizes and positions that stand in a call's arguments."""

from __future__ import annotations

from math import gcd
from typing import Any

import torch
from torch import Tensor, fx

from srfx.ir.call import Call
from srfx.ir.editor import Expr, GraphEdit, Item, Ref, Scaled
from srfx.ir.edits import IndexInstead, SetArgument
from srfx.ir.program import Param
from srfx.lattice.movement import Fields, Shape
from srfx.ops.facts import FactTable


def resized(
    call: Call, facts: FactTable, name: str, fields: Fields, shape: Shape, first_axis: int = 0
) -> list[GraphEdit]:
    """Argument ``name`` lists sizes of the result from ``first_axis`` on: put in the counts that stay.

    An axis without a change keeps its argument, -1 stays -1, a literal becomes the count, a size computed in the
    graph is scaled by the kept part (exact, since an axis that repeats its channels shrinks by that part).
    """
    raw = call[name]
    sizes = call.hint(raw)
    changed = {a: facts.count(fields, a) for a in fields if facts.changed(fields, a, shape[a])}
    if not any(first_axis <= a < first_axis + len(sizes) for a in changed):
        return []
    new: list[Expr] = []
    for i, hint in enumerate(sizes):
        entry = Item(raw.name, i) if isinstance(raw, fx.Node) else raw[i]
        axis = first_axis + i
        if isinstance(entry, fx.Node):
            entry = Ref(entry.name)
        if axis in changed and hint != -1:
            entry = shrunk(entry, changed[axis], shape[axis])
        new.append(entry)
    return [set_argument(call, name, tuple(new))]


def shrunk(size: Expr, count: int, extent: int) -> Expr:
    """The size expression of an axis of which ``count`` of ``extent`` positions stay."""
    if isinstance(size, int):
        return count
    common = gcd(count, extent)
    return Scaled(size, count // common, extent // common)


def set_argument(call: Call, name: str, value: Expr) -> SetArgument:
    """An edit of this call's argument."""
    return SetArgument(call.node.name, name, value, call.signature)


def positions(facts: FactTable, fields: Fields, axis: int, source: Tensor, taken: Tensor) -> Tensor:
    """Where the kept part of a selection finds its sources once the operand is compacted, [kept].

    Args:
        facts: with the kept set.
        fields: of the operand.
        axis: along which is selected.
        source: [n] original positions, -1 for new ones (they stay -1).
        taken: kept flags of the result along the axis, a layout tensor.
    """
    kept = facts.is_kept(fields[axis]).movedim(axis, -1)
    kept = kept.flatten(0, -2) if kept.dim() > 1 else kept.unsqueeze(0)
    if kept.shape[0] == 1:
        order = facts.index(fields, axis)
        ranked = torch.zeros(kept.shape[1], dtype=torch.long).index_copy(
            0, order, torch.arange(order.numel())
        )
    chosen = taken.movedim(axis, -1)
    chosen = chosen.flatten(0, -2) if chosen.dim() > 1 else chosen.unsqueeze(0)
    row = int(kept.any(1).nonzero()[0]) if bool(kept.any()) else 0
    rank = ranked if kept.shape[0] == 1 else kept[row].cumsum(0) - 1
    wanted = source[chosen[min(row, chosen.shape[0] - 1)]]
    return torch.where(wanted < 0, wanted, rank[wanted.clamp(min=0)])


def is_range(index: Tensor) -> bool:
    """Whether positions are consecutive and ascending."""
    return index.numel() < 2 or bool((index.diff() == 1).all())


def index_instead(call: Call, operand: Any, axis: int, index: Tensor) -> IndexInstead:
    """Replace this call by an index_select of ``operand``."""
    assert isinstance(operand, fx.Node)
    return IndexInstead(call.node.name, operand.name, axis, f"{call.node.name}_index", index)


def operand_node(call: Call, name: str = "input") -> fx.Node:
    """The node that stands at an argument (a get_attr node for a parameter)."""
    node = call[name]
    assert isinstance(node, fx.Node) and not isinstance(node, Param)
    return node
