"""Linear layers: linear, addmm, and a matmul with a stored matrix on the right (theory: Lemmas L1 to L3)."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from srfx.ir.call import Call
from srfx.ir.editor import GraphEdit
from srfx.ir.edits import AddStored, SetTensor
from srfx.ir.plan import Reason
from srfx.ops.contraction import Contraction
from srfx.ops.facts import FactTable
from srfx.ops.registry import op_rule

aten = torch.ops.aten


@op_rule(nn.Linear, F.linear, aten.linear.default)
class Linear(Contraction):
    """y = x W^T + b.  x [.., C_in], W [C_out, C_in], b [C_out] -> y [.., C_out]."""

    adds_statistics = True
    is_overwritable = True

    def channel_axis(self, call: Call) -> int:
        return len(call.shape(self.x(call))) - 1

    def matrix(self, call: Call, weight: Tensor) -> Tensor:
        return weight.view(1, *weight.shape, 1)

    def unmatrix(self, call: Call, m: Tensor, weight: Tensor) -> Tensor:
        return m[0]

    def resize(self, call: Call, facts: FactTable) -> Iterable[GraphEdit]:
        if call.module is None:
            return []
        return self.module_widths(call, facts, "in_features", "out_features")


class _RowsLast(Contraction):
    """The weight is stored as W [C_in, C_out]."""

    def row_axis(self, call: Call) -> int:
        return 1

    def matrix(self, call: Call, weight: Tensor) -> Tensor:
        return weight.t().unsqueeze(0).unsqueeze(-1)

    def unmatrix(self, call: Call, m: Tensor, weight: Tensor) -> Tensor:
        return m[0].t()


@op_rule((aten.addmm.default, "bias input weight beta alpha"), (torch.addmm, "bias input weight beta alpha"))
class Addmm(_RowsLast):
    """y = b + x W.  x [N, C_in], W [C_in, C_out], b [C_out]; scaled forms are barriers."""

    is_overwritable = True

    def refused(self, call: Call) -> Reason | None:
        if call.get("beta", 1) != 1 or call.get("alpha", 1) != 1:
            return Reason.UNKNOWN_OP
        bias = call.value("bias")
        if bias is None or len(call.shape(bias)) != 1:
            return Reason.UNKNOWN_OP
        return super().refused(call)

    def channel_axis(self, call: Call) -> int:
        return len(call.shape(self.x(call))) - 1


class MatmulWithParameter(_RowsLast, Linear):
    """y = x W with a parameter W [C_in, C_out]: the bias, where folding needs one, is added behind (theory: Lemma L6)."""

    signature: tuple[str, ...] = ("input", "weight")

    def refused(self, call: Call) -> Reason | None:
        w = call.value("weight")
        if w is None or len(call.shape(w)) != 2:
            return Reason.UNKNOWN_OP
        return super().refused(call)

    takes_statistics = False
    adds_statistics = False

    def is_private(self, call: Call, facts: FactTable) -> bool:
        """What is added behind needs a name that is free."""
        return super().is_private(call, facts) and not (
            self._sees_constants(call, facts) and call.program.has_attribute(call.slot("bias"))
        )

    def _sees_constants(self, call: Call, facts: FactTable) -> bool:
        return bool(facts.constancy(self.x(call)).nonzero().any())

    def fold(self, call: Call, facts: FactTable) -> Iterable[GraphEdit]:
        """A new bias is stored; the call itself does not take it."""
        return [
            replace(e, signature=()) if isinstance(e, SetTensor) and e.creates else e
            for e in super().fold(call, facts)
        ]

    def compact(self, call: Call, facts: FactTable) -> Iterable[GraphEdit]:
        edits = list(super().compact(call, facts))
        if self.refused(call) is None and self._sees_constants(call, facts):
            new = [e for e in self.fold(call, facts) if isinstance(e, SetTensor) and e.creates]
            edits += [AddStored(call.node.name, e.paths[0]) for e in new]
        return edits

    def resize(self, call: Call, facts: FactTable) -> Iterable[GraphEdit]:
        return []
