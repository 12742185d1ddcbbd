"""Mixtures of experts as far as a graph shows them: the product with one matrix of several (theory: Lemma A6)."""

from __future__ import annotations

import torch
from torch import Tensor

from srfx.ir.call import Call
from srfx.ir.plan import Reason
from srfx.ir.program import Value
from srfx.lattice.constancy import Constancy
from srfx.lattice.movement import Fields
from srfx.ops.attention import _may_be_nonzero, _narrowed
from srfx.ops.facts import Demand, FactTable, Labeller, Live, collapse
from srfx.ops.pointwise import spellings
from srfx.ops.reduction import AlongOne
from srfx.ops.registry import op_rule
from srfx.ops.rule import OpRule

aten = torch.ops.aten


@op_rule(aten._grouped_mm.default, "transformers::grouped_mm_fallback")
class GroupedProduct(OpRule):
    """y[s, n] = sum_c x[s, c] W[e(s), c, n].  x [S, C_in], W [E, C_in, C_out], e from offsets -> y [S, C_out].

    A channel goes when it can for every expert; experts stay.
    """

    signature: tuple[str, ...] = ("input", "weight", "offs", "bias")

    def is_unrecognised(self, call: Call) -> bool:
        shapes = [call.shape(v) for v in (call.value("input"), call.value("weight")) if v is not None]
        return [len(s) for s in shapes] != [2, 3] or call.get("bias") is not None

    def operands(self, call: Call) -> tuple[Value, Value]:
        """X and W."""
        return call.operand("input"), call.operand("weight")

    def label(self, call: Call, labels: Labeller) -> Fields | tuple[Fields, ...]:
        (x, w), site = self.operands(call), call.node.name
        labels.pin(x, site, Reason.CHANNEL_MIXING, [0])
        labels.pin(w, site, Reason.CHANNEL_MIXING, [0])
        matrix = _narrowed(labels.of(w), [0], labels)
        rows = _narrowed({a: f for a, f in matrix.items() if a == 1}, [2], labels)
        columns = _narrowed({a: f for a, f in matrix.items() if a == 2}, [1], labels)
        mine = _narrowed(labels.of(x), [0], labels)
        read = {1: rows[1].view(1, -1)} if 1 in rows else {}
        contracted = (1, call.shape(x)[1])
        labels.unify([({a: f for a, f in mine.items() if a == 1}, contracted), (read, contracted)], 2, site)
        return {1: columns[2].view(1, -1)} if 2 in columns else {}

    def _matrix(self, facts: FactTable, w: Value) -> Tensor:
        """Where some expert's weight may differ from 0, [C_in, C_out] or with size 1."""
        return _may_be_nonzero(facts, w).any(0)

    def forward(self, call: Call, facts: FactTable) -> Constancy:
        x, w = self.operands(call)
        varies = _meets(_may_be_nonzero(facts, x).any(0, keepdim=True), self._matrix(facts, w))
        return Constancy(varies, torch.zeros_like(varies, dtype=torch.float64))

    def backward(self, call: Call, live: Live, facts: FactTable) -> Demand:
        assert isinstance(live, Tensor)
        x, w = self.operands(call)
        nx, nw = _may_be_nonzero(facts, x).any(0, keepdim=True), self._matrix(facts, w)
        rows = live.any(0, keepdim=True)  # [1, C_out]
        wanted = _meets(rows, nw.t()) & nx | rows.any() & ~nx & facts.kept_channels(x)
        kept = facts.kept_channels(w).any(0)
        needed = (rows & nx.t() & nw) | (rows & ~nw & kept)  # a weight that is 0 where x may not be
        return {
            x: collapse(wanted & torch.ones(facts.layout(x), dtype=torch.bool), facts.layout(x)),
            w: collapse(needed.unsqueeze(0) & torch.ones(facts.layout(w), dtype=torch.bool), facts.layout(w)),
        }


def _meets(a: Tensor, b: Tensor) -> Tensor:
    n = max(a.shape[-1], b.shape[-2])
    return (a.expand(a.shape[0], n).float() @ b.expand(n, b.shape[-1]).float()) > 0


@op_rule(*spellings("topk"), default_dim=-1)
class TopK(AlongOne):
    """The largest entries along one axis, which stays whole (the router of a mixture of experts)."""

    signature: tuple[str, ...] = ("input", "k", "dim")

    def label(self, call: Call, labels: Labeller) -> Fields | tuple[Fields, ...]:
        found, axis = super().label(call, labels), self.axis(call)
        assert isinstance(found, tuple)
        return tuple({a: f for a, f in fields.items() if a != axis} for fields in found)


op_rule(*spellings("histc"), *spellings("bincount"))(OpRule)
