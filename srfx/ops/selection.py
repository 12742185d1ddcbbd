"""Some positions of one axis: index_select, slices, select (theory: Lemmas M1 to M5)."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from srfx.ir.call import Call
from srfx.ir.editor import GraphEdit
from srfx.ir.plan import Reason
from srfx.ir.program import Value
from srfx.lattice.constancy import Constancy
from srfx.lattice.movement import Fields, Regroup, Step, Take
from srfx.nn.selection import select
from srfx.ops.facts import Demand, FactTable, Labeller, Live
from srfx.ops.movement import AlongAxis, _axis, _flatten_ties, original
from srfx.ops.registry import op_rule
from srfx.ops.sizes import is_range, positions, set_argument

aten = torch.ops.aten


@op_rule(torch.index_select, "index_select", aten.index_select.default, select)
class IndexSelect(AlongAxis):
    """index_select with a constant index; a computed index keeps every channel of the axis."""

    binds = True
    signature: tuple[str, ...] = ("input", "dim", "index")

    def index(self, call: Call) -> Tensor | None:
        value = original(call, call.value("index"))
        tensor = getattr(value, "tensor", None)
        return tensor if isinstance(tensor, Tensor) else None

    def is_followed(self, call: Call) -> bool:
        return self.index(call) is not None

    def selection(self, call: Call) -> Take:
        shape = call.shape(self.source(call))
        axis, index = _axis(call.get("dim"), len(shape)), self.index(call)
        assert index is not None
        index = index.cpu().flatten().long()
        return Take(axis, torch.where(index < 0, index + shape[axis], index), shape[axis])

    def label(self, call: Call, labels: Labeller) -> Fields:
        index = call.value("index")
        if index is not None:
            labels.pin(index, call.node.name, Reason.DATA_DEPENDENT)
        if self.index(call) is not None:
            return (
                self._label_copies(call, labels)
                if self._is_free(call, labels)
                else super().label(call, labels)
            )
        source = self.source(call)
        axis = _axis(call.get("dim"), len(call.out_shape))
        labels.pin(source, call.node.name, Reason.DATA_DEPENDENT, [axis])
        fields = {a: f for a, f in labels.of(source).items() if a != axis}
        for f in fields.values():
            _flatten_ties(f, axis, labels)
        return {a: f.narrow(axis, 0, 1) for a, f in fields.items()}

    def _is_free(self, call: Call, labels: Labeller) -> bool:
        """Whether what is taken may be narrower than its source: there is one vector of channels, or some repeat.

        Heads of keys repeat for grouped queries.
        """
        take, fields = self.selection(call), labels.of(self.source(call))
        if take.axis not in fields:
            return bool(take.extent == 1)  # the one head of multi-query attention
        if fields[take.axis].numel() != take.extent:
            return False
        alike = all(f.shape[take.axis] == 1 for a, f in fields.items() if a != take.axis)
        return alike or bool(take.source.unique().numel() < take.source.numel())

    def _label_copies(self, call: Call, labels: Labeller) -> Fields:
        """Each copy may go by itself: a kept copy keeps its source, and has the lanes that its source has."""
        take, fields, table = self.selection(call), labels.of(self.source(call)), labels.table
        shape = [take.source.numel() if a == take.axis else 1 for a in range(len(call.out_shape))]
        copies = table.fresh(take.source.numel()).view(shape)
        if take.axis in fields:
            table.imply(copies, labels.bound(take.apply(fields[take.axis])))
        found: Fields = {take.axis: copies}
        for axis, lanes in fields.items():
            if axis == take.axis:
                continue
            found[axis] = lanes
            if lanes.shape[take.axis] > 1:
                moved = take.apply(lanes)
                found[axis] = table.fresh(*moved.shape)
                table.imply(found[axis], moved)
                table.imply(moved, found[axis], [copies])
        return found

    def forward(self, call: Call, facts: FactTable) -> Constancy:
        if self.index(call) is not None:
            return super().forward(call, facts)
        axis = _axis(call.get("dim"), len(call.out_shape))
        return facts.constancy(self.source(call)).settle(set(range(len(call.out_shape))) - {axis})

    def backward(self, call: Call, live: Live, facts: FactTable) -> Demand:
        if self.index(call) is not None:
            return super().backward(call, live, facts)
        assert isinstance(live, Tensor)
        axis = _axis(call.get("dim"), len(call.out_shape))
        facts.refuse_constants(call.node, self.source(call), [axis], Reason.DATA_DEPENDENT)
        return {self.source(call): live}

    def reads(self, call: Call, facts: FactTable) -> list[Value]:
        return call.values()

    def compact(self, call: Call, facts: FactTable) -> Iterable[GraphEdit]:
        if self.index(call) is None:
            return []
        take, fields = self.selection(call), facts.fields(call.node)
        if take.axis in facts.fields(self.source(call)) or take.axis not in fields:
            return super().compact(call, facts)
        n = facts.count(fields, take.axis)
        return self.rewrite(call, take.axis, torch.zeros(n).long()) if n != take.source.numel() else []


@op_rule(torch.narrow, "narrow", aten.narrow.default, (aten.slice.Tensor, "input dim start end step"),
         (aten.slice_copy.Tensor, "input dim start end step"))  # fmt: skip
class Narrow(AlongAxis):
    """A slice of one axis; channels of a norm are taken as its operand has them (theory: Lemma N8)."""

    binds = True
    signature: tuple[str, ...] = ("input", "dim", "start", "length")

    def label(self, call: Call, labels: Labeller) -> Fields:
        fields, axis = super().label(call, labels), self.selection(call).axis
        return {a: labels.bound(f) if a == axis else f for a, f in fields.items()}

    def dynamic_axes(self, call: Call, labels: Labeller) -> list[int]:
        moves = any(labels.is_dynamic(call.bound.get(n)) for n in ("start", "end", "length", "step"))
        return [self.selection(call).axis] if moves else []

    def selection(self, call: Call) -> Take:
        shape = call.shape(self.source(call))
        axis = _axis(call.get("dim", 0), len(shape))
        start, extent = call.get("start"), shape[axis]
        if "length" in call.bound:
            start = _axis(start, extent)
            return Take(axis, torch.arange(start, start + call.get("length")), extent)
        found = range(extent)[slice(start, call.get("end"), call.get("step"))]
        return Take(axis, torch.tensor(list(found), dtype=torch.long), extent)

    def rewrite(self, call: Call, axis: int, index: Tensor) -> Iterable[GraphEdit]:
        if not is_range(index):
            return super().rewrite(call, axis, index)
        start = int(index[0]) if index.numel() else 0
        if "length" in call.bound:
            return [set_argument(call, "start", start), set_argument(call, "length", index.numel())]
        edits: list[GraphEdit] = [
            set_argument(call, "start", start),
            set_argument(call, "end", start + index.numel()),
        ]
        return edits + ([set_argument(call, "step", 1)] if call.get("step", 1) != 1 else [])


@op_rule(torch.select, "select", aten.select.int)
class Select(AlongAxis):
    """One position of an axis; the axis goes, and with it the position must stay if the result is computed."""

    signature: tuple[str, ...] = ("input", "dim", "index")

    def steps(self, call: Call) -> list[Step]:
        take = self.selection(call)
        shape = list(call.shape(self.source(call)))
        shape[take.axis] = 1
        return [take, Regroup(tuple(shape), call.out_shape)]

    def selection(self, call: Call) -> Take:
        shape = call.shape(self.source(call))
        axis = _axis(call.get("dim"), len(shape))
        return Take(axis, torch.tensor([_axis(call.get("index"), shape[axis])]), shape[axis])

    def dynamic_axes(self, call: Call, labels: Labeller) -> list[int]:
        return [self.selection(call).axis] if labels.is_dynamic(call.bound.get("index")) else []

    def label(self, call: Call, labels: Labeller) -> Fields:
        take = self.selection(call)
        fields = self.known_fields(call, labels, dict(labels.of(self.source(call))))
        position = fields.pop(take.axis, None)
        if position is not None:
            labels.require(call.node, position.index_select(take.axis, take.source).reshape(-1))
        for step in self.steps(call):
            fields, _ = step.carry(fields, labels.table, call.node.name)
        return fields

    def compact(self, call: Call, facts: FactTable) -> Iterable[GraphEdit]:
        take, fields = self.selection(call), facts.fields(self.source(call))
        if not facts.changed(fields, take.axis, take.extent):
            return []
        kept = facts.is_kept(fields[take.axis])
        assert bool(kept.index_select(take.axis, take.source).any()), (
            f"{call.where}: selects a removed channel"
        )
        index = positions(facts, fields, take.axis, take.source, kept.index_select(take.axis, take.source))
        return [set_argument(call, "index", int(index[0]))]
