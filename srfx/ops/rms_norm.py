"""RMS norm: a layer norm without centring (theory: Lemmas N1 to N6)."""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from srfx.ir.call import Call
from srfx.ir.editor import GraphEdit, Ref
from srfx.ir.edits import Recall, ReplaceModule, SetArgument, SetTensor
from srfx.ir.program import Param
from srfx.lattice.constancy import Constancy
from srfx.nn import (
    CompensatedRMSNorm,
    RemovedConstants,
    functional,
    rescale_rms_norm,
    resolved_rms_eps,
)
from srfx.ops.facts import FactTable
from srfx.ops.norm import LayerNorm, _ref, _stored
from srfx.ops.registry import op_rule
from srfx.ops.sizes import set_argument

aten = torch.ops.aten


class RMSNorm(LayerNorm):
    """y = x / sqrt(mean(x^2) + eps) * gamma over the last axis."""

    signature: tuple[str, ...] = ("input", "normalized_shape", "weight", "eps")

    centred = False

    def _normalised(self, call: Call, value: Tensor, axes: list[int]) -> Tensor:
        total = self._total(call) or torch.Size(value.shape[a] for a in axes).numel()
        square = ((value**2).sum(axes, keepdim=True) + self._squares(call)) / total
        return value / (square + resolved_rms_eps(call.get("eps"), call.output.dtype)).sqrt()

    def forward(self, call: Call, facts: FactTable) -> Constancy:
        found, c = super().forward(call, facts), facts.constancy(self.x(call))
        zero = c.is_constant(0).cpu()  # 0 stays 0 whatever the statistics
        n_emitted = len(self.emits(call))
        if n_emitted or call.value("outputs") is not None:
            every = zero.expand(*zero.shape[:-1], call.shape(self.x(call))[-1])
            zero = F.pad(every.index_select(-1, self.outputs(call)), (0, n_emitted))
        return Constancy(found.varies & ~zero, torch.where(zero, 0.0, found.value), found.affine)

    def rewrite(
        self,
        call: Call,
        facts: FactTable,
        shape: list[int],
        gone: Tensor,
        repeat: int,
        emits: tuple[str, ...],
        outputs: Tensor | None,
    ) -> Iterable[GraphEdit]:
        removed = RemovedConstants.from_values(gone, repeat=repeat)
        squares = self._squares(call) + removed.sum_squares
        n_kept = torch.Size(shape).numel()
        n_total = self._total(call) or n_kept + removed.n_values
        if emits or outputs is not None or len(shape) > 1 or self._total(call):
            return self._compensated(call, shape, n_total, squares, emits, outputs)
        dtype = call.output.dtype
        eps = resolved_rms_eps(call.get("eps"), dtype)
        weight = call.value("weight")
        if weight is None or not isinstance(weight, Param):
            return self._compensated(call, shape, n_total, squares, emits, outputs)
        kept = facts.compact(weight.tensor.detach(), facts.fields(weight), weight.shape)
        scaled, eps = rescale_rms_norm(kept, eps, n_kept, n_total, squares)
        assert scaled is not None
        edits: list[GraphEdit] = [SetTensor(call.node.name, "weight", tuple(weight.names), scaled)]
        if call.module is not None:
            return [
                *edits,
                SetArgument(call.node.name, "normalized_shape", tuple(shape)),
                SetArgument(call.node.name, "eps", eps),
            ]
        return [*edits, set_argument(call, "normalized_shape", tuple(shape)), set_argument(call, "eps", eps)]

    def _compensated(
        self,
        call: Call,
        shape: list[int],
        n_total: int,
        squares: float,
        emits: tuple[str, ...],
        outputs: Tensor | None,
    ) -> Iterable[GraphEdit]:
        if call.module is not None:
            affine = call.get("weight") is not None
            module = CompensatedRMSNorm(
                shape[-1],
                n_total,
                squares,
                eps=call.get("eps"),
                elementwise_affine=affine,
                emits=emits,
                outputs=outputs,
                device=call.output.device,
            )
            return [ReplaceModule(call.node.name, module, ("weight",) if affine else ())]
        args = (Ref(call["input"].name), tuple(shape), n_total, squares)
        kwargs = {
            "weight": _ref(call, "weight"),
            "eps": call.get("eps"),
            "emits": emits,
            **_stored(call, outputs),
        }
        return [Recall(call.node.name, functional.compensated_rms_norm, args, kwargs)]

    def axes(self, call: Call) -> list[int]:
        if isinstance(call.module, CompensatedRMSNorm):
            return [len(call.shape(self.x(call))) - 1]
        return super().axes(call)

    def _squares(self, call: Call) -> float:
        return float(call.get("removed_sum_squares", 0.0))

    def _total(self, call: Call) -> int:
        return int(call.get("n_total", 0))


op_rule(
    nn.RMSNorm, F.rms_norm, torch.rms_norm, aten.rms_norm.default, CompensatedRMSNorm,
    (functional.compensated_rms_norm, "input normalized_shape n_total removed_sum_squares weight eps emits outputs"),
)(RMSNorm)  # fmt: skip
