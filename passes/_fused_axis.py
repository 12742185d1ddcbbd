"""Follow the rows of a projection through views and permutations to the places that pick some of them.

The rows stand along one axis of a value as a middle factor: row = (i * n + j) * inner + l, with j the
position on the tracked axis.  A view that splits the axis offers several new ones, and the first along which
every reader picks constant positions is taken.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor, fx

from srfx.ir.call import Call
from srfx.ir.program import Param, Program
from srfx.lattice.movement import Permute, Regroup
from srfx.ops.indexing import Indexing
from srfx.ops.movement import AlongAxis, Copy, Movement
from srfx.ops.permute import MatrixTranspose, MoveDim, PermuteAxes, Transpose
from srfx.ops.registry import resolve
from srfx.ops.selection import Narrow, Select
from srfx.ops.splitting import Splitting
from srfx.ops.views import Flatten, Reshaping, Squeeze, Unflatten, View

aten = torch.ops.aten

AXIS_MOVES = (PermuteAxes, Transpose, MatrixTranspose, MoveDim)
"""Rules of ops that only reorder axes: one `Permute` step."""


@dataclass(frozen=True)
class Track:
    """Where the rows stand in a value: ``n`` positions of ``axis``, between two other factors."""

    axis: int
    outer: int
    n: int
    inner: int

    def rows(self, positions: Tensor) -> tuple[int, ...]:
        """The rows at these positions, ascending when the positions are."""
        table = torch.arange(self.outer * self.n * self.inner).view(self.outer, self.n, self.inner)
        return tuple(table[:, positions].flatten().tolist())


@dataclass(frozen=True)
class Hop:
    """One movement node with the track before and after it."""

    node: fx.Node
    before: Track
    after: Track


@dataclass(frozen=True)
class Pick:
    """A node whose value is the given rows of the last value on the path.

    Attributes:
        is_removed: whether the tracked axis is gone in the node's value.
    """

    node: fx.Node
    path: tuple[Hop, ...]
    track: Track
    rows: tuple[int, ...]
    is_removed: bool


@dataclass(frozen=True)
class SizeRead:
    """A node that reads a size of a value before its rows are split; ``value`` along the tracked axis."""

    node: fx.Node
    path: tuple[Hop, ...]
    axis: int
    value: int | None


Ends = list[Pick | SizeRead]


class Walk:
    """One walk from a projection downwards.

    Attributes:
        n_picked: places met that take one position of an axis away.
        blocker: a reader that does something else.
    """

    def __init__(self, program: Program) -> None:
        self.program = program
        self.n_picked = 0
        self.blocker: fx.Node | None = None

    def ends(self, value: fx.Node, track: Track, path: tuple[Hop, ...] = ()) -> Ends | None:
        """All places that read the rows of a value, or None when some reader takes them otherwise."""
        found: Ends = []
        for user in value.users:
            below = self._of_user(user, value, track, path)
            if below is None:
                self.blocker = self.blocker or user
                return None
            found += below
        return found

    def _of_user(self, user: fx.Node, value: fx.Node, track: Track, path: tuple[Hop, ...]) -> Ends | None:
        if user.op == "output" or sum(n is value for n in _operands(user)) != 1:
            return None
        size = _size_axis(user)
        if size is not None:
            is_whole = track.outer == track.inner == 1 and not any(_splits(hop) for hop in path)
            return self._size_reads(user, value, size, track, path) if is_whole else None
        positions = constant_index(self.program, user)
        if positions is not None:
            axis, picked = positions
            return self._pick(user, path, track, picked, is_removed=False) if axis == track.axis else None
        rule, call = resolve(user, self.program)
        if call.value("input") is not value:
            return None
        if isinstance(rule, Splitting):
            return self._of_pieces(user, rule, call, track, path)
        if user.target is operator.getitem:
            return self._of_index(user, call, track, path)
        if isinstance(rule, AlongAxis):
            if not isinstance(rule, (Narrow, Select)):
                return None
            take = rule.selection(call)
            if torch.equal(take.source, torch.arange(take.extent)) and not isinstance(rule, Select):
                return self.ends(user, track, (*path, Hop(user, track, track)))  # x[:, :, 0:n]: all of it
            if take.axis != track.axis:
                return None
            return self._pick(user, path, track, take.source, isinstance(rule, Select))
        if isinstance(rule, Movement):
            return self._of_movement(user, rule, call, track, path)
        return None

    def _size_reads(
        self, user: fx.Node, value: fx.Node, size: Any, track: Track, path: tuple[Hop, ...]
    ) -> Ends | None:
        rank = len(self.program.shape(value))
        reads = {user: size} if size is not Ellipsis else {item: _entry(item) for item in user.users}
        found: Ends = []
        for node, axis in reads.items():
            if not isinstance(axis, int):
                return None
            is_tracked = axis % rank == track.axis
            found.append(SizeRead(node, path, axis % rank, track.n if is_tracked else None))
        return found

    def _of_pieces(
        self, user: fx.Node, rule: Splitting, call: Call, track: Track, path: tuple[Hop, ...]
    ) -> Ends | None:
        if rule.axis(call) != track.axis:
            return None
        runs, rank = rule.runs(call), len(call.shape(rule.source(call)))
        found: Ends = []
        for item in user.users:
            if item.target is not operator.getitem or not isinstance(item.args[1], int):
                return None
            below = self._pick(item, path, track, runs[item.args[1]], call.output[0].dim() < rank)
            if below is None:
                return None
            found += below
        return found

    def _of_index(self, user: fx.Node, call: Call, track: Track, path: tuple[Hop, ...]) -> Ends | None:
        source = call.operand("input")
        parsed = Indexing.parse(call, call.shape(source))
        if parsed is not None and not parsed.steps:
            return self.ends(user, track, (*path, Hop(user, track, track)))
        if parsed is None or {*parsed.picked, *parsed.takes} != {track.axis} or None in parsed.entries:
            return None
        if track.axis in parsed.picked:
            return self._pick(user, path, track, torch.tensor([parsed.picked[track.axis]]), is_removed=True)
        return self._pick(user, path, track, parsed.takes[track.axis].source, is_removed=False)

    def _pick(
        self, node: fx.Node, path: tuple[Hop, ...], track: Track, positions: Tensor, is_removed: bool
    ) -> Ends | None:
        if not positions.numel() or bool((positions < 0).any()) or bool((positions.diff() <= 0).any()):
            return None
        if positions.numel() == track.n and not is_removed:
            return None
        self.n_picked += is_removed
        return [Pick(node, path, track, track.rows(positions), is_removed)]

    def _of_movement(
        self, user: fx.Node, rule: Movement, call: Call, track: Track, path: tuple[Hop, ...]
    ) -> Ends | None:
        if not is_supported(user, rule, call):
            return None
        for after in _moved(rule, call, track):
            below = self.ends(user, after, (*path, Hop(user, track, after)))
            if below is not None:
                return below
        return None


def _moved(rule: Movement, call: Call, track: Track) -> Iterator[Track]:
    """The tracks that a movement offers."""
    if isinstance(rule, Copy):
        yield track
        return
    if not isinstance(rule, (*AXIS_MOVES, Reshaping)):
        return
    step = rule.steps(call)[0]
    if isinstance(step, Permute):
        yield Track(step.order.index(track.axis), track.outer, track.n, track.inner)
    elif isinstance(step, Regroup):
        assert isinstance(rule, Reshaping)
        yield from _regrouped(rule, step, call, track)


def _regrouped(rule: Reshaping, step: Regroup, call: Call, track: Track) -> Iterator[Track]:
    ins, outs = next(group for group in step.groups() if track.axis in group[0])
    if any(step.before[i] > 1 for i in ins if i != track.axis):
        return
    wide = [o for o in outs if step.after[o] > 1]
    if isinstance(rule, Flatten) and not _is_plain(call, track.axis):
        return
    if len(wide) > 1 and isinstance(rule, View) and not is_fixed(step, call, ins, outs):
        return
    for o in wide:
        outer = prod(step.after[w] for w in wide if w < o)
        inner = prod(step.after[w] for w in wide if w > o)
        yield Track(o, track.outer * outer, step.after[o], inner * track.inner)


def _is_plain(call: Call, axis: int) -> bool:
    """Whether a flatten, squeeze or unsqueeze says which axes it touches, and leaves ``axis`` alone."""
    return flat_axes(call) is not None and axis not in (flat_axes(call) or ())


def flat_axes(call: Call) -> tuple[int, ...] | None:
    """Axes that a flatten merges or a squeeze removes, () for unsqueeze; None when not followed."""
    source = call.operand("input")
    rank, node = len(call.shape(source)), call.node
    name = node_name(node)
    dims = [*node.args[1:], *node.kwargs.values()]
    if name == "unsqueeze":
        return ()
    if name == "squeeze" and len(dims) == 1:
        given: Any = dims[0]
        if isinstance(given, (list, tuple)) and len(given) == 1:  # aten.squeeze.dims
            given = given[0]
        return (given % rank,) if isinstance(given, int) else None
    if name == "flatten" and call.module is None and all(isinstance(d, int) for d in dims):
        first = node.kwargs.get("start_dim", node.args[1] if len(node.args) > 1 else 0)
        last = node.kwargs.get("end_dim", node.args[2] if len(node.args) > 2 else -1)
        assert isinstance(first, int)
        assert isinstance(last, int)
        return tuple(range(first % rank, last % rank + 1))
    return None


def node_name(node: fx.Node) -> str:
    """``squeeze`` for aten.squeeze.dim, torch.squeeze and the method."""
    if isinstance(node.target, torch._ops.OpOverload):
        return str(node.target.overloadpacket.__name__)
    return node.target if isinstance(node.target, str) else str(getattr(node.target, "__name__", ""))


def is_fixed(step: Regroup, call: Call, ins: tuple[int, ...], outs: tuple[int, ...]) -> bool:
    """Whether a view splits this axis for every batch size, not only at the hint.

    Literal sizes are what they are; -1 or a computed size could take part of another axis, unless every other
    axis of the operand has one of the result.
    """
    sizes = view_sizes(call.node)
    if sizes is None or isinstance(sizes, fx.Node):
        return len(step.before) - len(ins) == len(step.after) - len(outs)
    if all(isinstance(sizes[o], int) and sizes[o] > 0 for o in outs):
        return True
    return len(step.before) - len(ins) == len(step.after) - len(outs)


def view_sizes(node: fx.Node) -> Any:
    """The sizes given to a view or reshape: a tuple, a node that computes them, or None (not given)."""
    given: Any = node.args[1:] or tuple(v for k, v in node.kwargs.items() if k in ("size", "shape"))
    if node_name(node) not in ("view", "reshape", "_unsafe_view", "view_copy") or not given:
        return None
    if len(given) > 1 or isinstance(given[0], int):
        return tuple(given)
    return given[0] if isinstance(given[0], fx.Node) else tuple(given[0])


def is_supported(node: fx.Node, rule: Movement, call: Call) -> bool:
    """Whether a node can be written again without the tracked axis."""
    if isinstance(rule, View):
        return view_sizes(node) is not None
    if isinstance(rule, (Flatten, Squeeze)):
        return flat_axes(call) is not None
    if isinstance(rule, Unflatten):
        has_literals = isinstance(call.get("dim"), int) and isinstance(call.get("sizes"), (tuple, list))
        return call.module is None and has_literals
    return True


def _splits(hop: Hop) -> bool:
    return hop.before.n != hop.after.n


def _size_axis(node: fx.Node) -> Any:
    """The axis whose size a node reads, Ellipsis for all of them, None when it does not read sizes."""
    if node.target is aten.sym_size.int:
        return node.args[1]
    if node.op == "call_method" and node.target == "size":
        return node.args[1] if len(node.args) > 1 else node.kwargs.get("dim", Ellipsis)
    if node.target is getattr and node.args[1] == "shape":
        return Ellipsis
    return None


def _entry(node: fx.Node) -> Any:
    return node.args[1] if node.target is operator.getitem else None


def _operands(node: fx.Node) -> list[fx.Node]:
    found: list[fx.Node] = []
    fx.node.map_arg((node.args, node.kwargs), found.append)
    return found


def constant_index(program: Program, node: fx.Node) -> tuple[int, Tensor] | None:
    """Axis and positions of ``x[:, [2, 3]]`` in its ATen spelling, when the index is a constant vector."""
    if node.target is not aten.index.Tensor:
        return None
    indices: Any = node.args[1]
    given = [(axis, i) for axis, i in enumerate(indices) if i is not None]
    if len(given) != 1 or not isinstance(given[0][1], fx.Node):
        return None
    axis, source = given[0][0], given[0][1]
    while node_name(source) in ("lift_fresh_copy", "detach", "detach_", "clone", "alias"):
        source = source.all_input_nodes[0]
    value, operand = program.value(source), node.args[0]
    if not isinstance(value, Param) or value.tensor.dtype != torch.long or value.tensor.dim() != 1:
        return None
    assert isinstance(operand, fx.Node)
    extent = program.shape(operand)[axis]
    positions = value.tensor.cpu()
    return axis, torch.where(positions < 0, positions + extent, positions)
