"""How a contraction's call is read: its operands, its weight as a matrix, and what may be changed of it."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from srfx.ir.call import Call
from srfx.ir.editor import GraphEdit
from srfx.ir.plan import Reason
from srfx.ir.program import Param, Value
from srfx.lattice.movement import Fields
from srfx.ops.facts import FactTable, Labeller
from srfx.ops.matrix_form import is_uniform
from srfx.ops.rule import OpRule


class ContractionCall(OpRule):
    """What subclasses say of the op, and what a call of it has."""

    signature: tuple[str, ...] = ("input", "weight", "bias")
    takes_statistics = True
    """Whether a norm's statistics may come in place of channels: there is a bias for the rest."""
    adds_statistics = False
    """Whether a call with a weight of several sites may take them in a matrix of its own, added to its result."""

    # -------------------------------------------------------------- what a subclass says
    def is_even(self, call: Call) -> bool:
        """Groups are runs of channels, unless each is one."""
        shape, groups = call.shape(self.w(call)), self.groups(call)
        return self.refused(call) is None and (groups == 1 or (shape[1] == 1 and shape[0] == groups))

    def groups(self, call: Call) -> int:
        return 1

    def channel_axis(self, call: Call) -> int:
        """Axis of the operand that is contracted, and of the result that is made."""
        raise NotImplementedError

    def matrix(self, call: Call, weight: Tensor) -> Tensor:
        """The weight as M [G, R, C, taps], a view."""
        raise NotImplementedError

    def unmatrix(self, call: Call, m: Tensor, weight: Tensor) -> Tensor:
        """A tensor [G, R, C] laid out to broadcast against the weight."""
        raise NotImplementedError

    def row_axis(self, call: Call) -> int:
        """Axis of the weight that makes the result's channels."""
        return 0

    def has_border(self, call: Call) -> bool:
        """Whether positions differ in which taps they see."""
        return False

    def resize(self, call: Call, facts: FactTable) -> Iterable[GraphEdit]:
        """Edits of widths in the call."""
        return ()

    # -------------------------------------------------------------- operands
    def x(self, call: Call) -> Value:
        return call.operand("input")

    def w(self, call: Call) -> Value:
        return call.operand("weight")

    def refused(self, call: Call) -> Reason | None:
        """Why this call is a barrier, if it is one: its weight is no plain finite float tensor."""
        value = call.value("weight")
        if not isinstance(value, Param) or call.value("input") is None:
            return Reason.UNKNOWN_OP
        weight = value.tensor
        if not weight.is_floating_point() or weight.layout != torch.strided or weight.is_quantized:
            return Reason.UNSUPPORTED_DTYPE
        if not call.program.is_finite(value):
            return Reason.NON_FINITE
        return None

    def is_private(self, call: Call, facts: FactTable) -> bool:
        """Whether weight and bias may be changed: one site only, one channel vector, known alike at all positions."""
        if self.is_shared(call) or not self.has_own_bias(call):
            return False
        x, axis = self.x(call), self.channel_axis(call)
        field, found = facts.fields(x).get(axis), facts.constancy(x)
        if field is not None and field.numel() != field.shape[axis]:
            return False
        return is_uniform(found.varies, axis) and is_uniform(found.value, axis)

    def is_shared(self, call: Call) -> bool:
        """Whether weight or bias serve other sites too."""
        tensors = [call.value(name) for name in ("weight", "bias")]
        return any(isinstance(t, Param) and t.n_sites > 1 for t in tensors)

    def has_own_bias(self, call: Call) -> bool:
        """Whether there is a bias of one number for each row or place for one; into a computed one nothing folds."""
        bias = call.value("bias")
        rows = (call.out_shape[self.channel_axis(call)],)
        return bias is None or (isinstance(bias, Param) and bias.shape == rows)

    def is_bound(self, call: Call) -> bool:
        """Whether this call reads a norm's channels where others read statistics in their places (theory: Lemma N8)."""
        return not self.takes_statistics or self.is_shared(call) or not self.has_own_bias(call)

    def may_add(self, call: Call, facts: FactTable) -> bool:
        """Whether a bound call may take statistics by a small matrix of its own (theory: Lemma N9)."""
        x, axis = self.x(call), self.channel_axis(call)
        if not self.adds_statistics or call.node in facts.declined or call.node in facts.siblings:
            return False
        alone = all(n == 1 for a, n in enumerate(facts.layout(x)) if a != axis)
        return alone and self.is_shared(call) and self.has_own_bias(call)

    def operand(self, call: Call, labels: Labeller) -> Fields:
        """Fields of the operand as this call sees it: a norm's channels, and not what may come in their places."""
        fields, axis = labels.of(self.x(call)), self.channel_axis(call)
        if axis not in fields or not self.is_bound(call):
            return fields
        return {**fields, axis: labels.bound(fields[axis])}

    def kept_operand(self, call: Call, facts: FactTable) -> Tensor:
        """Elements of the operand's layout that exist for this call."""
        return facts.all_kept(self.operand(call, facts.labeller), len(call.shape(self.x(call))))
