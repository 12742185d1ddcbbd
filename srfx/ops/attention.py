"""Products of two computed values: matmul, and scaled dot product attention (theory: Lemmas A1 to A5).

Lanes are the channels of the head axis D.  Softmax is shift invariant, so a key lane that is constant over all keys
adds the same number to every score of a query and is not needed, nor is the query lane it meets.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor

from srfx.ir.call import Call
from srfx.ir.editor import GraphEdit
from srfx.ir.evaluate import evaluate, has_fixed_sizes
from srfx.ir.plan import Reason
from srfx.ir.program import Param, Value
from srfx.lattice.constancy import Constancy
from srfx.lattice.movement import Fields, Shape
from srfx.nn.attention import DropoutAttention
from srfx.ops.facts import Demand, FactTable, Labeller, Live, collapse
from srfx.ops.invariance import is_shift_invariant
from srfx.ops.linear import MatmulWithParameter
from srfx.ops.registry import op_rule
from srfx.ops.rule import OpRule
from srfx.ops.sizes import set_argument

aten = torch.ops.aten


class Product(OpRule):
    """y[.., m, n] = sum_c a[.., m, c] b[.., c, n], both computed (or a stack of parameters); batch axes broadcast."""

    signature: tuple[str, ...] = ("input", "other")

    def operands(self, call: Call) -> tuple[Value, Value]:
        return call.operand("input"), call.operand("other")

    def label(self, call: Call, labels: Labeller) -> Fields | tuple[Fields, ...]:
        a, b = self.operands(call)
        sa, sb = call.shape(a), call.shape(b)
        if min(len(sa), len(sb)) < 2:
            return super().label(call, labels)
        rank, site = len(call.out_shape), call.node.name
        left, right = _lift(labels.of(a), sa, rank), _turned(_lift(labels.of(b), sb, rank))
        wide_a, wide_b = (1,) * (rank - len(sa)) + sa, (1,) * (rank - len(sb)) + sb
        batch = labels.unify(
            [(_narrowed(left, [rank - 2], labels), (*wide_a[:-2], 1, wide_a[-1])),
             (_narrowed(right, [rank - 2], labels), (*wide_b[:-2], 1, wide_b[-2]))], rank, site)  # fmt: skip
        found = _narrowed({axis: f for axis, f in batch.items() if axis < rank - 2}, [rank - 1], labels)
        rows = _narrowed(left, [rank - 1], labels).get(rank - 2)
        columns = _narrowed(_turned(right), [rank - 2], labels).get(rank - 1)
        if rows is not None:
            found[rank - 2] = rows
        if columns is not None:
            found[rank - 1] = columns
        return found

    def forward(self, call: Call, facts: FactTable) -> Constancy | tuple[Constancy, ...]:
        a, b = self.operands(call)
        if min(len(call.shape(a)), len(call.shape(b))) < 2:
            return super().forward(call, facts)
        terms = self._meets(_may_be_nonzero(facts, a), _may_be_nonzero(facts, b))
        value = torch.zeros(terms.shape, dtype=torch.float64)
        ca, cb = facts.constancy(a), facts.constancy(b)
        if ca.sums_to_one == len(call.shape(a)) - 1 and cb.value.shape[-2] == cb.varies.shape[-2] == 1:
            # rows of a sum to one and a column of b is one number: that number comes out
            same = (~cb.varies.cpu() & (cb.value != 0).cpu()).expand(terms.shape)
            terms, value = terms & ~same, torch.where(same, cb.value.double().cpu(), value)
        return Constancy(terms, value)

    def _meets(self, a: Tensor, b: Tensor) -> Tensor:
        """Where some term of the sum can differ from 0."""
        n = max(a.shape[-1], b.shape[-2])
        return (a.expand(*a.shape[:-1], n).float() @ b.expand(*b.shape[:-2], n, b.shape[-1]).float()) > 0

    def backward(self, call: Call, live: Live, facts: FactTable) -> Demand:
        a, b = self.operands(call)
        if min(len(call.shape(a)), len(call.shape(b))) < 2 or not isinstance(live, Tensor):
            return super().backward(call, live, facts)
        na, nb = _may_be_nonzero(facts, a), _may_be_nonzero(facts, b)
        if is_shift_invariant(call.node, len(call.out_shape) - 1, call.program):
            keys = _alike_along(facts, b, len(call.shape(b)) - 1)
            nb = nb & keys.varies.cpu()  # a lane constant over all keys shifts a query's scores alike
        kept_a, kept_b = facts.kept_channels(a), facts.kept_channels(b)
        # a term is needed where both factors can be nonzero; a zero factor must be 0 where its channel stays
        used_a, used_b = live.any(-1, keepdim=True), live.any(-2, keepdim=True)
        wanted_a = self._meets(live, nb.transpose(-2, -1)) & na | used_a & ~na & kept_a
        wanted_b = self._meets(na.transpose(-2, -1), live) & nb | used_b & ~nb & kept_b
        demand: Demand = {}
        for value, wanted in ((a, wanted_a), (b, wanted_b)):
            found = collapse(wanted, facts.layout(value))
            demand[value] = demand[value] | found if value in demand else found
        return demand


def _may_be_nonzero(facts: FactTable, value: Value) -> Tensor:
    c = facts.constancy(value)
    return (c.varies | (c.value != 0)).cpu()


def _lift(fields: Fields, shape: Shape, rank: int) -> Fields:
    shift = rank - len(shape)
    return {a + shift: f.view((1,) * shift + tuple(f.shape)) for a, f in fields.items()}


def _turned(fields: Fields) -> Fields:
    """The fields of the matrix transpose."""
    if not fields:
        return {}
    rank = next(iter(fields.values())).dim()
    swap = {rank - 1: rank - 2, rank - 2: rank - 1}
    return {swap.get(a, a): f.transpose(-2, -1) for a, f in fields.items()}


def _narrowed(fields: Fields, axes: list[int], labels: Labeller) -> Fields:
    """Fields without these axes; labels that differ along them have to agree."""
    found = {}
    for a, f in fields.items():
        if a in axes:
            continue
        for d in axes:
            if f.shape[d] > 1:
                labels.table.tie(f, f.narrow(d, 0, 1))
                f = f.narrow(d, 0, 1)
        found[a] = f
    return found


@op_rule((torch.mm, "input other"), ("mm", "input other"), (torch.matmul, "input other"), ("matmul", "input other"),
         (operator.matmul, "input other"), (aten.mm.default, "input other"), aten.matmul.default,
         (torch.bmm, "input other"), ("bmm", "input other"), (aten.bmm.default, "input other"))  # fmt: skip
class Matmul(Product):
    """matmul, mm, bmm: with a parameter of two axes on the right it is a linear layer, else a product of values."""

    linear = MatmulWithParameter()

    def rule(self, call: Call) -> OpRule:
        call.bound.setdefault("weight", call.bound.get("other"))
        return super() if self.linear.refused(call) is not None else self.linear  # type: ignore[return-value]

    def label(self, call: Call, labels: Labeller) -> Fields | tuple[Fields, ...]:
        rule, reason = self.rule(call), self.linear.refused(call)
        if reason in (Reason.UNSUPPORTED_DTYPE, Reason.NON_FINITE):  # as a product only zeros go
            labels.refuse(call.node, reason)
        return rule.label(call, labels)

    def forward(self, call: Call, facts: FactTable) -> Constancy | tuple[Constancy, ...]:
        return self.rule(call).forward(call, facts)

    def backward(self, call: Call, live: Live, facts: FactTable) -> Demand:
        return self.rule(call).backward(call, live, facts)

    def sustain(self, call: Call, facts: FactTable) -> Tensor | None:
        return self.rule(call).sustain(call, facts)

    def fold(self, call: Call, facts: FactTable) -> Iterable[GraphEdit]:
        return self.rule(call).fold(call, facts)

    def compact(self, call: Call, facts: FactTable) -> Iterable[GraphEdit]:
        return self.rule(call).compact(call, facts)


@op_rule((aten.baddbmm.default, "input batch1 batch2 beta alpha"), (torch.baddbmm, "input batch1 batch2 beta alpha"),
         ("baddbmm", "input batch1 batch2 beta alpha"))  # fmt: skip
class ProductAndSum(Product):
    """baddbmm: y = beta x + alpha a b."""

    def operands(self, call: Call) -> tuple[Value, Value]:
        return call.operand("batch1"), call.operand("batch2")

    def _summand(self, call: Call) -> Value:
        return call.operand("input")

    def label(self, call: Call, labels: Labeller) -> Fields | tuple[Fields, ...]:
        product, x = super().label(call, labels), self._summand(call)
        assert isinstance(product, dict)
        operands = [(product, call.out_shape), (labels.of(x), call.shape(x))]
        return labels.unify(operands, len(call.out_shape), call.node.name)

    def forward(self, call: Call, facts: FactTable) -> Constancy | tuple[Constancy, ...]:
        product, x = super().forward(call, facts), facts.constancy(self._summand(call))
        assert isinstance(product, Constancy)
        alpha, beta = call.get("alpha", 1), call.get("beta", 1)
        x = Constancy(_lifted(x.varies.cpu(), product), _lifted(x.value.double().cpu(), product))
        if beta == 0:  # then x is ignored, even inf and nan
            return Constancy(product.varies, alpha * product.value)
        return Constancy(product.varies | x.varies, alpha * product.value + beta * x.value)

    def backward(self, call: Call, live: Live, facts: FactTable) -> Demand:
        demand, x = super().backward(call, live, facts), self._summand(call)
        if isinstance(live, Tensor) and call.get("beta", 1) != 0:
            found = collapse(live, facts.layout(x))
            demand[x] = demand[x] | found if x in demand else found
        return demand


def _lifted(t: Tensor, like: Constancy) -> Tensor:
    return t.reshape((1,) * (like.varies.dim() - t.dim()) + tuple(t.shape))


def _alike_along(facts: FactTable, value: Value, axis: int) -> Constancy:
    """What is known of lanes at all tokens alike: a constant of its own at each token of ``axis`` is none of the lane's."""
    c = facts.constancy(value)
    return c.settle(set(range(c.value.dim())) - {axis})


def _over_tokens(facts: FactTable, value: Value) -> Constancy:
    return _alike_along(facts, value, len(facts.program.shape(value)) - 2)


@op_rule(F.scaled_dot_product_attention, DropoutAttention,
         (aten.scaled_dot_product_attention.default, "query key value attn_mask dropout_p is_causal"))  # fmt: skip
class Attention(OpRule):
    """y = softmax(q k^T scale + mask) v.  q [.., Tq, D], k [.., Tk, D], v [.., Tk, Dv] -> y [.., Tq, Dv]."""

    # scale and enable_gqa are keywords only
    signature: tuple[str, ...] = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")

    def operands(self, call: Call) -> tuple[Value, Value, Value]:
        return call.operand("query"), call.operand("key"), call.operand("value")

    def label(self, call: Call, labels: Labeller) -> Fields | tuple[Fields, ...]:
        if call.get("enable_gqa"):
            return super().label(call, labels)
        q, k, v = self.operands(call)
        rank, site = len(call.out_shape), call.node.name
        mask = call.value("attn_mask")
        for value in (q, k, v):  # token axes carry no channels
            shift = rank - len(call.shape(value))
            labels.pin(value, site, Reason.UNTRACKED_AXIS, [rank - 2 - shift])
        lanes = [self._operand(call, labels, x, rank, keep_lanes=True) for x in (q, k)]
        heads = [self._operand(call, labels, x, rank, keep_lanes=False) for x in (q, k, v)]
        if mask is not None:
            shift = rank - len(call.shape(mask))
            labels.pin(mask, site, Reason.UNTRACKED_AXIS, [rank - 2 - shift, rank - 1 - shift])
            heads.append(self._operand(call, labels, mask, rank, keep_lanes=False))
        labels.unify(lanes, rank, site)
        found = labels.unify(heads, rank, site)
        values, _ = self._operand(call, labels, v, rank, keep_lanes=True)
        if rank - 1 in values:
            found[rank - 1] = values[rank - 1]
        return found

    def _operand(
        self, call: Call, labels: Labeller, value: Value, rank: int, keep_lanes: bool
    ) -> tuple[Fields, Shape]:
        shape = call.shape(value)
        fields = _lift(labels.of(value), shape, rank)
        wide = (1,) * (rank - len(shape)) + shape
        if keep_lanes:
            return _narrowed(fields, [rank - 2], labels), (*wide[:-2], 1, wide[-1])
        return _narrowed(fields, [rank - 2, rank - 1], labels), (*wide[:-2], 1, 1)

    def forward(self, call: Call, facts: FactTable) -> Constancy | tuple[Constancy, ...]:
        if call.get("enable_gqa"):
            return super().forward(call, facts)
        c = _over_tokens(facts, self.operands(call)[2])
        lead = (1,) * (len(call.out_shape) - c.varies.dim())
        varies, value = (
            c.varies.cpu().view(lead + c.varies.shape),
            c.value.double().cpu().view(lead + c.value.shape),
        )
        if self.drops(call) or not self.sees_a_key(call):
            if not self.drops(call) and bool((~varies & (value != 0)).any()):
                facts.refuse(call.node, Reason.MASKED, "a value is the same at all keys")
            varies = varies | (value != 0)
        return Constancy(varies, value)

    def drops(self, call: Call) -> bool:
        """Whether weights are dropped; a module drops none in eval mode."""
        return bool(call.get("dropout_p", 0.0)) and (call.module is None or call.module.training)

    def sees_a_key(self, call: Call) -> bool:
        """Whether every query is known to see some key: no mask, or one that no input decides and that says so."""
        mask = call.value("attn_mask")
        if mask is None:
            return True
        found: Tensor | None = None
        if isinstance(mask, Param):
            found = mask.tensor.detach()
        elif has_fixed_sizes(mask, (-2, -1)):
            found = evaluate(mask, call.program)
        if found is None:
            return False
        seen = found if found.dtype == torch.bool else found > torch.finfo(found.dtype).min / 2
        alike = (
            isinstance(mask, Param) or seen.dim() < 3 or bool((seen == seen[:1]).all())
        )  # at any batch size
        return alike and bool(seen.any(-1).all())

    def backward(self, call: Call, live: Live, facts: FactTable) -> Demand:
        if call.get("enable_gqa") or not isinstance(live, Tensor):
            return super().backward(call, live, facts)
        q, k, v = self.operands(call)
        cq, ck = _over_tokens(facts, q), _over_tokens(facts, k)
        head = live.any(-1, keepdim=True).any(-2, keepdim=True)
        idle_q, idle_k = cq.is_constant(0).cpu(), ~ck.varies.cpu()
        needed = head & ~idle_q & ~idle_k
        kept_q, kept_k = facts.kept_channels(q), facts.kept_channels(k)
        demand: Demand = {}
        wanted_q, wanted_k = needed | head & kept_q & idle_q & ~idle_k, needed | head & kept_k & idle_k
        for value, part in ((q, wanted_q), (k, wanted_k), (v, live)):  # q, k and v may be one value
            found = collapse(part, facts.layout(value))
            demand[value] = demand[value] | found if value in demand else found
        mask = call.value("attn_mask")
        if mask is not None:
            demand[mask] = collapse(head.expand(*head.shape[:-2], 1, 1), facts.layout(mask))
        return demand

    def compact(self, call: Call, facts: FactTable) -> Iterable[GraphEdit]:
        if call.get("enable_gqa"):
            return []
        q = self.operands(call)[0]
        width = call.shape(q)[-1]
        is_narrower = facts.changed(facts.fields(q), len(call.shape(q)) - 1, width)
        if is_narrower and call.get("scale") is None:
            return [set_argument(call, "scale", 1.0 / math.sqrt(width))]
        return []
