"""Elementwise rules with a weight or with random numbers: PReLU, dropout (theory: Lemmas E1 and E5)."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from srfx.ir.call import Call
from srfx.ir.editor import GraphEdit
from srfx.ir.edits import SetArgument
from srfx.ir.program import Value
from srfx.lattice.constancy import Constancy
from srfx.lattice.movement import Fields
from srfx.ops.elementwise import Elementwise
from srfx.ops.facts import Demand, FactTable, Labeller, Live, collapse
from srfx.ops.rule import Effect


class PReLU(Elementwise):
    """y[.., c, :] = max(x, 0) + w[c] min(x, 0); w [C] lies along axis 1, w [1] is shared (theory: Lemma E1)."""

    signature: tuple[str, ...] = ("input", "weight")

    def label(self, call: Call, labels: Labeller) -> Fields:
        x, w = self._operands(call)
        rank, shape = len(call.out_shape), self._lifted(call)
        own = labels.of(w)  # a shared slope gets its label too
        weight = {1: own[0].view(shape)} if max(shape) > 1 else {}
        return labels.unify([(labels.of(x), call.shape(x)), (weight, shape)], rank, call.node.name)

    def _operands(self, call: Call) -> tuple[Value, Value]:
        return call.operand("input"), call.operand("weight")

    def _lifted(self, call: Call) -> tuple[int, ...]:
        """The shape of the weight beside the operand."""
        n = call.shape(self._operands(call)[1])[0] if call.shape(self._operands(call)[1]) else 1
        return tuple(n if a == 1 and n > 1 else 1 for a in range(len(call.out_shape)))

    def forward(self, call: Call, facts: FactTable) -> Constancy:
        x, w = (facts.constancy(v) for v in self._operands(call))
        shape, k = self._lifted(call), x.value.double()
        slope = w.value.double().cpu().expand(call.shape(self._operands(call)[1])).reshape(shape)
        return Constancy(x.varies | bool(w.varies.any()), torch.where(k > 0, k, slope * k))

    def backward(self, call: Call, live: Live, facts: FactTable) -> Demand:
        assert isinstance(live, Tensor)
        x, w = self._operands(call)
        wanted = live.movedim(1, -1) if max(self._lifted(call)) > 1 else live
        return {x: live, w: collapse(wanted, facts.layout(w))}

    def reads(self, call: Call, facts: FactTable) -> list[Value]:
        return self.operands(call)

    def compact(self, call: Call, facts: FactTable) -> Iterable[GraphEdit]:
        w = self._operands(call)[1]
        if call.module is None or not facts.changed(facts.fields(w), 0, call.shape(w)[0]):
            return []
        return [SetArgument(call.node.name, "num_parameters", facts.count(facts.fields(w), 0))]


class Random(Elementwise):
    """Elementwise with random numbers: only a zero that stays zero is constant."""

    effect = Effect.RANDOM

    def forward(self, call: Call, facts: FactTable) -> Constancy:
        found = facts.constancy(self.operands(call)[0])
        if not self.is_active(call):
            return found
        return Constancy(found.varies | (found.value != 0), torch.zeros_like(found.value))

    def is_active(self, call: Call) -> bool:
        if call.module is not None:
            return call.module.training and float(call.get("p", 0)) > 0
        return bool(call.get("training", call.get("train", True))) and float(call.get("p", 0.5)) > 0


class RandomShift(Random):
    """Alpha dropout: what is dropped becomes another number than 0, so nothing stays (theory: Lemma E5)."""

    def forward(self, call: Call, facts: FactTable) -> Constancy:
        return Constancy.top(len(call.out_shape)) if self.is_active(call) else super().forward(call, facts)


class RandomSlope(Random):
    """rrelu: in training the slope of negative values is drawn, else it is the mean of its bounds."""

    signature: tuple[str, ...] = ("input", "lower", "upper", "training")

    def forward(self, call: Call, facts: FactTable) -> Constancy:
        if not self.is_active(call):
            return Elementwise.forward(self, call, facts)
        found = facts.constancy(self.operands(call)[0])
        return Constancy(found.varies | (found.value < 0), found.value)

    def is_active(self, call: Call) -> bool:
        return call.module.training if call.module is not None else bool(call.get("training", False))
