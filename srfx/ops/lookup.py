"""Lookup by computed positions: gather, and indexing by tensors of positions (theory: Lemma T1).

The axis that is looked up keeps all its positions, since any of them may be asked for; channels of the other axes
pass, and a channel that is one constant at every position is that constant wherever it is read.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, fx

from srfx.ir.call import Call
from srfx.ir.editor import GraphEdit, Ref
from srfx.ir.edits import Recall
from srfx.ir.plan import Reason
from srfx.ir.program import Value
from srfx.lattice.constancy import Constancy
from srfx.lattice.movement import Fields
from srfx.ops.facts import Demand, FactTable, Labeller, Live, collapse
from srfx.ops.movement import _axis
from srfx.ops.registry import op_rule, resolve
from srfx.ops.rule import OpRule
from srfx.ops.tile import Repeat
from srfx.ops.views import Expand

aten = torch.ops.aten
_POSITIONS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


@op_rule(torch.gather, "gather", aten.gather.default, (torch.take_along_dim, "input index dim"),
         ("take_along_dim", "input index dim"), (aten.take_along_dim.default, "input index dim"))  # fmt: skip
class Gather(OpRule):
    """y[.., i, ..] = x[.., index[.., i, ..], ..] along one axis; positions elsewhere are those of the index."""

    signature: tuple[str, ...] = ("input", "dim", "index")

    def _operands(self, call: Call) -> tuple[Value, Value] | None:
        """Source and index, None when the call is not followed."""
        source = call.value("input")
        index = call.value("index") if call.value("index") is not None else call.value("indices")
        if source is None or index is None or not isinstance(call.get("dim"), int):
            return None
        axis, x, y = self._along(call), call.shape(source), call.out_shape
        whole = all(n == m for a, (n, m) in enumerate(zip(x, y, strict=True)) if a != axis)
        positions = zip(call.shape(index), y, strict=False)
        fits = len(call.shape(index)) == len(y) and all(
            n in (1, m) for n, m in positions
        )  # take_along_dim broadcasts
        return (source, index) if whole and fits else None

    def _along(self, call: Call) -> int:
        return _axis(call.get("dim"), len(call.out_shape))

    def label(self, call: Call, labels: Labeller) -> Fields | tuple[Fields, ...]:
        found = self._operands(call) if call.out_shape else None
        if found is None:
            labels.refuse(call.node, Reason.UNRECOGNISED_CALL)
            return super().label(call, labels)
        (source, index), axis = found, self._along(call)
        labels.pin(source, call.node.name, Reason.DATA_DEPENDENT, [axis])
        fields = _without(labels.of(source), axis, labels)
        shape = tuple(1 if a == axis else n for a, n in enumerate(call.out_shape))
        repeated, mine = self._repeated(call, labels.of(index)), labels.of(index)
        wide = tuple(1 if a in repeated else n for a, n in enumerate(call.shape(index)))
        return labels.unify([(fields, shape), (mine, wide)], len(shape), call.node.name)

    def _repeated(self, call: Call, fields: Fields) -> list[int]:
        """Axes along which the index is one position, expanded or repeated."""
        before = self._before_expand(call)
        if before is None:
            return []
        sizes = zip(call.program.shape(before), call.out_shape, strict=True)
        along = self._along(call)
        return [a for a, (m, n) in enumerate(sizes) if m == 1 < n and a not in fields and a != along]

    def _before_expand(self, call: Call) -> fx.Node | None:
        """What an expanded or repeated index was: as many axes, those that grew of size 1."""
        index = call.value("index") if call.value("index") is not None else call.value("indices")
        if not isinstance(index, fx.Node) or not index.op.startswith("call"):
            return None
        rule, inner = resolve(index, call.program)
        source = inner.value("input") if isinstance(rule, Expand | Repeat) else None
        if not isinstance(source, fx.Node) or len(call.program.shape(source)) != len(call.out_shape):
            return None
        sizes = zip(call.program.shape(source), call.out_shape, strict=True)
        return source if all(m in (1, n) for m, n in sizes) else None

    def compact(self, call: Call, facts: FactTable) -> Iterable[GraphEdit]:
        """An index that is repeated along an axis that shrinks broadcasts instead."""
        found = self._operands(call) if call.out_shape else None
        if found is None or not isinstance(found[0], fx.Node):
            return []
        source, before = found[0], self._before_expand(call)
        fields, shape = facts.fields(source), call.shape(source)
        repeated = self._repeated(call, facts.fields(found[1]))
        if before is None or not any(facts.changed(fields, a, shape[a]) for a in repeated):
            return []
        args = (Ref(source.name), Ref(before.name), self._along(call))
        return [Recall(call.node.name, torch.take_along_dim, args, {})]

    def forward(self, call: Call, facts: FactTable) -> Constancy | tuple[Constancy, ...]:
        found = self._operands(call) if call.out_shape else None
        if found is None:
            return super().forward(call, facts)
        c = facts.constancy(found[0]).settle(set(range(len(call.out_shape))) - {self._along(call)})
        return Constancy(c.varies, c.value)

    def backward(self, call: Call, live: Live, facts: FactTable) -> Demand:
        found = self._operands(call) if call.out_shape else None
        if found is None or not isinstance(live, Tensor):
            return super().backward(call, live, facts)
        (source, index), axis = found, self._along(call)
        if call.output.is_floating_point():
            facts.refuse_constants(call.node, source, [axis], Reason.DATA_DEPENDENT)
        demand: Demand = {index: collapse(live, facts.layout(index))}
        wanted = live.any(axis, keepdim=True) & torch.ones(facts.layout(source), dtype=torch.bool)
        wanted = collapse(wanted, facts.layout(source))
        demand[source] = demand[source] | wanted if source in demand else wanted
        return demand


def _without(fields: Fields, axis: int, labels: Labeller) -> Fields:
    """The other axes' fields; labels that differ along the axis have to agree."""
    return {a: f for a, f in labels.even(fields, axis).items() if a != axis}


class Lookup(OpRule):
    """y = x[:, i, j, :] with tensors of positions of any rank, whose joint shape takes the place of their axes.

    Not registered: indexing (`srfx.ops.indexing`) hands the calls over that are no fixed selection.
    """

    def site(self, call: Call) -> tuple[int, list[Value]] | None:
        """The first of the axes, which follow one another, and the tensors of positions; None for any other index."""
        raw = call.bound.get("indices", call.bound.get("index"))
        entries = list(raw) if isinstance(raw, (list, tuple)) else [raw]
        axes = [axis for axis, e in enumerate(entries) if isinstance(e, (fx.Node, Tensor))]
        if not axes or axes != list(range(axes[0], axes[0] + len(axes))):
            return None
        others = [e for axis, e in enumerate(entries) if axis not in axes]
        if any(e is not None and e != slice(None) for e in others):
            return None
        if any(e is None for e in others) and "indices" not in call.bound:
            return None  # None makes a new axis in Python's indexing, and takes a whole one in ATen's
        found = [call.as_value(entries[axis]) for axis in axes]
        indices = [index for index in found if index is not None and self._holds_positions(call, index)]
        return (axes[0], indices) if len(indices) == len(axes) else None

    def _holds_positions(self, call: Call, index: Value) -> bool:
        hint = call.program.hints[index] if isinstance(index, fx.Node) else index.tensor
        return hint.dtype in _POSITIONS and hint.dtype != torch.uint8

    def _source(self, call: Call) -> Value:
        return call.operand("input")

    def _site(self, call: Call) -> tuple[list[int], list[Value], int]:
        """The axes, the tensors of positions, and how many axes take their place."""
        found = self.site(call)
        assert found is not None
        axis, indices = found
        return (
            list(range(axis, axis + len(indices))),
            indices,
            max(len(call.shape(index)) for index in indices),
        )

    def _spread(self, call: Call, t: Tensor) -> Tensor:
        """A layout tensor of the source, of size 1 along the axes, as one of the result."""
        axes, _, rank = self._site(call)
        return t.reshape(*t.shape[: axes[0]], *(1,) * rank, *t.shape[axes[-1] + 1 :])

    def label(self, call: Call, labels: Labeller) -> Fields | tuple[Fields, ...]:
        axes, indices, rank = self._site(call)
        source, more = self._source(call), rank - len(axes)
        labels.pin(source, call.node.name, Reason.DATA_DEPENDENT, axes)
        for index in indices:
            labels.pin(index, call.node.name, Reason.DATA_DEPENDENT)
        fields = dict(labels.of(source))
        for axis in axes:
            fields = _without(fields, axis, labels)
        return {a if a < axes[0] else a + more: self._spread(call, f) for a, f in fields.items()}

    def forward(self, call: Call, facts: FactTable) -> Constancy | tuple[Constancy, ...]:
        axes, _, _ = self._site(call)
        c = facts.constancy(self._source(call))
        c = c.settle(set(range(c.value.dim())) - set(axes))
        return Constancy(self._spread(call, c.varies), self._spread(call, c.value))

    def backward(self, call: Call, live: Live, facts: FactTable) -> Demand:
        assert isinstance(live, Tensor)
        axes, indices, rank = self._site(call)
        source, first = self._source(call), axes[0]
        facts.refuse_constants(call.node, source, axes, Reason.DATA_DEPENDENT)
        wanted = live.any(tuple(range(first, first + rank)), keepdim=True) if rank else live
        wanted = wanted.reshape(*wanted.shape[:first], *(1 for _ in axes), *wanted.shape[first + rank :])
        layout = facts.layout(source)
        demand: Demand = {source: collapse(wanted & torch.ones(layout, dtype=torch.bool), layout)}
        for index in indices:
            demand[index] = torch.ones((1,) * len(call.shape(index)), dtype=torch.bool)
        return demand
