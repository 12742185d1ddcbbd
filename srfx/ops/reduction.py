"""Reductions and softmax.  Over axes without channels they act on each channel; mean and sum absorb constants (R1, R2)."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from srfx.ir.call import Call
from srfx.ir.editor import GraphEdit
from srfx.ir.edits import AffineAfter
from srfx.ir.plan import Reason
from srfx.ir.program import Param, Value
from srfx.lattice.constancy import Constancy
from srfx.lattice.movement import Fields
from srfx.ops.elementwise import Elementwise
from srfx.ops.facts import Demand, FactTable, Labeller, Live
from srfx.ops.known import of_known
from srfx.ops.movement import _axis
from srfx.ops.pointwise import spellings
from srfx.ops.registry import op_rule
from srfx.ops.rule import OpRule

aten = torch.ops.aten


class Reduction(OpRule):
    """y = reduce(x, dims): other axes keep their channels, reduced axes with channels keep them all."""

    signature: tuple[str, ...] = ("input", "dim", "keepdim")
    absorbs = False
    keeps_constants = False  # reduce(k, .., k) = k

    def is_even(self, call: Call) -> bool:
        return True

    def source(self, call: Call) -> Value:
        return call.operand("input")

    def dims(self, call: Call) -> list[int]:
        rank, dim = len(call.shape(self.source(call))), call.get("dim")
        if dim is None or dim == [] or dim == () or isinstance(dim, (bool, torch.dtype)):
            return list(range(rank))
        return sorted(_axis(d, rank) for d in ([dim] if isinstance(dim, int) else dim)) if rank else []

    def is_tensor(self, call: Call) -> bool:
        return isinstance(call.output, Tensor)

    def label(self, call: Call, labels: Labeller) -> Fields | tuple[Fields, ...]:
        source, dims = self.source(call), self.dims(call)
        fields = dict(labels.of(source))
        for axis in dims:
            if axis in fields and not self.absorbs:
                labels.table.pin(fields[axis], call.node.name, Reason.CHANNEL_MIXING.name)
        for axis in [a for a in fields if a not in dims]:
            for d in dims:
                if fields[axis].shape[d] > 1:  # labels that differ along a reduced axis have to agree
                    labels.table.tie(fields[axis], fields[axis].narrow(d, 0, 1))
                    fields[axis] = fields[axis].narrow(d, 0, 1)
        kept = {a: f for a, f in fields.items() if a not in dims}
        outputs = call.output if isinstance(call.output, (tuple, list)) else (call.output,)
        found = tuple(self._shaped(call, kept, dims, o) for o in outputs)
        return found if isinstance(call.output, (tuple, list)) else found[0]

    def _shaped(self, call: Call, fields: Fields, dims: list[int], output: Tensor) -> Fields:
        rank = len(call.shape(self.source(call)))
        if output.dim() == rank:
            return fields
        left = [a for a in range(rank) if a not in dims]
        return {left.index(a): f.squeeze(dims) for a, f in fields.items()}

    def forward(self, call: Call, facts: FactTable) -> Constancy | tuple[Constancy, ...]:
        source, dims = self.source(call), self.dims(call)
        c, shape = facts.constancy(source), call.shape(source)
        value = c.value.double().expand(torch.broadcast_shapes(c.value.shape, c.varies.shape))
        varies = c.varies.expand(value.shape)
        uniform = c.settle(set(range(len(shape))) - set(dims))
        if self.keeps_constants:
            varies, value = uniform.varies, uniform.value
        elif self.absorbs:
            value = self._total(call, value, shape, dims)
            varies = varies.any(dims, keepdim=True)
        else:
            varies, value = torch.ones_like(uniform.varies), torch.zeros_like(uniform.value)
        rank = (call.output if self.is_tensor(call) else call.output[0]).dim()
        first = Constancy(_fit(varies, rank, dims), _fit(value, rank, dims))
        if not self.absorbs:
            first = of_known(call, facts, source, dims, first)
        if self.is_tensor(call):
            return first
        return (first, *(Constancy.top(o.dim()) for o in call.output[1:]))  # positions: not followed

    def _total(self, call: Call, value: Tensor, shape: tuple[int, ...], dims: list[int]) -> Tensor:
        return value

    def backward(self, call: Call, live: Live, facts: FactTable) -> Demand:
        if not isinstance(live, Tensor):
            live = functools.reduce(torch.logical_or, [part for part in live if part is not None])
        source, dims = self.source(call), self.dims(call)
        if not self.absorbs:
            facts.refuse_constants(call.node, source, dims, Reason.CHANNEL_MIXING)
        rank = len(call.shape(source))
        if live.dim() != rank:
            for d in dims:
                live = live.unsqueeze(d)
        return {source: self.wanted(call, live, facts) & torch.ones(facts.layout(source), dtype=torch.bool)}

    def wanted(self, call: Call, live: Tensor, facts: FactTable) -> Tensor:
        return live


def _fit(t: Tensor, rank: int, dims: list[int]) -> Tensor:
    return t.squeeze(dims) if t.dim() != rank else t


class SumOver(Reduction):
    """sum: y = sum over kept + sum over removed constants.  The latter is added back (theory: Lemma R1)."""

    absorbs = True
    divides = False

    def label(self, call: Call, labels: Labeller) -> Fields | tuple[Fields, ...]:
        source = self.source(call)
        fields = labels.of(source)
        tracked = [d for d in self.dims(call) if d in fields]
        if len(tracked) > 1:
            labels.pin(source, call.node.name, Reason.CHANNEL_MIXING, tracked)
        return super().label(call, labels)

    def averaged(self, call: Call, axis: int) -> int | None:
        """Axis of the result with the channels of ``axis``, if each is summed by itself."""
        dims, rank = self.dims(call), len(call.shape(self.source(call)))
        if axis in dims or not self.is_tensor(call) or not call.output.is_floating_point():
            return None
        return axis if call.output.dim() == rank else axis - sum(d < axis for d in dims)

    def forward(self, call: Call, facts: FactTable) -> Constancy | tuple[Constancy, ...]:
        found, affine = super().forward(call, facts), facts.constancy(self.source(call)).affine
        there = None if affine is None else self.averaged(call, affine.axis)
        if affine is None or there is None or not isinstance(found, Constancy):
            return found
        bordered = affine.bordered or not self.divides  # so many ones are summed, each time
        return replace(found, affine=replace(affine, axis=there, bordered=bordered))

    def _total(self, call: Call, value: Tensor, shape: tuple[int, ...], dims: list[int]) -> Tensor:
        """Sum (or mean) of constants over the reduced axes; untracked axes count with their hint only for means."""
        known = value.sum(dims, keepdim=True)
        folded = math.prod(shape[d] for d in dims if value.shape[d] == 1)
        total = math.prod(shape[d] for d in dims)
        if self.divides:
            return known * folded / total
        return torch.where(known == 0, known, torch.full_like(known, math.nan)) if folded != 1 else known

    def wanted(self, call: Call, live: Tensor, facts: FactTable) -> Tensor:
        """Varying channels, and constants that stay: whatever stays is summed."""
        c, source = facts.constancy(self.source(call)), self.source(call)
        tracked = [d for d in self.dims(call) if d in facts.fields(source)]
        if not tracked:
            return live
        absorbed = ~c.varies if self._has_one_share(call, facts) else c.is_constant(0)
        return live & (~absorbed.cpu() | facts.kept_channels(source))

    def _has_one_share(self, call: Call, facts: FactTable) -> bool:
        """Whether the share of a nonzero constant is one number.

        It is not in a sum over an axis of unknown size, nor where further axes carry channels (heads): each of
        these loses constants of its own.
        """
        source, dims = self.source(call), self.dims(call)
        fields = facts.fields(source)
        untracked = [d for d in dims if d not in fields and call.shape(source)[d] != 1]
        return (
            (self.divides or not untracked)
            and all(f.numel() == f.shape[a] for a, f in fields.items())
            and len(fields) == 1
        )

    def compact(self, call: Call, facts: FactTable) -> Iterable[GraphEdit]:
        source, dims = self.source(call), self.dims(call)
        fields, shape = facts.fields(source), call.shape(source)
        axes = [d for d in dims if facts.changed(fields, d, shape[d])]
        if not axes:
            return []
        axis = axes[0]
        shift = self._share(facts, source, axis) / (shape[axis] if self.divides else 1)
        scale = facts.count(fields, axis) / shape[axis] if self.divides else 1.0
        stored = torch.tensor(shift, dtype=call.output.dtype) if shift else None
        return [AffineAfter(call.node.name, scale, f"{call.node.name}_shift" if shift else None, stored)]

    def _share(self, facts: FactTable, source: Value, axis: int) -> float:
        """The sum of the constants that go; where further axes carry channels only zeros do."""
        fields, c = facts.fields(source), facts.constancy(source)
        if len(fields) > 1:
            return 0.0
        gone = ~facts.is_kept(fields[axis]) & ~c.varies
        wide = c.value.double().expand(torch.broadcast_shapes(c.value.shape, gone.shape))
        return float(torch.where(gone, wide, 0.0).sum())


class MeanOver(SumOver):
    """mean: the divisor stays the original width."""

    divides = True


class Extremum(Reduction):
    """amax, amin, median and kin: a constant channel yields its constant."""

    keeps_constants = True


class MaxMin(Extremum):
    """max and min: of one tensor a reduction, of two an elementwise op (torch gives both one name)."""

    pairwise = Elementwise()

    def is_pair(self, call: Call) -> bool:
        return len([v for v in call.values() if isinstance(v, Param) or call.program.is_tensor(v)]) > 1

    def label(self, call: Call, labels: Labeller) -> Fields | tuple[Fields, ...]:
        return self.pairwise.label(call, labels) if self.is_pair(call) else super().label(call, labels)

    def forward(self, call: Call, facts: FactTable) -> Constancy | tuple[Constancy, ...]:
        return self.pairwise.forward(call, facts) if self.is_pair(call) else super().forward(call, facts)

    def backward(self, call: Call, live: Live, facts: FactTable) -> Demand:
        return (
            self.pairwise.backward(call, live, facts)
            if self.is_pair(call)
            else super().backward(call, live, facts)
        )

    def reads(self, call: Call, facts: FactTable) -> list[Value]:
        return self.pairwise.reads(call, facts) if self.is_pair(call) else super().reads(call, facts)

    def compact(self, call: Call, facts: FactTable) -> Iterable[GraphEdit]:
        return self.pairwise.compact(call, facts) if self.is_pair(call) else super().compact(call, facts)


class AlongOne(OpRule):
    """softmax, cumsum, sort and kin: each position of one axis depends on the whole axis, which stays."""

    signature: tuple[str, ...] = ("input", "dim")
    default_dim: int | None = None

    def label(self, call: Call, labels: Labeller) -> Fields | tuple[Fields, ...]:
        source = call.operand("input")
        axis = self.axis(call)
        labels.pin(source, call.node.name, Reason.CHANNEL_MIXING, [axis])
        fields = labels.even(labels.of(source), axis)
        return tuple(fields for _ in call.output) if isinstance(call.output, (tuple, list)) else fields

    def axis(self, call: Call) -> int:
        dim = call.get("dim")
        source = call.operand("input")
        rank = len(call.shape(source))
        if not isinstance(dim, int):
            dim = self.default_dim
        if dim is None:  # torch's own legacy choice for softmax
            dim = 0 if rank in (0, 1, 3) else 1
        return _axis(dim, rank)

    def forward(self, call: Call, facts: FactTable) -> Constancy | tuple[Constancy, ...]:
        source = call.operand("input")
        first = of_known(call, facts, source, [self.axis(call)], Constancy.top(len(call.shape(source))))
        if isinstance(call.output, (tuple, list)):  # positions: not followed
            return (first, *(Constancy.top(o.dim()) for o in call.output[1:]))
        return first

    def backward(self, call: Call, live: Live, facts: FactTable) -> Demand:
        source = call.operand("input")
        if isinstance(live, tuple):
            live = functools.reduce(torch.logical_or, [part for part in live if part is not None])
        facts.refuse_constants(call.node, source, [self.axis(call)], Reason.CHANNEL_MIXING)
        whole = live.any(self.axis(call), keepdim=True)
        return {source: whole & torch.ones(facts.layout(source), dtype=torch.bool)}


class Softmax(AlongOne):
    """softmax: the result sums to one along its axis."""

    def forward(self, call: Call, facts: FactTable) -> Constancy | tuple[Constancy, ...]:
        found = super().forward(call, facts)
        assert isinstance(found, Constancy)
        return replace(found, sums_to_one=self.axis(call))


@op_rule(F.glu, nn.GLU, aten.glu.default)
class GLU(OpRule):
    """y = a * sigmoid(b), the halves of one axis; their channels are tied and stay in equal numbers."""

    signature: tuple[str, ...] = ("input", "dim")

    def _halves(self, call: Call, t: Tensor) -> tuple[Tensor, Tensor]:
        source = call.operand("input")
        axis = _axis(call.get("dim", -1), len(call.out_shape))
        half = call.shape(source)[axis] // 2
        return (t, t) if t.shape[axis] == 1 else (t.narrow(axis, 0, half), t.narrow(axis, half, half))

    def label(self, call: Call, labels: Labeller) -> Fields:
        source = call.operand("input")
        found: Fields = {}
        for axis, f in labels.of(source).items():
            a, b = self._halves(call, f)
            labels.table.tie(a, b)
            found[axis] = a
        return found

    def forward(self, call: Call, facts: FactTable) -> Constancy:
        source = call.operand("input")
        c = facts.constancy(source)
        (va, vb), (a, b) = self._halves(call, c.varies), self._halves(call, c.value.double())
        zero = ~va & (a == 0)
        return Constancy((va | vb) & ~zero, a * torch.sigmoid(b))

    def backward(self, call: Call, live: Live, facts: FactTable) -> Demand:
        assert isinstance(live, Tensor)
        source = call.operand("input")
        axis = _axis(call.get("dim", -1), len(call.out_shape))
        layout = facts.layout(source)
        wanted = torch.cat([live, live], axis) if live.shape[axis] > 1 or layout[axis] == 2 else live
        return {source: wanted & torch.ones(layout, dtype=torch.bool)}


def _register() -> None:
    op_rule(*spellings("sum"))(SumOver)
    op_rule(*spellings("mean"))(MeanOver)
    for name in ("amax", "amin", "median", "nanmedian", "mode"):
        op_rule(*spellings(name))(Extremum)
    for name in ("prod", "var", "std", "var_mean", "std_mean", "logsumexp", "argmax", "argmin", "all", "any",
                 "count_nonzero", "nansum"):  # fmt: skip
        op_rule(*spellings(name))(Reduction)
    op_rule(
        torch.max, torch.min, "max", "min", aten.max.default, aten.max.dim, aten.min.default, aten.min.dim
    )(MaxMin)
    for name in ("softmax", "_softmax"):
        op_rule(*spellings(name))(Softmax)
    for name in ("log_softmax", "softmin", "_log_softmax"):
        op_rule(*spellings(name))(AlongOne)
    op_rule(nn.Softmax)(Softmax)
    op_rule(nn.LogSoftmax, nn.Softmin)(AlongOne)
    for name in ("cumsum", "cumprod", "sort", "argsort", "cummax", "cummin", "logcumsumexp"):
        op_rule(*spellings(name), default_dim=-1)(AlongOne)
    local = (F.local_response_norm, "input size alpha beta k")  # a window of channels; spatial axes are apart
    op_rule(nn.LocalResponseNorm, local, default_dim=1)(AlongOne)


_register()
