"""Group norm: statistics over the channels of each group (theory: Lemmas N1 to N6)."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from srfx.ir.call import Call
from srfx.ir.editor import GraphEdit, Ref, Stored
from srfx.ir.edits import Recall, ReplaceModule
from srfx.ir.plan import Reason
from srfx.ir.program import Param, Value
from srfx.lattice.constancy import Constancy
from srfx.lattice.movement import Fields
from srfx.nn import (
    CompensatedGroupNorm,
    RemovedConstants,
    functional,
)
from srfx.ops.facts import Demand, FactTable, Labeller, Live, collapse
from srfx.ops.norm import _ref
from srfx.ops.registry import op_rule
from srfx.ops.rule import OpRule

aten = torch.ops.aten


class GroupNorm(OpRule):
    """y = (x - mean_g) / sqrt(var_g + eps) * gamma + beta, statistics over the channels of a group and all positions.

    A constant channel may go when nobody reads its output, or its gamma is 0.
    """

    signature: tuple[str, ...] = ("input", "num_groups", "weight", "bias", "eps")

    def x(self, call: Call) -> Value:
        return call.operand("input")

    def groups(self, call: Call) -> Tensor:
        """Group of each channel, [C]."""
        index = call.value("group_index")
        if isinstance(index, Param):
            stored: Tensor = index.tensor.detach().cpu()
            return stored
        channels = call.shape(self.x(call))[1]
        size: int = channels // call.get("num_groups")
        return torch.arange(channels) // size

    def is_shared(self, call: Call) -> bool:
        sites = [n for n in call.program.nodes if n.op == "call_module" and n.target == call.node.target]
        params = [call.value(name) for name in ("weight", "bias")]
        return len(sites) > 1 or any(isinstance(p, Param) and p.n_sites > 1 for p in params)

    def label(self, call: Call, labels: Labeller) -> Fields:
        x = self.x(call)
        rank = len(call.shape(x))
        spatial = [a for a in labels.of(x) if a != 1]
        labels.pin(x, call.node.name, Reason.CHANNEL_MIXING, spatial)
        own = {a: f for a, f in labels.of(x).items() if a == 1 and f.numel() == f.shape[1]}
        operands = [(own, call.shape(x))]
        if not own or self.is_shared(call):
            labels.pin(x, call.node.name, Reason.SHARED_WEIGHT)
        for name in ("weight", "bias"):
            value = call.value(name)
            if value is not None:
                column = labels.of(value)[0].view([-1 if a == 1 else 1 for a in range(rank)])
                operands.append(({1: column}, tuple(column.shape)))
        index = call.value("group_index")
        if index is not None and 1 in own:
            labels.table.tie(labels.of(index)[0], own[1].flatten())
        return labels.unify(operands, rank, call.node.name)

    def _gamma(self, call: Call, facts: FactTable, name: str, default: float) -> Tensor:
        value = call.value(name)
        found = (
            torch.tensor([default], dtype=torch.float64)
            if value is None
            else facts.constancy(value).value.double().cpu()
        )
        return found.view([-1 if a == 1 else 1 for a in range(len(call.out_shape))])

    def forward(self, call: Call, facts: FactTable) -> Constancy:
        gamma, beta = self._gamma(call, facts, "weight", 1.0), self._gamma(call, facts, "bias", 0.0)
        c, groups = facts.constancy(self.x(call)).settle([1]), self.groups(call)
        varies = c.varies.cpu().flatten().expand(groups.numel())
        moving = (
            torch.zeros(len(self._before(call))).index_add(0, groups, varies.float()) > 0
        )  # some may be empty
        value = self._normalised(call, c.value.double().cpu().flatten().expand(groups.numel())).view(
            [-1 if a == 1 else 1 for a in range(gamma.dim())]
        )
        still = (~moving | self._is_lone(call))[groups].view(value.shape) & value.isfinite()
        result = torch.where(still, value, 0.0) * gamma + beta
        is_constant = still | (gamma == 0)
        return Constancy(~is_constant, torch.where(is_constant, result, 0.0))

    def _is_lone(self, call: Call) -> Tensor:
        """Groups of one number, which is its own mean, [G]."""
        groups, gone = self.groups(call), self._before(call)
        held = torch.bincount(groups, minlength=len(gone)) + torch.tensor([g.n_values for g in gone])
        return (held == 1) & (math.prod(call.shape(self.x(call))[2:]) == 1)

    def _normalised(self, call: Call, value: Tensor) -> Tensor:
        """Return (x - mu) r as if every channel were constant, [C]; right in groups where all are."""
        groups, found = self.groups(call), torch.zeros_like(value)
        for g, gone in enumerate(self._before(call)):
            part = value[groups == g]
            total = part.numel() + gone.n_values
            mean = (part.sum() + gone.sum) / total
            square = ((part - mean) ** 2).sum() + gone.m2 + gone.n_values * (gone.mean - mean) ** 2
            found[groups == g] = (part - mean) / (square / total + call.get("eps", 1e-5)).sqrt()
        return found

    def backward(self, call: Call, live: Live, facts: FactTable) -> Demand:
        assert isinstance(live, Tensor)
        x = self.x(call)
        c, groups = facts.constancy(x).settle([1]), self.groups(call)
        shape = [groups.numel() if a == 1 else 1 for a in range(live.dim())]
        active = (
            collapse(live, tuple(shape)).expand(shape).flatten()
            & (self._gamma(call, facts, "weight", 1.0) != 0).flatten()
        )
        counts = torch.zeros(int(groups.max()) + 1).index_add(0, groups, active.float())
        rows = (counts[groups] > 0).view(shape)
        wanted = rows & (c.varies.cpu() | facts.kept_channels(x)) | (live & active.view(shape))
        if bool((live & active.view(shape) & ~c.varies.cpu()).any()):
            reader = next(iter(call.node.users))
            facts.refuse(
                call.node,
                Reason.NOT_LINEAR_IN_NORM,
                f"a group norm emits no statistics; {reader.name} reads it",
            )
        return {x: collapse(wanted, facts.layout(x))}

    def compact(self, call: Call, facts: FactTable) -> Iterable[GraphEdit]:
        x = self.x(call)
        fields = facts.fields(x)
        if not facts.changed(fields, 1, call.shape(x)[1]):
            return []
        groups, kept = self.groups(call), facts.is_kept(fields[1]).flatten()
        c = facts.constancy(x).settle([1])
        value = c.value.double().cpu().flatten().expand(groups.numel())
        varies = c.varies.cpu().flatten().expand(groups.numel())
        value = torch.where(varies, 0.0, value)  # only channels of groups that are not live may vary and go
        removed = [
            self._before(call)[g].merge(RemovedConstants.from_values(value[~kept & (groups == g)]))
            for g in range(len(self._before(call)))
        ]
        eps, affine = call.get("eps", 1e-5), call.get("weight") is not None
        if call.module is not None:
            module = CompensatedGroupNorm(groups[kept], removed, eps=eps, affine=affine)
            return [ReplaceModule(call.node.name, module, ("weight", "bias") if affine else ())]
        size = torch.bincount(groups).max() if not call.get("group_size") else call.get("group_size")
        path = f"{call.node.name}_group_index"
        args = (
            Ref(call["input"].name),
            Stored(path, groups[kept]),
            int(size),
            tuple(r.mean for r in removed),
            tuple(r.m2 for r in removed),
        )
        kwargs = {"weight": _ref(call, "weight"), "bias": _ref(call, "bias"), "eps": eps}
        return [Recall(call.node.name, functional.compensated_group_norm, args, kwargs)]

    def _before(self, call: Call) -> list[RemovedConstants]:
        if isinstance(call.module, CompensatedGroupNorm):
            return list(call.module.removed)
        if call.get("removed_mean") is not None:
            groups, size = self.groups(call), call.get("group_size")
            held = torch.bincount(groups, minlength=len(call.get("removed_mean")))
            return [RemovedConstants(size - int(n), m, m2)
                    for n, m, m2 in zip(held, call.get("removed_mean"), call.get("removed_m2"), strict=True)]  # fmt: skip
        return [RemovedConstants() for _ in range(call.get("num_groups"))]


op_rule(
    nn.GroupNorm, F.group_norm, torch.group_norm, aten.group_norm.default, CompensatedGroupNorm,
    (functional.compensated_group_norm, "input group_index group_size removed_mean removed_m2 weight bias eps"),
)(GroupNorm)  # fmt: skip
