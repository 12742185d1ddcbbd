"""Movement: views, permutations, slices and copies; elements move, none is computed (theory: Lemmas M1 to M5)."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx, nn

from srfx.ir.call import Call
from srfx.ir.edits import GraphEdit
from srfx.ir.plan import Reason
from srfx.ir.program import Param, Value
from srfx.lattice.constancy import Affine, Constancy
from srfx.lattice.movement import Fields, Permute, Regroup, Step, Take, follow, pull_back, walk
from srfx.ops.facts import Demand, FactTable, Labeller, Live
from srfx.ops.registry import op_rule
from srfx.ops.rule import OpRule
from srfx.ops.sizes import index_instead, is_range, positions, resized, set_argument

aten = torch.ops.aten


class Movement(OpRule):
    """y[p] = x[s(p)] for a fixed map s of positions, given as steps."""

    def is_followed(self, call: Call) -> bool:
        """Whether this very call is such a map; its steps are asked for only then."""
        return True

    def steps(self, call: Call) -> list[Step]:
        """The map from the operand to the result."""
        raise NotImplementedError

    def fill(self, call: Call) -> float:
        """Value of positions that are new."""
        return 0.0

    def source(self, call: Call) -> Value:
        value = call.value("input")
        assert value is not None, f"{call.where}: no tensor operand"
        return value

    def dynamic_axes(self, call: Call, labels: Labeller) -> list[int]:
        """Axes of the operand along which the positions are known at run time only (theory: Lemma M5)."""
        return []

    def label(self, call: Call, labels: Labeller) -> Fields:
        fields = self.known_fields(call, labels, dict(labels.of(self.source(call))))
        for step in self.steps(call):
            fields, required = step.carry(fields, labels.table, call.node.name)
            for channel in required:
                labels.require(call.node, channel)
        return fields

    def known_fields(self, call: Call, labels: Labeller, fields: Fields) -> Fields:
        """The fields without dynamic axes, which stay whole and along which the others' labels have to agree."""
        dynamic = self.dynamic_axes(call, labels)
        for axis in dynamic:
            labels.pin(self.source(call), call.node.name, Reason.DATA_DEPENDENT, [axis])
            fields.pop(axis, None)
            for a, f in fields.items():
                _flatten_ties(f, axis, labels)
                fields[a] = f.narrow(axis, 0, 1)
        return fields

    def forward(self, call: Call, facts: FactTable) -> Constancy:
        before, steps = facts.constancy(self.source(call)), self.steps(call)
        dynamic = self.dynamic_axes(call, facts.labeller)
        if dynamic:  # any part of these axes may be taken: constant only where the whole axis is
            before = replace(
                before.settle(set(range(before.value.dim())) - set(dynamic)), sums_to_one=None, affine=None
            )
        affine = self.carry_affine(call, before.affine)
        total = None if before.sums_to_one is None else follow(steps, before.sums_to_one)
        if any(isinstance(s, Take) and bool((s.source < 0).any()) for s in steps):
            total = None
        varies, value = walk(steps, before.varies, False), walk(steps, before.value, self.fill(call))
        return Constancy(varies, value, affine, total)

    def carry_affine(self, call: Call, affine: Affine | None) -> Affine | None:
        """The operand's affine channels, if their axis arrives whole; new positions elsewhere make a border."""
        if affine is None:
            return None
        steps = self.steps(call)
        axis = follow(steps, affine.axis)
        if axis is None:
            return None
        fresh = any(isinstance(s, Take) and bool((s.source < 0).any()) for s in steps)
        if fresh and self.fill(call) != 0:
            return None
        return replace(affine, axis=axis, bordered=affine.bordered or fresh)

    def backward(self, call: Call, live: Live, facts: FactTable) -> Demand:
        assert isinstance(live, Tensor)
        source = self.source(call)
        wanted = pull_back(self.steps(call), live, facts.layout(source))
        for axis in self.dynamic_axes(call, facts.labeller):
            wanted = wanted.any(axis, keepdim=True)
        return {source: wanted.expand(facts.layout(source))}

    def reads(self, call: Call, facts: FactTable) -> list[Value]:
        return [self.source(call)]


@op_rule(
    nn.Identity, "contiguous", "clone", "detach", "to", "float", "double", "half", "bfloat16", "type", "type_as", "cpu", "cuda",
    torch.clone, torch.detach, "requires_grad_", "alias", aten.contiguous.default, aten.clone.default, aten.alias.default,
    aten.detach.default, aten.detach_.default, aten.to.dtype, aten.to.dtype_layout, aten.to.device, aten.to.other,
    aten._to_copy.default, aten.type_as.default, aten.lift_fresh_copy.default, aten.lift_fresh.default,
    aten.positive.default, torch.positive, torch.Tensor.contiguous,
)  # fmt: skip
class Copy(Movement):
    """y = x in another place, layout or dtype; a constant is rounded as the cast rounds it."""

    def steps(self, call: Call) -> list[Step]:
        return []

    def forward(self, call: Call, facts: FactTable) -> Constancy:
        source, dtype = self.source(call), call.output.dtype
        found = super().forward(call, facts)
        before = source.tensor.dtype if isinstance(source, Param) else call.program.hints[source].dtype
        if dtype == before or dtype.is_complex:
            return found
        value = found.value.to(dtype)
        if not dtype.is_floating_point:  # no linear map
            return Constancy(found.varies, value)
        return replace(found, value=value.double())


def _axis(dim: int, rank: int) -> int:
    return dim + rank if dim < 0 else dim


class Reshaping(Movement):
    """Row-major regrouping of the axes; the result's hint gives the new sizes."""

    def steps(self, call: Call) -> list[Step]:
        return [Regroup(call.shape(self.source(call)), call.out_shape)]


@op_rule(nn.Flatten, torch.flatten, "flatten", aten.flatten.using_ints, torch.ravel, "ravel",
         torch.unsqueeze, "unsqueeze", aten.unsqueeze.default)  # fmt: skip
class Flatten(Reshaping):
    """flatten, unsqueeze: no sizes in the arguments."""


@op_rule(torch.squeeze, "squeeze", aten.squeeze.default, aten.squeeze.dim, aten.squeeze.dims)
class Squeeze(Reshaping):
    """squeeze asks for sizes at run time: an axis that it leaves in place must not shrink to size 1."""

    signature: tuple[str, ...] = ("input", "dim")

    def sustain(self, call: Call, facts: FactTable) -> Tensor | None:
        source, dim = self.source(call), call.get("dim")
        fields, shape = facts.fields(source), call.shape(source)
        dims = range(len(shape)) if dim is None else [dim] if isinstance(dim, int) else dim
        second = []
        for axis in {_axis(d, len(shape)) for d in dims}:
            if axis in fields and shape[axis] > 1 and facts.count(fields, axis) == 1:
                kept = facts.is_kept(fields[axis])
                second.append(fields[axis].gather(axis, (~kept).long().argmax(axis, keepdim=True)).flatten())
        return torch.cat(second) if second else None


@op_rule("view", "reshape", "view_as", "reshape_as", torch.reshape, aten.view.default, aten.reshape.default,
         aten._unsafe_view.default, aten.view_copy.default, aten.view_as.default, aten.reshape_as.default)  # fmt: skip
class View(Reshaping):
    """view, reshape: sizes of changed axes are rewritten."""

    signature: tuple[str, ...] = ("input", "*size")

    def label(self, call: Call, labels: Labeller) -> Fields:
        return as_template(call, labels, super().label(call, labels))

    def reads(self, call: Call, facts: FactTable) -> list[Value]:
        return [self.source(call), *_template(call)]

    def compact(self, call: Call, facts: FactTable) -> Iterable[GraphEdit]:
        if isinstance(call.get("size"), fx.Node) or call.value("other") is not None:
            return []  # view_as: the shape comes from another tensor, which loses the same channels
        name = "size" if "size" in call.bound else "shape"
        return resized(call, facts, name, facts.fields(call.node), call.out_shape)


def _template(call: Call) -> list[Value]:
    """The tensor whose shape view_as and expand_as take."""
    found = [call.value(name) for name in ("other", "size")]
    return [v for v in found if v is not None]


def as_template(call: Call, labels: Labeller, fields: Fields) -> Fields:
    """The fields of a result that takes its shape from another tensor: both lose the same channels."""
    for other in _template(call):
        lent = {a: f for a, f in labels.of(other).items() if a not in fields and f.numel() == f.shape[a]}
        rest = {a: f for a, f in labels.of(other).items() if a not in lent}
        shape = tuple(1 if a in lent else n for a, n in enumerate(call.out_shape))
        mine = {a: f for a, f in fields.items() if a not in lent}
        return {**labels.unify([(mine, shape), (rest, shape)], len(shape), call.node.name), **lent}
    return fields


@op_rule(nn.Unflatten, torch.unflatten, "unflatten", aten.unflatten.int)
class Unflatten(Reshaping):
    """unflatten: the new sizes begin at ``dim``."""

    signature: tuple[str, ...] = ("input", "dim", "sizes")

    def compact(self, call: Call, facts: FactTable) -> Iterable[GraphEdit]:
        rank = len(call.shape(self.source(call)))
        name = "unflattened_size" if call.module is not None else "sizes"
        return resized(
            call, facts, name, facts.fields(call.node), call.out_shape, _axis(call.get("dim"), rank)
        )


@op_rule("expand", torch.broadcast_to, "broadcast_to", aten.expand.default, "expand_as", aten.expand_as.default,
         aten.broadcast_to.default, aten.expand_copy.default)  # fmt: skip
class Expand(Movement):
    """Repeat axes of size 1; leading axes may be new."""

    signature: tuple[str, ...] = ("input", "*size")

    def steps(self, call: Call) -> list[Step]:
        before, after = call.shape(self.source(call)), call.out_shape
        lifted = (1,) * (len(after) - len(before)) + before
        return [Regroup(before, lifted)] if lifted != before else []

    def label(self, call: Call, labels: Labeller) -> Fields:
        fields, shape = super().label(call, labels), call.out_shape
        for axis in [a for a, f in fields.items() if f.shape[a] != shape[a]]:
            labels.require(call.node, fields.pop(axis))  # one channel repeated: not a channel axis any more
        return as_template(call, labels, fields)

    def reads(self, call: Call, facts: FactTable) -> list[Value]:
        return call.values()

    def compact(self, call: Call, facts: FactTable) -> Iterable[GraphEdit]:
        if isinstance(call.get("size"), fx.Node) or "size" not in call.bound:
            return []
        return resized(call, facts, "size", facts.fields(call.node), call.out_shape)


@op_rule("permute", torch.permute, aten.permute.default, aten.permute_copy.default)
class PermuteAxes(Movement):
    """permute."""

    signature: tuple[str, ...] = ("input", "*dims")

    def steps(self, call: Call) -> list[Step]:
        rank = len(call.out_shape)
        return [Permute(tuple(_axis(d, rank) for d in call.get("dims")))]


@op_rule("transpose", torch.transpose, aten.transpose.int, torch.swapaxes, "swapaxes", torch.swapdims, "swapdims",
         (aten.swapaxes.default, "input dim0 dim1"), (aten.swapdims.default, "input dim0 dim1"))  # fmt: skip
class Transpose(Movement):
    """transpose of two axes."""

    signature: tuple[str, ...] = ("input", "dim0", "dim1")

    def steps(self, call: Call) -> list[Step]:
        order = list(range(len(call.out_shape)))
        a, b = (
            _axis(call.get(n, call.get(o)), len(order)) for n, o in (("dim0", "axis0"), ("dim1", "axis1"))
        )
        order[a], order[b] = order[b], order[a]
        return [Permute(tuple(order))]


@op_rule("t", torch.t, aten.t.default, "adjoint", aten.numpy_T.default, aten.mT.default, torch.adjoint)
class MatrixTranspose(Movement):
    """Transpose of the last two axes (of a vector: itself)."""

    def steps(self, call: Call) -> list[Step]:
        order = list(range(len(call.out_shape)))
        return [Permute((*order[:-2], *reversed(order[-2:])))]


@op_rule(torch.movedim, "movedim", torch.moveaxis, "moveaxis", aten.movedim.int, aten.movedim.intlist,
         aten.moveaxis.int, aten.moveaxis.intlist)  # fmt: skip
class MoveDim(Movement):
    """movedim."""

    signature: tuple[str, ...] = ("input", "source", "destination")

    def steps(self, call: Call) -> list[Step]:
        rank = len(call.out_shape)
        source, target = call.get("source"), call.get("destination")
        source = [source] if isinstance(source, int) else list(source)
        target = [target] if isinstance(target, int) else list(target)
        order: list[int | None] = [None] * rank
        for s, t in zip(source, target, strict=True):
            order[_axis(t, rank)] = _axis(s, rank)
        rest = (a for a in range(rank) if a not in order)
        return [Permute(tuple(next(rest) if o is None else o for o in order))]


# ------------------------------------------------------------------------------------------ along one axis
class AlongAxis(Movement):
    """The result takes positions ``source`` of one axis, known when the graph is read."""

    def selection(self, call: Call) -> Take:
        raise NotImplementedError

    def steps(self, call: Call) -> list[Step]:
        return [self.selection(call)]

    def compact(self, call: Call, facts: FactTable) -> Iterable[GraphEdit]:
        step, fields = self.selection(call), facts.fields(self.source(call))
        after, extent = facts.fields(call.node), step.source.numel()
        if not facts.changed(fields, step.axis, step.extent) and not facts.changed(after, step.axis, extent):
            return []
        taken = facts.is_kept(after[step.axis])
        index = positions(facts, fields, step.axis, step.source, taken)
        return self.rewrite(call, step.axis, index)

    def rewrite(self, call: Call, axis: int, index: Tensor) -> Iterable[GraphEdit]:
        return [index_instead(call, call["input"], axis, index)]


@op_rule(torch.index_select, "index_select", aten.index_select.default)
class IndexSelect(AlongAxis):
    """index_select with a constant index; a computed index keeps every channel of the axis."""

    signature: tuple[str, ...] = ("input", "dim", "index")

    def index(self, call: Call) -> Tensor | None:
        value = call.value("index")
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
                if self._repeats(call, labels)
                else super().label(call, labels)
            )
        source = self.source(call)
        axis = _axis(call.get("dim"), len(call.out_shape))
        labels.pin(source, call.node.name, Reason.DATA_DEPENDENT, [axis])
        fields = {a: f for a, f in labels.of(source).items() if a != axis}
        for f in fields.values():
            _flatten_ties(f, axis, labels)
        return {a: f.narrow(axis, 0, 1) for a, f in fields.items()}

    def _repeats(self, call: Call, labels: Labeller) -> bool:
        """Whether some position of a channel axis is taken more than once, as heads of keys for grouped queries are."""
        take, fields = self.selection(call), labels.of(self.source(call))
        if take.axis not in fields:
            return bool(take.extent == 1)  # the one head of multi-query attention
        if fields[take.axis].numel() != take.extent:
            return False
        return bool(take.source.unique().numel() < take.source.numel())

    def _label_copies(self, call: Call, labels: Labeller) -> Fields:
        """Each copy may go by itself: a kept copy keeps its source, and has the lanes that its source has."""
        take, fields, table = self.selection(call), labels.of(self.source(call)), labels.table
        shape = [take.source.numel() if a == take.axis else 1 for a in range(len(call.out_shape))]
        copies = table.fresh(take.source.numel()).view(shape)
        if take.axis in fields:
            table.imply(copies, take.apply(fields[take.axis]))
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


def _flatten_ties(labels: Tensor, axis: int, labeller: Labeller) -> None:
    if labels.shape[axis] > 1:
        labeller.table.tie(labels, labels.narrow(axis, 0, 1))


_FLIPS: dict[Any, tuple[int, ...]] = dict.fromkeys((torch.fliplr, "fliplr", aten.fliplr.default), (1,))
_FLIPS |= dict.fromkeys((torch.flipud, "flipud", aten.flipud.default), (0,))


@op_rule(torch.flip, "flip", aten.flip.default, torch.fliplr, torch.flipud, "fliplr", "flipud", aten.fliplr.default,
         aten.flipud.default)  # fmt: skip
class Flip(Movement):
    """flip; an axis that loses channels is flipped all the same, the kept ones in reverse order."""

    signature: tuple[str, ...] = ("input", "*dims")

    def steps(self, call: Call) -> list[Step]:
        shape = call.out_shape
        dims = _FLIPS.get(call.node.target) or call.get("dims")
        dims = [dims] if isinstance(dims, int) else dims
        return [
            Take(a, torch.arange(shape[a]).flip(0), shape[a]) for a in (_axis(d, len(shape)) for d in dims)
        ]


@op_rule(torch.roll, "roll", aten.roll.default)
class Roll(AlongAxis):
    """roll along axes; a rolled channel axis that loses channels becomes an index_select."""

    signature: tuple[str, ...] = ("input", "shifts", "dims")

    def steps(self, call: Call) -> list[Step]:
        shape, shifts, dims = call.out_shape, call.get("shifts"), call.get("dims")
        if dims is None or dims == [] or dims == ():
            flat = (torch.Size(shape).numel(),)
            return [
                Regroup(shape, flat),
                Take(0, torch.arange(flat[0]).roll(shifts), flat[0]),
                Regroup(flat, shape),
            ]
        shifts = [shifts] if isinstance(shifts, int) else shifts
        dims = [dims] if isinstance(dims, int) else dims
        axes = [_axis(d, len(shape)) for d in dims]
        return [Take(a, torch.arange(shape[a]).roll(s), shape[a]) for a, s in zip(axes, shifts, strict=True)]

    def dynamic_axes(self, call: Call, labels: Labeller) -> list[int]:
        if not labels.is_dynamic(call.bound.get("shifts")):
            return []
        takes = [s for s in self.steps(call) if isinstance(s, Take)]
        return (
            [s.axis for s in takes]
            if len(takes) == len(self.steps(call))
            else list(range(len(call.out_shape)))
        )

    def label(self, call: Call, labels: Labeller) -> Fields:
        steps = self.steps(call)
        takes = [s for s in steps if isinstance(s, Take)]
        tracked = [s.axis for s in takes if s.axis in labels.of(self.source(call))]
        if len(steps) > len(takes) or (
            tracked and len(takes) > 1
        ):  # several axes at once: no single index_select
            labels.pin(self.source(call), call.node.name, Reason.CHANNEL_MIXING)
        return super().label(call, labels)

    def selection(self, call: Call) -> Take:
        step = self.steps(call)[0]
        assert isinstance(step, Take)
        return step

    def compact(self, call: Call, facts: FactTable) -> Iterable[GraphEdit]:
        return super().compact(call, facts) if len(self.steps(call)) == 1 else []


@op_rule(torch.narrow, "narrow", aten.narrow.default, (aten.slice.Tensor, "input dim start end step"),
         (aten.slice_copy.Tensor, "input dim start end step"))  # fmt: skip
class Narrow(AlongAxis):
    """A slice of one axis."""

    signature: tuple[str, ...] = ("input", "dim", "start", "length")

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
        return [rank - 1 - i for i, n in enumerate(reversed(raw)) if i < rank and labels.is_dynamic(n)]

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


def tensor_of(value: Any) -> Tensor | None:
    """The constant tensor behind a parameter value."""
    tensor = getattr(value, "tensor", None)
    return tensor if isinstance(tensor, Tensor) else None
