"""Distances and angles between vectors of channels (theory: Lemma R4)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from srfx.ir.call import Call
from srfx.ir.plan import Reason
from srfx.ir.program import Value
from srfx.lattice.constancy import Constancy
from srfx.lattice.movement import Fields
from srfx.ops.facts import Demand, FactTable, Labeller, Live, collapse
from srfx.ops.movement import _axis
from srfx.ops.registry import op_rule
from srfx.ops.rule import OpRule

aten = torch.ops.aten


class BetweenVectors(OpRule):
    """y = f(a, b), where f reads the channels of two operands along one axis, of which some add nothing."""

    signature: tuple[str, ...] = ("x1", "x2", "dim")

    def operands(self, call: Call) -> tuple[Value, Value]:
        return call.operand("x1"), call.operand("x2")

    def ranks(self, call: Call) -> int:
        """The common rank of the operands."""
        return max(len(call.shape(value)) for value in self.operands(call))

    def axis(self, call: Call) -> int:
        """The axis that is read, counted in the common rank."""
        raise NotImplementedError

    def idle(self, a: Constancy, b: Constancy) -> Tensor:
        """Where a pair of channels adds nothing."""
        raise NotImplementedError

    def _lifted(self, call: Call, value: Value, t: Tensor) -> Tensor:
        shape = call.shape(value)
        return t.reshape((1,) * (self.ranks(call) - len(shape)) + tuple(t.shape))

    def label(self, call: Call, labels: Labeller) -> Fields | tuple[Fields, ...]:
        axis, rank = self.axis(call), self.ranks(call)
        widths = [call.shape(value)[axis - rank] for value in self.operands(call)]
        if widths[0] != widths[1]:
            return super().label(call, labels)
        lanes = []
        for value in self.operands(call):
            shift = rank - len(call.shape(value))
            fields = labels.of(value)
            labels.pin(value, call.node.name, Reason.CHANNEL_MIXING, [a for a in fields if a + shift != axis])
            found = fields.get(axis - shift)
            shape = tuple(widths[0] if a == axis else 1 for a in range(rank))
            if found is not None:
                flat = found.narrow(0, 0, 1)
                for d in range(found.dim()):
                    if d + shift != axis:
                        flat = flat.narrow(d, 0, 1)
                labels.table.tie(found, flat)
                found = flat.reshape(shape)
            lanes.append(({} if found is None else {axis: found}, shape))
        labels.unify(lanes, rank, call.node.name)
        return {}

    def backward(self, call: Call, live: Live, facts: FactTable) -> Demand:
        assert isinstance(live, Tensor)
        if not bool(live.any()):
            return {}
        a, b = self.operands(call)
        facts_of = [
            facts.constancy(v).settle({self.axis(call) - self.ranks(call) + len(call.shape(v))})
            for v in (a, b)
        ]
        lifted = [
            Constancy(self._lifted(call, v, c.varies.cpu()), self._lifted(call, v, c.value.double().cpu()))
            for v, c in zip((a, b), facts_of, strict=True)
        ]
        wanted = ~self.idle(*lifted)
        demand: Demand = {}
        for value in (a, b):
            rank = len(call.shape(value))
            layout = facts.layout(value)
            mine = wanted.reshape(wanted.shape[self.ranks(call) - rank :]) | facts.kept_channels(value)
            found = collapse(mine & torch.ones(layout, dtype=torch.bool), layout)
            demand[value] = demand[value] | found if value in demand else found
        return demand


@op_rule(F.cosine_similarity, nn.CosineSimilarity, aten.cosine_similarity.default)
class CosineSimilarity(BetweenVectors):
    """y = sum_c a[c] b[c] / (max(|a|, eps) max(|b|, eps)): a channel that is zero in both adds nothing."""

    def axis(self, call: Call) -> int:
        return _axis(call.get("dim", 1), self.ranks(call))

    def idle(self, a: Constancy, b: Constancy) -> Tensor:
        return a.is_constant(0) & b.is_constant(0)


@op_rule((torch.cdist, "x1 x2 p"), (aten.cdist.default, "x1 x2 p"), (aten._cdist_forward.default, "x1 x2 p"))
class Cdist(BetweenVectors):
    """y[i, j] = |a[i] - b[j]|_p over the last axis: a channel that is one constant in both adds nothing."""

    def axis(self, call: Call) -> int:
        return self.ranks(call) - 1

    def idle(self, a: Constancy, b: Constancy) -> Tensor:
        return ~a.varies & ~b.varies & (a.value == b.value)
