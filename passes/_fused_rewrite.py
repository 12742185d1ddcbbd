"""Write a chain of views and permutations again for some of the rows it carried.

Permutations and unit axes are collected and written once, where something else needs the value, so that what
an axis only passed through leaves no trace.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from srfx.ir.program import Program
from srfx.ops.movement import AlongAxis, Copy
from srfx.ops.registry import resolve
from srfx.ops.views import Unflatten, View
from srfx.passes._fused_axis import Hop, Pick, SizeRead, Track, flat_axes, node_name, view_sizes

aten = torch.ops.aten


@dataclass(frozen=True)
class Pending:
    """``base`` with its axes in ``order``; None stands for a new axis of size 1."""

    base: fx.Node
    order: tuple[int | None, ...]

    @property
    def is_plain(self) -> bool:
        return self.order == tuple(range(len(self.order)))


def plain(base: fx.Node, rank: int) -> Pending:
    """A value as it is."""
    return Pending(base, tuple(range(rank)))


class PartWriter:
    """The chain for one part of the rows.

    Args:
        program: the graph before the rewrite.
        source: the node that computes only this part's rows, and its rank.
        n_part: rows of this part.
        n_rows: rows of the whole.
        drops_axis: whether an axis with one position left is left out.
    """

    def __init__(
        self, program: Program, source: fx.Node, rank: int, n_part: int, n_rows: int, drops_axis: bool
    ) -> None:
        self.program = program
        self.graph = source.graph
        self.source = plain(source, rank)
        self.n_part, self.n_rows = n_part, n_rows
        self.drops_axis = drops_axis
        self.known: dict[tuple[Hop, ...], Pending] = {}

    def count(self, track: Track) -> int:
        """Positions of this part along the tracked axis."""
        return track.n * self.n_part // self.n_rows

    def is_dropped(self, track: Track) -> bool:
        """Whether the value has lost the tracked axis."""
        return self.drops_axis and self.count(track) == 1

    # ------------------------------------------------------------------ ends
    def replace(self, pick: Pick) -> None:
        """Let the readers of a pick read this part."""
        value = self.value(pick.path)
        if pick.is_removed and not self.is_dropped(pick.track):
            base = self.flush(value, pick.node)
            with self.graph.inserting_before(pick.node):
                new = self._call(pick.node, aten.select.int, torch.select, base, pick.track.axis, 0)
        else:
            new = self.flush(value, pick.node)
        pick.node.replace_all_uses_with(new)

    def replace_size(self, read: SizeRead) -> None:
        """Let a size be read from this part."""
        if read.value is not None:
            replace_by_value(read.node, read.value)
            return
        base = self.flush(self.value(read.path), read.node)
        with self.graph.inserting_before(read.node):
            if _is_aten(read.node):
                new = self.graph.call_function(aten.sym_size.int, (base, read.axis))
            else:
                new = self.graph.call_method("size", (base, read.axis))
        new.meta = dict(read.node.meta)
        read.node.replace_all_uses_with(new)

    # ------------------------------------------------------------------ the chain
    def value(self, path: tuple[Hop, ...]) -> Pending:
        """The last value on a path, for this part; nodes are written where the old ones stand."""
        if not path:
            return self.source
        if path not in self.known:
            self.known[path] = self._step(self.value(path[:-1]), path[-1])
        return self.known[path]

    def _step(self, value: Pending, hop: Hop) -> Pending:
        rule, call = resolve(hop.node, self.program)
        gone = hop.before.axis if self.is_dropped(hop.before) else None
        if isinstance(rule, AlongAxis):  # a slice that takes all
            return value
        if isinstance(rule, Copy):
            return self._copy(value, hop.node)
        if isinstance(rule, View):
            return self._view(value, hop)
        if isinstance(rule, Unflatten):
            return self._unflatten(value, hop, gone)
        if node_name(hop.node) in ("flatten", "squeeze", "unsqueeze"):
            return self._flat(value, hop, gone)
        order = rule.steps(call)[0].order  # type: ignore[attr-defined]
        kept = _without(order, gone)
        return Pending(value.base, tuple(value.order[axis] for axis in kept))

    def _copy(self, value: Pending, node: fx.Node) -> Pending:
        if node_name(node) == "contiguous" and value.is_plain:
            return value
        base = self.flush(value, node)
        with self.graph.inserting_before(node):
            new = self.graph.node_copy(node, lambda n: base if n is node.args[0] else n)
        return plain(_renewed(new, node), len(value.order))

    def _view(self, value: Pending, hop: Hop) -> Pending:
        node, after = hop.node, hop.after
        sizes = view_sizes(node)
        base = self.flush(value, node)
        with self.graph.inserting_before(node):
            if isinstance(sizes, fx.Node):
                rank = len(self.program.shape(node))
                sizes = tuple(self.graph.call_function(operator.getitem, (sizes, i)) for i in range(rank))
            new_sizes = list(sizes)
            if self.is_dropped(after):
                del new_sizes[after.axis]
            elif new_sizes[after.axis] != -1:
                new_sizes[after.axis] = self.count(after)
            reshape = self._call(node, aten.reshape.default, torch.reshape, base, new_sizes)
            if node.target in (aten.view.default, "view"):
                reshape.op, reshape.target = node.op, node.target
        return plain(reshape, len(new_sizes))

    def _unflatten(self, value: Pending, hop: Hop, gone: int | None) -> Pending:
        _, call = resolve(hop.node, self.program)
        rank = len(self.program.shape(hop.node.all_input_nodes[0]))
        dim, sizes = call.get("dim") % rank, list(call["sizes"])
        at = hop.after.axis - dim
        if 0 <= at < len(sizes):
            if self.is_dropped(hop.after):
                del sizes[at]
            elif sizes[at] != -1:
                sizes[at] = self.count(hop.after)
        if len(sizes) == 1:
            return value
        base = self.flush(value, hop.node)
        with self.graph.inserting_before(hop.node):
            where = _shifted(dim, gone)
            new = self._call(hop.node, aten.unflatten.int, torch.unflatten, base, where, sizes)
        return plain(new, len(value.order) + len(sizes) - 1)

    def _flat(self, value: Pending, hop: Hop, gone: int | None) -> Pending:
        _, call = resolve(hop.node, self.program)
        name, axes = node_name(hop.node), flat_axes(call)
        assert axes is not None
        if name == "unsqueeze":
            at = call.get("dim", hop.node.args[-1]) % len(call.out_shape)
            at = _shifted(at, hop.after.axis if gone is not None else None)
            return Pending(value.base, (*value.order[:at], None, *value.order[at:]))
        axes = tuple(_shifted(a, gone) for a in axes)
        if name == "squeeze" and value.order[axes[0]] is None:
            return Pending(value.base, tuple(o for i, o in enumerate(value.order) if i != axes[0]))
        base = self.flush(value, hop.node)
        with self.graph.inserting_before(hop.node):
            if name == "squeeze":
                new = self._call(hop.node, aten.squeeze.dim, torch.squeeze, base, axes[0])
            else:
                new = self._call(hop.node, aten.flatten.using_ints, torch.flatten, base, axes[0], axes[-1])
        n_lost = 1 if name == "squeeze" else len(axes) - 1
        return plain(new, len(value.order) - n_lost)

    def flush(self, value: Pending, before: fx.Node) -> fx.Node:
        """Write what is pending, before the given node."""
        axes = [axis for axis in value.order if axis is not None]
        base = value.base
        with self.graph.inserting_before(before):
            moved = [i for i, axis in enumerate(axes) if axis != i]
            if len(moved) == 2:
                base = self._call(before, aten.transpose.int, torch.transpose, base, *moved)
            elif moved:
                base = self._call(before, aten.permute.default, torch.permute, base, axes)
            for i, axis in enumerate(value.order):
                if axis is None:
                    base = self._call(before, aten.unsqueeze.default, torch.unsqueeze, base, i)
        return base

    def _call(self, like: fx.Node, ours: Any, eager: Any, *args: Any) -> fx.Node:
        new = self.graph.call_function(ours if _is_aten(like) else eager, args)
        return _renewed(new, like)


def replace_by_value(node: fx.Node, value: Any) -> None:
    """Every reader of a node gets the value itself."""
    for user in list(node.users):
        user.args = fx.map_arg(user.args, lambda n: value if n is node else n)
        user.kwargs = fx.map_arg(user.kwargs, lambda n: value if n is node else n)


def _is_aten(node: fx.Node) -> bool:
    """Whether the node, or what it reads, is spelled in ATen."""
    while node.target is operator.getitem:
        node = node.all_input_nodes[0]
    return isinstance(node.target, torch._ops.OpOverload)


def _renewed(new: fx.Node, old: fx.Node) -> fx.Node:
    """The place in the user's model is kept; the value of the old node is not the new one's."""
    new.meta = {k: v for k, v in old.meta.items() if k not in ("val", "tensor_meta", "example_value")}
    return new


def _without(order: Sequence[int], gone: int | None) -> list[int]:
    return [_shifted(axis, gone) for axis in order if axis != gone]


def _shifted(axis: int, gone: int | None) -> int:
    return axis if gone is None or axis < gone else axis - 1
