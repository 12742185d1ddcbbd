"""Layer norm and its compensated form (theory: Lemmas N1 to N6)."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from srfx.ir.call import Call
from srfx.ir.editor import GraphEdit, Ref
from srfx.ir.edits import Recall, ReplaceModule
from srfx.lattice.constancy import EMITS
from srfx.nn import (
    CompensatedLayerNorm,
    RemovedConstants,
    functional,
)
from srfx.ops.facts import FactTable
from srfx.ops.norm_facts import NormFacts
from srfx.ops.registry import op_rule

aten = torch.ops.aten


class LayerNorm(NormFacts):
    """y = (x - mean) / sqrt(var + eps) * gamma + beta over the last axes."""

    def compact(self, call: Call, facts: FactTable) -> Iterable[GraphEdit]:
        x = self.x(call)
        axis, _ = self._own(call, facts)
        if axis is None:
            return []
        kept = facts.is_kept(facts.fields(x)[axis])
        kept = (
            kept.reshape(-1, kept.shape[axis])
            if axis == kept.dim() - 1
            else kept.movedim(axis, -1).reshape(-1, kept.shape[axis])
        )
        emits = self._emitted(call, facts, axis)
        if bool(kept.all()) and emits == self.emits(call):
            return []
        row = kept[int(kept.sum(1).argmax())]
        c = facts.constancy(x)
        width = call.shape(x)[axis]
        value = (
            c.settle([axis]).value.double().cpu().flatten().expand(width)
        )  # 0 where rows differ: see _absorbable
        shape = [facts.count(facts.fields(x), a) if a == axis else call.shape(x)[a] for a in self.axes(call)]
        repeat = torch.Size(call.shape(x)[a] for a in self.axes(call) if a != axis).numel()
        return self.rewrite(call, facts, shape, value[~row], repeat, emits)

    def _emitted(self, call: Call, facts: FactTable, axis: int) -> tuple[str, ...]:
        own = (
            facts.is_kept(facts.fields(call.node)[axis]).flatten(0, -2)[0]
            if axis == len(call.out_shape) - 1
            else None
        )
        places = facts.emitted.get(
            call.node, {name: call.shape(self.x(call))[-1] + i for i, name in enumerate(self.emits(call))}
        )
        return tuple(n for n in EMITS if n in places and own is not None and bool(own[places[n]]))

    def rewrite(
        self,
        call: Call,
        facts: FactTable,
        shape: list[int],
        gone: Tensor,
        repeat: int,
        emits: tuple[str, ...],
    ) -> Iterable[GraphEdit]:
        """Replace the call by its compensated form of the kept width."""
        removed = self._before(call).merge(RemovedConstants.from_values(gone, repeat=repeat))
        shift = facts.shifts.get(call.node, float(call.get("emit_shift", 0.0)))
        eps = call.get("eps", 1e-5)
        if call.module is not None:
            weight, bias = call.get("weight"), call.get("bias")
            module = CompensatedLayerNorm(
                shape,
                removed,
                eps=eps,
                elementwise_affine=weight is not None,
                bias=bias is not None,
                emits=emits,
                emit_shift=shift,
            )
            return [
                ReplaceModule(
                    call.node.name, module, tuple(n for n in ("weight", "bias") if call.get(n) is not None)
                )
            ]
        args = (
            Ref(call["input"].name),
            tuple(shape),
            torch.Size(shape).numel() + removed.n_values,
            removed.mean,
            removed.m2,
        )
        kwargs = {
            "weight": _ref(call, "weight"),
            "bias": _ref(call, "bias"),
            "eps": eps,
            "emits": emits,
            "emit_shift": shift,
        }
        return [Recall(call.node.name, functional.compensated_layer_norm, args, kwargs)]


op_rule(
    nn.LayerNorm, F.layer_norm, torch.layer_norm, aten.layer_norm.default, CompensatedLayerNorm,
    (functional.compensated_layer_norm,
     "input normalized_shape n_total removed_mean removed_m2 weight bias eps emits emit_shift"),
)(LayerNorm)  # fmt: skip


def _ref(call: Call, name: str) -> Any:
    raw = call.bound.get(name)
    return Ref(raw.name) if isinstance(raw, fx.Node) else raw
