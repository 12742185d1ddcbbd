"""index_add: a narrow summand lands on some channels of a wide one (theory: Lemma G6)."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, fx

from srfx.ir.call import Call
from srfx.ir.editor import GraphEdit, Ref, Stored
from srfx.ir.edits import Recall
from srfx.ir.plan import Reason
from srfx.ir.program import Param, Value
from srfx.lattice.constancy import Constancy
from srfx.lattice.movement import Fields
from srfx.nn.selection import add_at
from srfx.ops.facts import Demand, FactTable, Labeller, Live, collapse
from srfx.ops.movement import _flatten_ties
from srfx.ops.registry import op_rule
from srfx.ops.rule import OpRule, PortSite, Shifted
from srfx.ops.sizes import is_range


@op_rule(torch.index_add, "index_add", torch.ops.aten.index_add.default, add_at)
class IndexAdd(OpRule):
    """z = x, and z[index[i]] = x[index[i]] + y[i]; positions constant and distinct.

    A kept y[i] keeps its z; y[i] is read where it varies or is a constant other than 0.
    """

    signature: tuple[str, ...] = ("input", "dim", "index", "source", "alpha")

    def is_even(self, call: Call) -> bool:
        return True

    def is_unrecognised(self, call: Call) -> bool:
        index = call.value("index")
        is_first = call.node.target is add_at and isinstance(call["index"], int)
        if not (isinstance(index, Param) or is_first) or call.get("alpha", 1) != 1:
            return True
        whole = all(isinstance(call.value(name), (Param, fx.Node)) for name in ("input", "source"))
        return not whole or (
            isinstance(index, Param) and index.tensor.unique().numel() != index.tensor.numel()
        )

    def operands(self, call: Call) -> tuple[Value, Value]:
        """The wide and the narrow summand."""
        return call.operand("input"), call.operand("source")

    def axis(self, call: Call) -> int:
        dim: int = call["dim"]
        return dim % len(call.out_shape)

    def index(self, call: Call) -> Tensor:
        value, first = call.value("index"), call["index"]
        if isinstance(first, int):
            return torch.arange(first, first + call.shape(self.operands(call)[1])[self.axis(call)])
        assert isinstance(value, Param)
        return value.tensor.detach().cpu().long()

    def ports(self, call: Call, facts: FactTable) -> list[PortSite]:
        computed = [
            v for v in self.operands(call) if isinstance(v, fx.Node) and v not in call.program.independent
        ]
        return [PortSite(v, self.axis(call), True) for v in computed if self.axis(call) in facts.fields(v)]

    def shifted(self, call: Call, axis: int, shift: Tensor) -> list[Shifted]:
        x, y = self.operands(call)
        if not isinstance(x, fx.Node) or x is y or axis != self.axis(call):
            return []
        return [Shifted((), x, shift, axis)]

    def label(self, call: Call, labels: Labeller) -> Fields | tuple[Fields, ...]:
        (x, y), axis, site = self.operands(call), self.axis(call), call.node.name
        index = call.value("index")
        if index is not None:
            labels.pin(index, site, Reason.CONSTANT_TABLE)
        wide, narrow = labels.of(x).get(axis), labels.of(y).get(axis)
        if any(f is not None and f.numel() != f.shape[axis] for f in (wide, narrow)):
            return super().label(call, labels)
        rest = [(self._rest(v, axis, labels), self._alone(call.shape(v), axis)) for v in (x, y)]
        fields = labels.unify(rest, len(call.out_shape), site)
        if wide is None:
            labels.pin(y, site, Reason.UNTRACKED_AXIS, [axis])
            return fields
        at = wide.index_select(axis, self.index(call))
        if narrow is None:
            labels.table.pin(at, site, Reason.UNTRACKED_AXIS.name)
        else:
            labels.table.imply(narrow, at)
        return {**fields, axis: wide}

    def _rest(self, value: Value, axis: int, labels: Labeller) -> Fields:
        found: Fields = {}
        for a, f in labels.of(value).items():
            if a != axis:
                _flatten_ties(f, axis, labels)
                found[a] = f.narrow(axis, 0, 1)
        return found

    def _alone(self, shape: tuple[int, ...], axis: int) -> tuple[int, ...]:
        return tuple(1 if a == axis else n for a, n in enumerate(shape))

    def forward(self, call: Call, facts: FactTable) -> Constancy:
        (x, y), axis = self.operands(call), self.axis(call)
        a, b = facts.constancy(x), facts.constancy(y)
        varies = a.varies.cpu() | self._landed(call, b.varies.cpu(), axis)
        return Constancy(varies, a.value.double().cpu() + self._landed(call, b.value.double().cpu(), axis))

    def _landed(self, call: Call, t: Tensor, axis: int) -> Tensor:
        """A layout tensor of the narrow summand as one of the result, 0 where nothing lands."""
        index = self.index(call)
        t = t.expand([index.numel() if a == axis else n for a, n in enumerate(t.shape)])
        wide = [call.out_shape[axis] if a == axis else n for a, n in enumerate(t.shape)]
        return torch.zeros(wide, dtype=t.dtype).index_copy(axis, index, t)

    def backward(self, call: Call, live: Live, facts: FactTable) -> Demand:
        assert isinstance(live, Tensor)
        (x, y), axis = self.operands(call), self.axis(call)
        wide = live.expand([call.out_shape[axis] if a == axis else n for a, n in enumerate(live.shape)])
        c = facts.constancy(y)
        matters = c.varies.cpu() | (c.value.cpu() != 0) | facts.kept_channels(y)
        landing = wide.index_select(axis, self.index(call)) & matters
        demand: Demand = {x: collapse(live & torch.ones(facts.layout(x), dtype=torch.bool), facts.layout(x))}
        wanted = collapse(landing & torch.ones(facts.layout(y), dtype=torch.bool), facts.layout(y))
        demand[y] = demand[y] | wanted if y in demand else wanted
        return demand

    def compact(self, call: Call, facts: FactTable) -> Iterable[GraphEdit]:
        (x, y), axis = self.operands(call), self.axis(call)
        if axis not in facts.fields(x):
            return []
        held = facts.index(facts.fields(x), axis)
        place = torch.full((call.out_shape[axis],), -1).index_copy(0, held, torch.arange(held.numel()))
        index = self.index(call)
        brought = (
            facts.index(facts.fields(y), axis) if axis in facts.fields(y) else torch.arange(index.numel())
        )
        new = place[index[brought]]
        if torch.equal(new, index):
            return []
        dim = axis - len(call.out_shape)
        where: int | Stored = int(new[0])
        if not is_range(new):
            place_of = new.to(torch.int32).to(call.output.device)
            where = Stored(f"{call.node.name}_index", place_of)
        args = (Ref(call["input"].name), dim, where, Ref(call["source"].name))
        return [Recall(call.node.name, add_at, args, {})]
