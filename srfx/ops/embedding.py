"""Embedding: rows picked by an index, columns are channels (theory: Lemma T1)."""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from srfx.ir.call import Call
from srfx.ir.editor import GraphEdit
from srfx.ir.edits import SetArgument
from srfx.ir.plan import Reason
from srfx.ir.program import Param, Value
from srfx.lattice.constancy import Constancy
from srfx.lattice.movement import Fields
from srfx.ops.facts import Demand, FactTable, Labeller, Live, collapse
from srfx.ops.registry import op_rule
from srfx.ops.rule import OpRule

aten = torch.ops.aten


@op_rule(nn.Embedding, (F.embedding, "input weight padding_idx max_norm"), (torch.embedding, "weight input"),
         (aten.embedding.default, "weight input"))  # fmt: skip
class Embedding(OpRule):
    """y[.., c] = W[index, c].  W [V, C]; every row may occur, unless the index is one known number."""

    def weight(self, call: Call) -> Value:
        value = call.value("weight")
        assert value is not None
        return value

    def is_followed(self, call: Call) -> bool:
        return (
            call.value("weight") is not None
            and call.get("max_norm") is None
            and len(call.shape(self.weight(call))) == 2
        )

    def label(self, call: Call, labels: Labeller) -> Fields | tuple[Fields, ...]:
        if not self.is_followed(call):
            return super().label(call, labels)
        weight, axis, site = self.weight(call), len(call.out_shape) - 1, call.node.name
        labels.pin(weight, site, Reason.DATA_DEPENDENT, [0])
        index = call.value("input")
        if index is not None:
            labels.pin(index, site, Reason.DATA_DEPENDENT)
        columns = labels.of(weight)[1]
        return {axis: columns.reshape([columns.numel() if a == axis else 1 for a in range(axis + 1)])}

    def forward(self, call: Call, facts: FactTable) -> Constancy | tuple[Constancy, ...]:
        if not self.is_followed(call):
            return super().forward(call, facts)
        c = facts.constancy(self.weight(call))
        rows = self._rows(call, facts, c.value) if c.is_known else None
        if rows is None:
            return Constancy.top(len(call.out_shape))
        uniform = (rows == rows[:1]).all(0).cpu()
        shape = [1] * (len(call.out_shape) - 1) + [-1]
        return Constancy(~uniform.view(shape), torch.where(uniform, rows[0].double().cpu(), 0.0).view(shape))

    def _rows(self, call: Call, facts: FactTable, weight: Tensor) -> Tensor | None:
        """The rows that can occur."""
        index = call.value("input")
        if index is None or isinstance(index, Param):
            return weight
        c = facts.constancy(index)
        if c.is_known and c.value.numel() == 1:
            return weight[int(c.value)].unsqueeze(0)
        return weight

    def backward(self, call: Call, live: Live, facts: FactTable) -> Demand:
        if not self.is_followed(call):
            return super().backward(call, live, facts)
        assert isinstance(live, Tensor)
        weight, index = self.weight(call), call.value("input")
        demand: Demand = {}
        if not isinstance(weight, Param):
            demand[weight] = collapse(live.flatten(0, -2).any(0).unsqueeze(0), facts.layout(weight))
        if index is not None and not isinstance(index, Param):
            demand[index] = torch.ones((1,) * len(call.shape(index)), dtype=torch.bool)
        return demand

    def compact(self, call: Call, facts: FactTable) -> Iterable[GraphEdit]:
        if not self.is_followed(call) or call.module is None:
            return []
        fields = facts.fields(self.weight(call))
        if not facts.changed(fields, 1, call.shape(self.weight(call))[1]):
            return []
        return [SetArgument(call.node.name, "embedding_dim", facts.count(fields, 1))]
