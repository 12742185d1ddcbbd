"""Write repeated heads as index_select, so that each copy may be kept or cut by itself.

Before: y = x[:, :, None].expand(N, H, n, T, D).reshape(N, H * n, T, D)
After:  y = index_select(x, 1, [0, 0, 1, 1, ...])

Followed literally, all copies of a head stay or go together.  As positions of an index, a copy that nobody
reads leaves the index, and a head goes when its last copy does.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from srfx.ir.attrs import free_path, set_attr
from srfx.ir.call import Call, write_argument
from srfx.ir.dead_code import remove_dead_nodes
from srfx.ir.plan import Edit, Plan, Reason, Refusal
from srfx.ir.program import Program
from srfx.ir.shapes import propagate
from srfx.lattice.movement import Regroup
from srfx.ops.attention import Attention
from srfx.ops.indexing import Indexing
from srfx.ops.registry import resolve
from srfx.ops.tile import RepeatInterleave
from srfx.ops.views import Expand, Flatten, Reshaping
from srfx.passes._channels import holds_channels
from srfx.passes._fused_axis import node_name
from srfx.passes.base import HintedPass, register_pass

aten = torch.ops.aten


@dataclass(frozen=True)
class IndexInstead(Edit):
    """A repetition becomes an index_select.

    Attributes:
        source: the value that is repeated.
        axis: the axis to select along.
        index: the positions.
        unit: an axis of size 1 to squeeze out of the source first, or None.
        is_operand: whether the call stays and only takes the result as its first argument.
        device: where the index lives.
    """

    source: str = ""
    axis: int = 0
    index: tuple[int, ...] = ()
    unit: int | None = None
    is_operand: bool = False
    device: str = "cpu"


@dataclass(frozen=True)
class RepeatHeads(Edit):
    """An attention with grouped heads gets keys and values with as many heads as the queries.

    Attributes:
        repeats: argument, its head axis, and the positions to select along it.
        device: where the indices live.
    """

    repeats: tuple[tuple[str, int, tuple[int, ...]], ...] = ()
    device: str = "cpu"


@register_pass("repeat-to-index-select")
class RepeatToIndexSelect(HintedPass):
    """Repeat channels by index_select: expand and reshape, repeat_interleave, attention with ``enable_gqa``.

    Matched are an expand of one axis of size 1 whose only reader merges it with the axis beside it, and
    repeat_interleave by a number.  scaled_dot_product_attention with ``enable_gqa=True`` gets its keys and
    values repeated before it.  Only axes that come from the rows of a weight are taken: their size is fixed.

    Refuses: UNTRACKED_AXIS when ``enable_gqa`` repeats heads that do not come from a weight.
    Source: ``repeat_kv`` in transformers; torch.nn.functional.scaled_dot_product_attention.
    """

    def plan(self, gm: fx.GraphModule) -> Plan:
        """Every repetition, in graph order."""
        program = Program(gm, propagate(gm, self.hints))
        plan = Plan()
        for node in gm.graph.nodes:
            if not node.op.startswith("call") or not program.is_tensor(node):
                continue
            rule, call = resolve(node, program)
            if isinstance(rule, Attention) and call.get("enable_gqa"):
                found = _grouped(program, call)
                plan.edits += found
                if not found:
                    plan.refusals.append(Refusal(node.name, Reason.UNTRACKED_AXIS, "enable_gqa"))
            elif isinstance(rule, Reshaping):
                plan.edits += _merged(program, call, rule)
            elif isinstance(rule, RepeatInterleave):
                plan.edits += _interleaved(program, call, rule)
        return plan

    def apply(self, gm: fx.GraphModule, edit: Edit) -> None:
        """Write the index_selects of one repetition."""
        nodes = {n.name: n for n in gm.graph.nodes}
        node = nodes[edit.node]
        if isinstance(edit, RepeatHeads):
            for name, axis, index in edit.repeats:
                operand = _argument(node, name)
                new = _select(gm, node, operand, axis, index, edit.device, f"{edit.node}_{name}_index")
                write_argument(node, Attention.signature, name, new)
            node.kwargs = {k: v for k, v in node.kwargs.items() if k != "enable_gqa"}
            return
        assert isinstance(edit, IndexInstead)
        source = nodes[edit.source]
        if edit.unit is not None:
            squeeze: Any = aten.squeeze.dim if _is_aten(node) else torch.squeeze
            with gm.graph.inserting_before(node):
                source = gm.graph.call_function(squeeze, (source, edit.unit))
        new = _select(gm, node, source, edit.axis, edit.index, edit.device, f"{edit.node}_index")
        if edit.is_operand:
            node.replace_input_with(node.all_input_nodes[0], new)
        else:
            node.replace_all_uses_with(new)

    def finish(self, gm: fx.GraphModule) -> None:
        """Drop the views that were replaced."""
        remove_dead_nodes(gm)


def _is_aten(node: fx.Node) -> bool:
    return isinstance(node.target, torch._ops.OpOverload)


def _argument(node: fx.Node, name: str) -> fx.Node:
    at = Attention.signature.index(name)
    found = node.args[at] if at < len(node.args) else node.kwargs[name]
    assert isinstance(found, fx.Node)
    return found


def _select(
    gm: fx.GraphModule,
    node: fx.Node,
    source: fx.Node,
    axis: int,
    index: tuple[int, ...],
    device: str,
    wanted: str,
) -> fx.Node:
    path = free_path(gm, wanted)
    set_attr(gm, path, torch.tensor(index, device=device))
    select: Any = aten.index_select.default if _is_aten(node) else torch.index_select
    with gm.graph.inserting_before(node):
        new = gm.graph.call_function(select, (source, axis, gm.graph.get_attr(path)))
    new.meta = {k: v for k, v in node.meta.items() if k not in ("val", "tensor_meta", "example_value")}
    return new


# ---------------------------------------------------------------------- expand, then merge
def _merged(program: Program, call: Call, rule: Reshaping) -> Iterator[IndexInstead]:
    """A view that merges an axis which an expand has repeated with the axis beside it."""
    expand = call.value("input")
    if not isinstance(expand, fx.Node) or not expand.op.startswith("call") or len(expand.users) != 1:
        return
    inner_rule, inner = resolve(expand, program)
    operand = inner.value("input")
    if not isinstance(inner_rule, Expand) or not isinstance(operand, fx.Node):
        return
    before, wide = program.shape(operand), program.shape(expand)
    units = [a for a, (m, n) in enumerate(zip(before, wide, strict=False)) if m != n]
    if len(before) != len(wide) or len(units) != 1:
        return
    unit = units[0]
    neighbour = _neighbour(Regroup(wide, call.out_shape), unit)
    if neighbour is None or not holds_channels(program, operand, neighbour):
        return
    positions = torch.arange(wide[neighbour])
    n = wide[unit]
    index = positions.repeat_interleave(n) if neighbour < unit else positions.repeat(n)
    source, squeezed = _without_unit(program, operand, unit)
    axis = neighbour - (neighbour > unit)
    selected = tuple(index.numel() if a == neighbour else size for a, size in enumerate(wide) if a != unit)
    is_operand = selected != call.out_shape
    yield IndexInstead(
        call.node.name,
        source.name,
        axis,
        tuple(index.tolist()),
        squeezed,
        is_operand,
        _device(program, source),
    )


def _neighbour(step: Regroup, unit: int) -> int | None:
    """The axis beside ``unit`` in the group that merges it."""
    ins, outs = next(group for group in step.groups() if unit in group[0])
    wide = [i for i in ins if step.before[i] > 1 or i == unit]
    at = wide.index(unit)
    if len([o for o in outs if step.after[o] > 1]) != 1:
        return None
    if len(wide) == 1:  # one head: the axis of size 1 beside it
        return next(
            (i for i in (unit - 1, unit + 1) if 0 <= i < len(step.before) and step.before[i] == 1), None
        )
    return wide[at - 1] if at else wide[at + 1]


def _without_unit(program: Program, operand: fx.Node, unit: int) -> tuple[fx.Node, int | None]:
    """The value before the axis of size 1 was put in, or the operand and the axis to squeeze."""
    node = operand
    while node.op.startswith("call"):
        rule, call = resolve(node, program)
        source = call.value("input")
        if not isinstance(source, fx.Node):
            break
        if isinstance(rule, Flatten) and node_name(node) == "unsqueeze":
            dim = node.kwargs.get("dim", node.args[-1])
            is_it = isinstance(dim, int) and dim % len(call.out_shape) == unit
            return (source, None) if is_it else (operand, unit)
        parsed = (
            Indexing.parse(call, call.shape(source))
            if "index" in call.bound and call.get("dim") is None
            else None
        )
        if parsed is not None and not parsed.takes and not parsed.picked:
            entries = [e for e in parsed.entries if e is not Ellipsis]
            if entries.count(None) == 1 and Ellipsis not in parsed.entries and entries.index(None) == unit:
                return source, None
        is_same = program.shape(source) == program.shape(node)
        if not is_same or node_name(node) not in ("slice", "contiguous", "alias"):
            break
        node = source
    return operand, unit


def _device(program: Program, node: fx.Node) -> str:
    return str(program.hints[node].device)


# ---------------------------------------------------------------------- other spellings
def _interleaved(program: Program, call: Call, rule: RepeatInterleave) -> Iterator[IndexInstead]:
    """repeat_interleave by a number along one axis."""
    source = call.value("input")
    if not isinstance(source, fx.Node) or not isinstance(call.get("repeats"), int) or call.get("dim") is None:
        return
    take = rule.selection(call)
    if holds_channels(program, source, take.axis):
        index = tuple(take.source.tolist())
        yield IndexInstead(call.node.name, source.name, take.axis, index, device=_device(program, source))


def _grouped(program: Program, call: Call) -> list[RepeatHeads]:
    """Keys and values of fewer heads than queries: [.., H_kv, T, D]."""
    query = call.operand("query")
    n_heads = call.shape(query)[-3]
    repeats = []
    for name in ("key", "value"):
        operand = call.value(name)
        if not isinstance(operand, fx.Node):
            return []
        shape = call.shape(operand)
        axis = len(shape) - 3
        if shape[axis] == n_heads:
            continue
        if not holds_channels(program, operand, axis):
            return []
        index = torch.arange(shape[axis]).repeat_interleave(n_heads // shape[axis])
        repeats.append((name, axis, tuple(index.tolist())))
    return [RepeatHeads(call.node.name, tuple(repeats), str(call.output.device))]
