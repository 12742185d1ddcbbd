"""Whether an axis of a value holds channels: as many at every batch size, length and picture size."""

from __future__ import annotations

from torch import Tensor, fx

from srfx.ir.call import Call
from srfx.ir.program import Param, Program
from srfx.lattice.movement import Permute, Regroup, Step, Take
from srfx.ops.attention import Matmul
from srfx.ops.contraction import Contraction
from srfx.ops.elementwise import Elementwise
from srfx.ops.indexing import GetItem, Indexing
from srfx.ops.join import Concat
from srfx.ops.movement import Copy, Movement
from srfx.ops.norm import LayerNorm
from srfx.ops.registry import resolve
from srfx.ops.rule import OpRule
from srfx.ops.selection import IndexSelect, Narrow, Select
from srfx.ops.shuffle import ChannelShuffle
from srfx.ops.spatial import PerChannel
from srfx.ops.splitting import Splitting
from srfx.ops.views import Expand, Reshaping, View
from srfx.passes._fused_axis import AXIS_MOVES, is_fixed, view_sizes


def holds_channels(program: Program, node: fx.Node, axis: int) -> bool:
    """Whether the axis comes from the rows of a weight, through ops that keep, regroup or join axes.

    Args:
        program: the graph.
        node: a tensor value.
        axis: not negative.
    """
    seen: set[tuple[fx.Node, int]] = set()
    stack = [(node, axis)]
    while stack:
        place = stack.pop()
        if place in seen:
            continue
        seen.add(place)
        found = _above(program, *place)
        if found is None:
            return True
        stack += found
    return False


def _above(program: Program, node: fx.Node, axis: int) -> list[tuple[fx.Node, int]] | None:
    """Operands and the axis of each that this axis comes from; None when a weight or a literal makes it."""
    if not node.op.startswith("call") or not program.is_tensor(node):
        return []
    rule, call = resolve(node, program)
    if _is_projection(rule, call):
        return None if axis == _row_axis(rule, call) else []
    if call.value("input") is None and isinstance(call.bound.get("input"), fx.Node):
        return _of_piece(program, call, axis)
    if isinstance(rule, Movement):
        return _through(program, rule, call, axis)
    if isinstance(rule, PerChannel) and isinstance(call.output, Tensor):  # batch norm, pooling, interpolation
        source = call["input"]
        return [(source, axis)] if isinstance(source, fx.Node) and axis == 1 < call.output.dim() else []
    if isinstance(rule, (Elementwise, Concat, LayerNorm)):
        size, rank = call.out_shape[axis], len(call.out_shape)
        same = [n for n in node.all_input_nodes if program.is_tensor(n) and len(program.shape(n)) == rank]
        return [(n, axis) for n in same if program.shape(n)[axis] == size]
    return []


def _is_projection(rule: OpRule, call: Call) -> bool:
    if isinstance(rule, Contraction):
        return True
    weight = call.value("other") if isinstance(rule, Matmul) else None  # of x @ W
    return isinstance(weight, Param) and len(weight.shape) == 2


def _row_axis(rule: OpRule, call: Call) -> int:
    return rule.channel_axis(call) if isinstance(rule, Contraction) else len(call.out_shape) - 1


def _of_piece(program: Program, call: Call, axis: int) -> list[tuple[fx.Node, int]]:
    """One element of a split."""
    split = call.bound["input"]
    rule, inner = resolve(split, program)
    source = inner.value("input")
    if not isinstance(rule, Splitting) or not isinstance(source, fx.Node):
        return []
    is_gone = len(program.shape(source)) > len(call.out_shape)
    return [(source, axis + 1 if is_gone and axis >= rule.axis(inner) else axis)]


def _through(program: Program, rule: Movement, call: Call, axis: int) -> list[tuple[fx.Node, int]] | None:
    source = call.value("input")
    if not isinstance(source, fx.Node):
        return []
    if isinstance(rule, View) and _is_literal(call, axis):
        return None
    if isinstance(rule, (Expand, IndexSelect, ChannelShuffle)) and len(program.shape(source)) == len(
        call.out_shape
    ):
        return [(source, axis)] if program.shape(source)[axis] == call.out_shape[axis] else []
    if isinstance(rule, GetItem):
        parsed = Indexing.parse(call, call.shape(source))
        steps = parsed.steps if parsed is not None else None
    elif isinstance(rule, (*AXIS_MOVES, Copy, Reshaping, Narrow, Select)):
        steps = rule.steps(call)
    else:
        steps = None
    if steps is None:
        return []
    at: int | None = axis
    for step in reversed(steps):
        at = _before(step, at, call) if at is not None else None
    return [(source, at)] if at is not None else []


def _is_literal(call: Call, axis: int) -> bool:
    sizes = view_sizes(call.node)
    return isinstance(sizes, tuple) and isinstance(sizes[axis], int) and sizes[axis] > 0


def _before(step: Step, axis: int, call: Call) -> int | None:
    """The axis of the operand that makes this axis of the result; None when there is none."""
    if isinstance(step, Permute):
        return step.order[axis]
    if isinstance(step, Take):
        return axis
    assert isinstance(step, Regroup)
    ins, outs = next(group for group in step.groups() if axis in group[1])
    wide = [i for i in ins if step.before[i] > 1] or list(ins)
    if len(wide) != 1 or (len(outs) > 1 and not is_fixed(step, call, ins, outs)):
        return None
    return wide[0]
