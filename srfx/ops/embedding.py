"""Embedding: rows picked by an index, alone or in bags; columns are channels (theory: Lemmas T1 and T2)."""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from srfx.ir.call import Call
from srfx.ir.editor import GraphEdit
from srfx.ir.edits import SetArgument
from srfx.ir.plan import Reason
from srfx.ir.program import Param, Value
from srfx.lattice.constancy import Constancy
from srfx.lattice.movement import Fields
from srfx.ops.facts import Demand, FactTable, Labeller, Live, collapse
from srfx.ops.registry import op_rule
from srfx.ops.rule import OpRule, everything, nothing

aten = torch.ops.aten


@op_rule(nn.Embedding, (F.embedding, "input weight padding_idx max_norm"), (torch.embedding, "weight input"),
         (aten.embedding.default, "weight input"))  # fmt: skip
class Embedding(OpRule):
    """y[.., c] = W[index, c].  W [V, C]; every row may occur, unless the index is one known number."""

    def is_even(self, call: Call) -> bool:
        return True

    def weight(self, call: Call) -> Value:
        return call.operand("weight")

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


@op_rule(nn.EmbeddingBag, (F.embedding_bag, "input weight offsets max_norm norm_type scale_grad_by_freq mode"),
         signature=("input", "offsets", "per_sample_weights"))  # fmt: skip
class EmbeddingBag(Embedding):
    """y[bag, c] = sum, mean or max of W[index, c] over the indices of a bag; 0 if there are none (Lemma T2)."""

    def is_followed(self, call: Call) -> bool:
        weight = call.value("weight")
        holds_numbers = isinstance(weight, fx.Node) or (
            isinstance(weight, Param) and weight.tensor.is_floating_point()
        )
        return holds_numbers and super().is_followed(call)

    def label(self, call: Call, labels: Labeller) -> Fields | tuple[Fields, ...]:
        if not self.is_followed(call):
            return OpRule.label(self, call, labels)
        weight = self.weight(call)
        labels.pin(weight, call.node.name, Reason.DATA_DEPENDENT, [0])
        for value in self._others(call):
            labels.pin(value, call.node.name, Reason.DATA_DEPENDENT)
        return {1: labels.of(weight)[1].reshape(1, -1)}

    def forward(self, call: Call, facts: FactTable) -> Constancy | tuple[Constancy, ...]:
        if not self.is_followed(call):
            return OpRule.forward(self, call, facts)
        zero = facts.constancy(self.weight(call)).is_constant(0).cpu().all(0, keepdim=True)
        return Constancy(~zero, torch.zeros_like(zero, dtype=torch.float64))

    def backward(self, call: Call, live: Live, facts: FactTable) -> Demand:
        if not self.is_followed(call):
            return OpRule.backward(self, call, live, facts)
        assert isinstance(live, Tensor)
        weight = self.weight(call)
        demand: Demand = {v: everything(len(call.shape(v))) for v in self._others(call)}
        if not isinstance(weight, Param):
            demand[weight] = collapse(live.any(0, keepdim=True), facts.layout(weight))
        return demand

    def _others(self, call: Call) -> list[Value]:
        """Indices, offsets and weights of the samples, as far as they are computed."""
        return [v for v in call.values() if v is not self.weight(call) and not isinstance(v, Param)]


_ATEN = "weight input offsets scale_grad_by_freq mode sparse per_sample_weights"


@op_rule((aten.embedding_bag.default, _ATEN), (aten.embedding_bag.padding_idx, _ATEN),
         (aten._embedding_bag.default, _ATEN), (aten._embedding_bag_forward_only.default, _ATEN))  # fmt: skip
class ExportedEmbeddingBag(EmbeddingBag):
    """The ATen op returns (y, offset2bag, bag_size, max_indices); a maximum is a barrier, its indices have channels."""

    def is_unrecognised(self, call: Call) -> bool:
        return bool(call.get("mode", 0) == 2)

    def label(self, call: Call, labels: Labeller) -> Fields | tuple[Fields, ...]:
        found = super().label(call, labels)
        return found if isinstance(found, tuple) else (found, {}, {}, {})

    def forward(self, call: Call, facts: FactTable) -> Constancy | tuple[Constancy, ...]:
        found = super().forward(call, facts)
        if isinstance(found, tuple):
            return found
        return (found, *(Constancy.top(leaf.dim()) for leaf in call.leaves[1:]))

    def backward(self, call: Call, live: Live, facts: FactTable) -> Demand:
        if not self.is_followed(call):
            return OpRule.backward(self, call, live, facts)
        assert isinstance(live, tuple)
        return super().backward(call, nothing(2) if live[0] is None else live[0], facts)
