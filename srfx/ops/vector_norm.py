"""The length of a vector of channels, and vectors of length one (theory: Lemma R3)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from srfx.ir.call import Call
from srfx.ir.plan import Reason
from srfx.lattice.constancy import Constancy
from srfx.lattice.movement import Fields
from srfx.ops.facts import Demand, FactTable, Labeller, Live
from srfx.ops.known import of_known
from srfx.ops.movement import _axis
from srfx.ops.pointwise import spellings
from srfx.ops.reduction import AlongOne, Reduction, SumOver
from srfx.ops.registry import op_rule
from srfx.ops.rule import OpRule


def _counts_no_zeros(call: Call) -> bool:
    """Whether a zero adds nothing to a norm of the call's order, which is one of vectors: 2 if not given."""
    order = call.get("ord") if "ord" in call.bound else call.get("p")  # torch.linalg and ATen say ord
    if order is None or order == "fro":
        return True
    return isinstance(order, (int, float)) and not isinstance(order, bool) and order > 0


class VectorNorm(SumOver):
    """y = (sum |x|^p)^(1/p) over axes, p > 0: channels that are zero go, all others stay."""

    signature: tuple[str, ...] = ("input", "p", "dim", "keepdim")

    def is_sum(self, call: Call) -> bool:
        """Whether this call is such a norm; others are reductions that keep every channel."""
        return _counts_no_zeros(call) and call.output.is_floating_point()

    def label(self, call: Call, labels: Labeller) -> Fields | tuple[Fields, ...]:
        if self.is_sum(call):
            return super().label(call, labels)
        labels.pin(self.source(call), call.node.name, Reason.CHANNEL_MIXING, self.dims(call))
        return super().label(call, labels)

    def forward(self, call: Call, facts: FactTable) -> Constancy | tuple[Constancy, ...]:
        if not self.is_sum(call):
            return Reduction.forward(self, call, facts)
        c, dims = facts.constancy(self.source(call)), self.dims(call)
        shape = torch.broadcast_shapes(c.value.shape, c.varies.shape)
        zero = c.is_constant(0).cpu().expand(shape).to(torch.uint8).amin(dims, keepdim=True).to(torch.bool)
        zero = zero if zero.dim() == call.output.dim() else zero.squeeze(dims)
        found = Constancy(~zero, torch.zeros_like(zero, dtype=torch.float64))
        return of_known(call, facts, self.source(call), dims, found)

    def backward(self, call: Call, live: Live, facts: FactTable) -> Demand:
        if not self.is_sum(call):
            facts.refuse_constants(call.node, self.source(call), self.dims(call), Reason.CHANNEL_MIXING)
        return super().backward(call, live, facts)

    def wanted(self, call: Call, live: Tensor, facts: FactTable) -> Tensor:
        source = self.source(call)
        c = facts.constancy(source)
        if not any(d in facts.fields(source) for d in self.dims(call)) or not self.is_sum(call):
            return live
        return live & (~c.is_constant(0).cpu() | facts.kept_channels(source))

    def compact(self, call: Call, facts: FactTable) -> list[object]:  # type: ignore[override]
        return []


class Normalize(OpRule):
    """y = x / max(|x|_p, eps) along one axis, p > 0: a channel that is zero stays zero, and may go."""

    signature: tuple[str, ...] = ("input", "p", "dim")
    along = AlongOne()

    def axis(self, call: Call) -> int:
        return _axis(call.get("dim", 1), len(call.out_shape))

    def label(self, call: Call, labels: Labeller) -> Fields | tuple[Fields, ...]:
        source, axis = call.operand("input"), self.axis(call)
        if not _counts_no_zeros(call):
            labels.pin(source, call.node.name, Reason.CHANNEL_MIXING, [axis])
        return labels.even(labels.of(source), axis)

    def forward(self, call: Call, facts: FactTable) -> Constancy:
        source = call.operand("input")
        zero = facts.constancy(source).is_constant(0).cpu()
        found = Constancy(~zero, torch.zeros_like(zero, dtype=torch.float64))
        if not _counts_no_zeros(call):
            found = Constancy.top(len(call.out_shape))
        return of_known(call, facts, source, [self.axis(call)], found)

    def backward(self, call: Call, live: Live, facts: FactTable) -> Demand:
        assert isinstance(live, Tensor)
        source, axis = call.operand("input"), self.axis(call)
        layout = torch.ones(facts.layout(source), dtype=torch.bool)
        rows = live.any(axis, keepdim=True) & layout
        if not _counts_no_zeros(call):
            facts.refuse_constants(call.node, source, [axis], Reason.CHANNEL_MIXING)
            return {source: rows}
        return {source: rows & (~facts.constancy(source).is_constant(0).cpu() | facts.kept_channels(source))}


op_rule(
    torch.linalg.vector_norm, *spellings("linalg_vector_norm"), *spellings("norm"),
    signature=("input", "p", "dim", "keepdim"),
)(VectorNorm)  # fmt: skip
op_rule(F.normalize)(Normalize)
