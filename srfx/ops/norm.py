"""Layer norm and its compensated form (theory: Lemmas N1 to N6)."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from srfx.ir.call import Call
from srfx.ir.editor import GraphEdit, Ref, Stored
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
from srfx.ops.sizes import is_range

aten = torch.ops.aten


class LayerNorm(NormFacts):
    """y = (x - mean) / sqrt(var + eps) * gamma + beta over the last axes."""

    def compact(self, call: Call, facts: FactTable) -> Iterable[GraphEdit]:
        x = self.x(call)
        axis, has_own = self._own(call, facts)
        if axis is None:
            return []
        kept = facts.is_kept(facts.fields(x)[axis])
        kept = (
            kept.reshape(-1, kept.shape[axis])
            if axis == kept.dim() - 1
            else kept.movedim(axis, -1).reshape(-1, kept.shape[axis])
        )
        emits = self._emitted(call, facts, axis) if has_own else ()
        row = kept[int(kept.sum(1).argmax())]
        outputs = self._outputs_left(call, facts, axis, len(emits)) if has_own else None
        if bool(kept.all()) and emits == self.emits(call) and self._is_as_before(call, outputs):
            return []
        c = facts.constancy(x)
        width = call.shape(x)[axis]
        value = (
            c.settle([axis]).value.double().cpu().flatten().expand(width)
        )  # 0 where rows differ: see _absorbable
        shape = [facts.count(facts.fields(x), a) if a == axis else call.shape(x)[a] for a in self.axes(call)]
        repeat = torch.Size(call.shape(x)[a] for a in self.axes(call) if a != axis).numel()
        return self.rewrite(call, facts, shape, value[~row], repeat, emits, outputs)

    def _emitted(self, call: Call, facts: FactTable, axis: int) -> tuple[str, ...]:
        own = facts.is_kept(facts.fields(call.node)[axis]).flatten()
        places = facts.emitted.get(
            call.node, {name: self.outputs(call).numel() + i for i, name in enumerate(self.emits(call))}
        )
        return tuple(n for n in EMITS if n in places and bool(own[places[n]]))

    def _outputs_left(self, call: Call, facts: FactTable, axis: int, n_emitted: int) -> Tensor | None:
        """Which of the channels that are left of the operand come out, [M]; None for all of them in their order."""
        held = facts.index(facts.fields(self.x(call)), axis)
        place = torch.full((call.shape(self.x(call))[axis],), -1).index_copy(
            0, held, torch.arange(held.numel())
        )
        own = facts.index(facts.fields(call.node), axis)
        chosen = place[self.outputs(call)[own[: own.numel() - n_emitted]]]
        return None if chosen.numel() == held.numel() and is_range(chosen) else chosen

    def _is_as_before(self, call: Call, outputs: Tensor | None) -> bool:
        if outputs is None or call.value("outputs") is None:
            return outputs is None and call.value("outputs") is None
        return torch.equal(outputs, self.outputs(call))

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
                outputs=outputs,
                device=call.output.device,
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
            **_stored(call, outputs),
        }
        return [Recall(call.node.name, functional.compensated_layer_norm, args, kwargs)]


op_rule(
    nn.LayerNorm, F.layer_norm, torch.layer_norm, aten.layer_norm.default, CompensatedLayerNorm,
    (functional.compensated_layer_norm,
     "input normalized_shape n_total removed_mean removed_m2 weight bias eps emits emit_shift outputs"),
)(LayerNorm)  # fmt: skip


def _stored(call: Call, outputs: Tensor | None) -> dict[str, Any]:
    """The argument that says which channels come out, kept in a buffer."""
    if outputs is None:
        return {}
    return {"outputs": Stored(f"{call.node.name}_outputs", outputs.to(call.output.device, torch.int32))}


def _ref(call: Call, name: str) -> Any:
    raw = call.bound.get(name)
    return Ref(raw.name) if isinstance(raw, fx.Node) else raw
