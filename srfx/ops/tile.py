"""Positions of an axis several times: repeat, tile, repeat_interleave (theory: Lemmas M1 to M5)."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from srfx.ir.call import Call
from srfx.ir.editor import GraphEdit
from srfx.ir.program import Value
from srfx.lattice.movement import Fields, Regroup, Step, Take
from srfx.ops.facts import FactTable, Labeller
from srfx.ops.movement import AlongAxis, Movement, _axis
from srfx.ops.registry import op_rule

aten = torch.ops.aten


@op_rule("repeat", aten.repeat.default, torch.tile, "tile", aten.tile.default)
class Repeat(Movement):
    """Tile axes: the channels of a tiled axis appear several times."""

    signature: tuple[str, ...] = ("input", "*repeats")

    def steps(self, call: Call) -> list[Step]:
        before, after = call.shape(self.source(call)), call.out_shape
        lifted = (1,) * (len(after) - len(before)) + before
        steps: list[Step] = [Regroup(before, lifted)] if lifted != before else []
        return steps + [
            Take(a, torch.arange(n) % m, m)
            for a, (n, m) in enumerate(zip(after, lifted, strict=True))
            if n != m
        ]

    def dynamic_axes(self, call: Call, labels: Labeller) -> list[int]:
        raw, rank = call.bound.get("repeats", call.bound.get("dims")), len(call.shape(self.source(call)))
        if not isinstance(raw, (tuple, list)):
            return list(range(rank)) if labels.is_dynamic(raw) else []
        return []  # however often an axis is tiled, its labels repeat as its channels do

    def label(self, call: Call, labels: Labeller) -> Fields:
        fields = super().label(call, labels)
        for axis in [a for a, f in fields.items() if f.shape[a] != call.out_shape[a] or _is_single(f, a)]:
            labels.require(call.node, fields.pop(axis).reshape(-1)[:1])
        return fields


def _is_single(labels: Tensor, axis: int) -> bool:
    return labels.shape[axis] > 1 and bool((labels == labels.narrow(axis, 0, 1)).all())


@op_rule(torch.repeat_interleave, "repeat_interleave", aten.repeat_interleave.self_int)
class RepeatInterleave(AlongAxis):
    """Every position several times in a row, a fixed number of times."""

    signature: tuple[str, ...] = ("input", "repeats", "dim")

    def is_unrecognised(self, call: Call) -> bool:
        return not isinstance(call.get("repeats"), int)

    def is_followed(self, call: Call) -> bool:
        return not self.is_unrecognised(call)

    def steps(self, call: Call) -> list[Step]:
        shape = call.shape(self.source(call))
        flat = (torch.Size(shape).numel(),)
        lead: list[Step] = [Regroup(shape, flat)] if call.get("dim") is None and shape != flat else []
        return [*lead, self.selection(call)]

    def selection(self, call: Call) -> Take:
        shape = call.shape(self.source(call))
        if call.get("dim") is None:
            shape = (torch.Size(shape).numel(),)
        axis = _axis(call.get("dim") or 0, len(shape))
        return Take(axis, torch.arange(shape[axis]).repeat_interleave(call.get("repeats")), shape[axis])

    def dynamic_axes(self, call: Call, labels: Labeller) -> list[int]:
        if not labels.is_dynamic(call.bound.get("repeats")):
            return []
        return (
            list(range(len(call.shape(self.source(call)))))
            if call.get("dim") is None
            else [self.selection(call).axis]
        )

    def reads(self, call: Call, facts: FactTable) -> list[Value]:
        return call.values()

    def compact(self, call: Call, facts: FactTable) -> Iterable[GraphEdit]:
        return []  # each kept position is still repeated as often

    def rewrite(self, call: Call, axis: int, index: Tensor) -> Iterable[GraphEdit]:
        return []  # each kept position is still repeated as often
