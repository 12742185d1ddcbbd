"""Joining: cat, stack and constant padding (theory: Lemmas M1 to M5)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from srfx.ir.call import Call
from srfx.ir.editor import GraphEdit, Ref
from srfx.ir.plan import Reason
from srfx.ir.program import Value
from srfx.lattice.constancy import Constancy
from srfx.lattice.movement import Fields, Shape, Step, Take
from srfx.ops.facts import Demand, FactTable, Labeller, Live, collapse
from srfx.ops.movement import Movement, _axis
from srfx.ops.registry import op_rule
from srfx.ops.rule import OpRule
from srfx.ops.sizes import positions, set_argument

aten = torch.ops.aten


@op_rule(
    torch.cat,
    torch.concat,
    torch.concatenate,
    aten.cat.default,
    aten.concat.default,
    aten.concatenate.default,
)
class Concat(OpRule):
    """y = cat(x_1 .. x_n, dim).  The channel sets of ``dim`` are concatenated, other axes are tied."""

    signature: tuple[str, ...] = ("tensors", "dim")

    def is_even(self, call: Call) -> bool:
        return True

    def parts(self, call: Call) -> list[Value]:
        found = [call.as_value(t) for t in call["tensors"]]
        return [v for v in found if v is not None and call.shape(v) != (0,)]

    def is_unrecognised(self, call: Call) -> bool:
        return not isinstance(call["tensors"], (list, tuple))  # a whole tuple as operand

    def axis(self, call: Call) -> int:
        return _axis(call.get("dim", 0), len(call.out_shape))

    def label(self, call: Call, labels: Labeller) -> Fields:
        axis, rank, site = self.axis(call), len(call.out_shape), call.node.name
        parts = [(labels.of(v), call.shape(v)) for v in self.parts(call)]
        # one position (a class token) does not make an axis of tokens a channel axis
        tracked = any(axis in f and s[axis] > 1 for f, s in parts) or all(axis in f for f, _ in parts)
        joined: Fields = {}
        alike: list[Fields] = [{} for _ in parts]
        if not tracked:
            for f, _ in parts:
                if axis in f:
                    labels.table.pin(f[axis], site, Reason.UNTRACKED_AXIS.name)
        if tracked:
            pieces = [f[axis] if axis in f else self._untracked(labels, s, axis, site) for f, s in parts]
            joined[axis] = _cat(pieces, axis)
        for other in range(rank):
            if other == axis:
                continue
            held = [f[other] for f, _ in parts if other in f]
            if len(held) < len(parts):
                for found in held:
                    labels.table.pin(found, site, Reason.UNTRACKED_AXIS.name)
            elif tracked and any(h.shape[axis] > 1 for h in held):
                joined[other] = _cat(
                    [_widen(h, axis, s[axis]) for h, (_, s) in zip(held, parts, strict=True)], axis
                )
            else:
                for fields, found in zip(alike, held, strict=True):
                    fields[other] = _one(labels, found, axis)
        shapes = [tuple(1 if a == axis else n for a, n in enumerate(s)) for _, s in parts]
        return {**joined, **labels.unify(list(zip(alike, shapes, strict=True)), rank, site)}

    def _untracked(self, labels: Labeller, shape: Shape, axis: int, site: str) -> Tensor:
        fresh = labels.table.fresh(*[n if a == axis else 1 for a, n in enumerate(shape)])
        labels.table.pin(fresh, site, Reason.UNTRACKED_AXIS.name)
        return fresh

    def forward(self, call: Call, facts: FactTable) -> Constancy:
        axis = self.axis(call)
        parts = [(facts.constancy(v), call.shape(v)[axis]) for v in self.parts(call)]
        varies = _cat([_widen(c.varies, axis, n) for c, n in parts], axis)
        value = _cat([_widen(c.value.double(), axis, n) for c, n in parts], axis)
        return Constancy(varies, value)

    def backward(self, call: Call, live: Live, facts: FactTable) -> Demand:
        assert isinstance(live, Tensor)
        demand: Demand = {}
        for value, piece in self._pieces(call, live):
            wanted = collapse(piece, facts.layout(value))
            demand[value] = demand[value] | wanted if value in demand else wanted
        return demand

    def _pieces(self, call: Call, t: Tensor) -> list[tuple[Value, Tensor]]:
        axis, start, found = self.axis(call), 0, []
        for value in self.parts(call):
            extent = call.shape(value)[axis]
            found.append((value, t if t.shape[axis] == 1 else t.narrow(axis, start, extent)))
            start += extent
        return found

    def _present(self, call: Call, facts: FactTable) -> list[bool]:
        """Operands that keep a channel along the axis; the others are left out."""
        axis = self.axis(call)
        fields = facts.fields(call.node)
        if axis not in fields:
            return [True] * len(self.parts(call))
        return [bool(piece.any()) for _, piece in self._pieces(call, facts.is_kept(fields[axis]))]

    def reads(self, call: Call, facts: FactTable) -> list[Value]:
        present = self._present(call, facts)
        return [v for v, p in zip(self.parts(call), present, strict=True) if p]

    def compact(self, call: Call, facts: FactTable) -> Iterable[GraphEdit]:
        present = self._present(call, facts)
        if all(present):
            return []
        kept = [t for t in call["tensors"] if call.as_value(t) in self.parts(call)]
        names = tuple(Ref(t.name) for t, p in zip(kept, present, strict=True) if p)
        return [set_argument(call, "tensors", names)]


@op_rule(torch.stack, aten.stack.default)
class Stack(OpRule):
    """y = stack(x_1 .. x_n, dim): the operands keep equally many channels, and may keep different ones."""

    signature: tuple[str, ...] = ("tensors", "dim")

    def parts(self, call: Call) -> list[Value]:
        return [v for v in (call.as_value(t) for t in call["tensors"]) if v is not None]

    def is_unrecognised(self, call: Call) -> bool:
        return not isinstance(call["tensors"], (list, tuple))  # a whole tuple as operand

    def axis(self, call: Call) -> int:
        return _axis(call.get("dim", 0), len(call.out_shape))

    def label(self, call: Call, labels: Labeller) -> Fields:
        axis = self.axis(call)
        parts = [
            {_past(a, axis): f.unsqueeze(axis) for a, f in labels.of(v).items()} for v in self.parts(call)
        ]
        joined: Fields = {}
        axes = {a: None for f in parts for a in f}
        for a in axes:
            held = [f[a] for f in parts if a in f]
            if len(held) == len(parts):
                joined[a] = _cat(held, axis)
                if len(axes) > 1 and bool((joined[a] == joined[a].narrow(axis, 0, 1)).all()):
                    # of heads: rows that differ need equal counts; of one vector of channels the axis stays in
                    # full, for constants may differ from operand to operand
                    joined[a] = joined[a].narrow(axis, 0, 1)
            else:
                for found in held:
                    labels.table.pin(found, call.node.name, Reason.UNTRACKED_AXIS.name)
        return joined

    def forward(self, call: Call, facts: FactTable) -> Constancy:
        axis, parts = self.axis(call), [facts.constancy(v) for v in self.parts(call)]
        return Constancy(
            _cat([c.varies.unsqueeze(axis) for c in parts], axis),
            _cat([c.value.double().unsqueeze(axis) for c in parts], axis),
        )

    def backward(self, call: Call, live: Live, facts: FactTable) -> Demand:
        assert isinstance(live, Tensor)
        axis = self.axis(call)
        demand: Demand = {}
        for i, value in enumerate(self.parts(call)):
            wanted = collapse(live.select(axis, min(i, live.shape[axis] - 1)), facts.layout(value))
            demand[value] = demand[value] | wanted if value in demand else wanted
        return demand


def _past(axis: int, inserted: int) -> int:
    return axis + 1 if axis >= inserted else axis


def _one(labels: Labeller, field: Tensor, axis: int) -> Tensor:
    """A field without its spread along an axis of which no channels are followed: what differs there is tied."""
    first = field.narrow(axis, 0, 1)
    labels.table.tie(first, field)
    return first


def _widen(t: Tensor, axis: int, extent: int) -> Tensor:
    return t.expand([extent if a == axis else n for a, n in enumerate(t.shape)])


def _cat(parts: Sequence[Tensor], axis: int) -> Tensor:
    """Cat of layout tensors, broadcast against each other on the other axes."""
    joint = torch.broadcast_shapes(*([1 if a == axis else n for a, n in enumerate(p.shape)] for p in parts))
    return torch.cat(
        [p.expand([p.shape[a] if a == axis else n for a, n in enumerate(joint)]) for p in parts], axis
    )


# ------------------------------------------------------------------------------------------ padding and shuffles
@op_rule(F.pad, aten.pad.default, aten.constant_pad_nd.default, nn.ZeroPad1d, nn.ZeroPad2d, nn.ZeroPad3d,
         nn.ConstantPad1d, nn.ConstantPad2d, nn.ConstantPad3d)  # fmt: skip
class Pad(Movement):
    """Constant padding: new positions hold the value.  Negative amounts crop."""

    signature: tuple[str, ...] = ("input", "pad", "mode", "value")

    def amounts(self, call: Call) -> tuple[int, ...]:
        pad = call.get("pad")
        pad = call.get("padding") if pad is None else pad
        rank = len(call.out_shape)
        return tuple(pad) if not isinstance(pad, int) else (pad,) * (2 * (rank - 2))

    def fill(self, call: Call) -> float:
        value = call.get("value")
        return 0.0 if value is None else float(value)

    def forward(self, call: Call, facts: FactTable) -> Constancy:
        if facts.has_run_time_number(call.bound.get("value")):
            return Constancy.top(len(call.out_shape))
        return super().forward(call, facts)

    def is_constant(self, call: Call) -> bool:
        mode = call.get("mode", "constant")
        return mode == "constant" or not isinstance(mode, str)

    def steps(self, call: Call) -> list[Step]:
        shape, pad = call.shape(self.source(call)), self.amounts(call)
        found: list[Step] = []
        for k in range(len(pad) // 2):
            axis, extent = len(shape) - 1 - k, shape[len(shape) - 1 - k]
            source = torch.arange(-pad[2 * k], extent + pad[2 * k + 1])
            if pad[2 * k] or pad[2 * k + 1]:
                if not self.is_constant(call):
                    numbers = torch.arange(extent, dtype=torch.float64).view(1, 1, -1)
                    source = F.pad(numbers, (pad[2 * k], pad[2 * k + 1]), call.get("mode")).flatten().long()
                found.append(Take(axis, torch.where(source < extent, source, -1).clamp(min=-1), extent))
        return found

    def dynamic_axes(self, call: Call, labels: Labeller) -> list[int]:
        if not labels.is_dynamic(call.bound.get("pad")):
            return []
        rank = len(call.out_shape)
        return [rank - 1 - k for k in range(len(self.amounts(call)) // 2)]

    def label(self, call: Call, labels: Labeller) -> Fields:
        axes = [s.axis for s in self.steps(call) if isinstance(s, Take)]
        if not self.is_constant(call):
            labels.pin(self.source(call), call.node.name, Reason.CHANNEL_MIXING, axes)
        return super().label(call, labels)

    def compact(self, call: Call, facts: FactTable) -> Iterable[GraphEdit]:
        fields, shape = facts.fields(call.node), call.out_shape
        before = facts.fields(self.source(call))
        pad, edited = list(self.amounts(call)), False
        for step in self.steps(call):
            assert isinstance(step, Take)
            if step.axis not in fields or not facts.changed(fields, step.axis, shape[step.axis]):
                continue
            taken = facts.is_kept(fields[step.axis])
            index = positions(facts, before, step.axis, step.source, taken)
            k = len(shape) - 1 - step.axis
            pad[2 * k : 2 * k + 2] = _amounts(index, facts.count(before, step.axis))
            edited = True
        name = "pad" if "pad" in call.bound else "padding"
        return [set_argument(call, name, tuple(pad))] if edited else []


def _amounts(index: Tensor, extent: int) -> tuple[int, int]:
    """Padding amounts (negative: cropping) that put positions ``index`` of ``extent``, -1 for new ones, in a row."""
    body = (index >= 0).nonzero().flatten()
    if not body.numel():
        return index.numel(), -extent
    first, last = int(body[0]), int(body[-1])
    return first or -int(index[first]), (index.numel() - 1 - last) or int(index[last]) + 1 - extent
