"""Norms over channels: layer norm, RMS norm, group norm, and their compensated forms (theory: Lemmas N1 to N6).

A norm's statistics run over all channels, so a varying channel is live as soon as any output is.  A constant one may
go: the compensated norm remembers its share.  Its output, though, still varies with the statistics; linear readers
take these instead (`srfx.lattice.constancy.Affine`), all other readers keep the channel.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from srfx.ir.call import Call
from srfx.ir.edits import GraphEdit, Recall, Ref, ReplaceModule, SetArgument, SetTensor, Stored
from srfx.ir.plan import Reason
from srfx.ir.program import Param, Program, Value
from srfx.lattice.constancy import EMITS, Affine, Constancy
from srfx.lattice.movement import Fields, follow
from srfx.nn import (
    CompensatedGroupNorm,
    CompensatedLayerNorm,
    CompensatedRMSNorm,
    RemovedConstants,
    functional,
    rescale_rms_norm,
    resolved_rms_eps,
)
from srfx.ops.contraction import Contraction
from srfx.ops.elementwise import Random
from srfx.ops.facts import Demand, FactTable, Labeller, Live, collapse
from srfx.ops.movement import Movement
from srfx.ops.registry import op_rule, resolve
from srfx.ops.rule import OpRule
from srfx.ops.sizes import set_argument

aten = torch.ops.aten


class LayerNorm(OpRule):
    """y = (x - mean) / sqrt(var + eps) * gamma + beta over the last axes."""

    signature: tuple[str, ...] = ("input", "normalized_shape", "weight", "bias", "eps")
    centred = True

    # -------------------------------------------------------------- the call
    def x(self, call: Call) -> Value:
        value = call.value("input")
        assert value is not None
        return value

    def axes(self, call: Call) -> list[int]:
        rank, shape = len(call.shape(self.x(call))), call.get("normalized_shape")
        return list(range(rank - (1 if isinstance(shape, int) else len(shape)), rank))

    def axis(self, call: Call, fields: Fields) -> int | None:
        """The one normalised axis that carries channels."""
        tracked = [a for a in self.axes(call) if a in fields]
        return tracked[0] if len(tracked) == 1 else None

    def emits(self, call: Call) -> tuple[str, ...]:
        """What the norm emits already."""
        return tuple(call.get("emits", ()))

    def is_shared(self, call: Call) -> bool:
        """Whether another site uses the same parameters or module: then it cannot be compensated for one."""
        sites = [n for n in call.program.nodes if n.op == "call_module" and n.target == call.node.target]
        params = [call.value(name) for name in ("weight", "bias")]
        return len(sites) > 1 or any(isinstance(p, Param) and p.n_sites > 1 for p in params)

    # -------------------------------------------------------------- labels
    def label(self, call: Call, labels: Labeller) -> Fields:
        x, site = self.x(call), call.node.name
        fields = self._unified(call, labels)
        axis = self.axis(call, fields)
        if axis is None or self.is_shared(call):
            reason = Reason.CHANNEL_MIXING if axis is None else Reason.SHARED_WEIGHT
            labels.pin(x, site, reason, self.axes(call))
            return {a: f for a, f in fields.items() if call.out_shape[a] == call.shape(x)[a]}
        fields[axis] = self._outputs(call, labels, fields[axis], axis)
        return fields

    def _unified(self, call: Call, labels: Labeller) -> Fields:
        x = self.x(call)
        rank = len(call.shape(x))
        operands = [(labels.of(x), call.shape(x))]
        for name in ("weight", "bias"):
            value = call.value(name)
            if value is not None:
                operands.append((labels.of(value), call.shape(value)))
        fields = labels.unify(operands, rank, call.node.name)
        normed = self.axes(call)
        for a, f in fields.items():
            for d in normed:
                if a not in normed and f.shape[d] > 1:
                    labels.table.tie(f, f.narrow(d, 0, 1))
                    f = fields[a] = f.narrow(d, 0, 1)
        return fields

    def _outputs(self, call: Call, labels: Labeller, kept: Tensor, axis: int) -> Tensor:
        """Labels of the result's channels: the operand's, or own ones where statistics may take places."""
        n_emitted = len(self.emits(call))
        if self.is_open(call, labels, kept, axis):
            own = labels.table.fresh(kept.numel()).view(kept.shape)
            labels.table.imply(kept, own)
        else:
            own = kept
        if not n_emitted:
            return own
        extra = labels.table.fresh(n_emitted)
        shape = [n_emitted if d == axis else 1 for d in range(kept.dim())]
        if own is kept:
            labels.table.pin(extra, call.node.name, Reason.NOT_LINEAR_IN_NORM.name)
        return torch.cat(
            [own, extra.view(shape).expand([n_emitted if d == axis else n for d, n in enumerate(own.shape)])],
            axis,
        )

    def is_open(self, call: Call, labels: Labeller, kept: Tensor, axis: int) -> bool:
        """Whether there is one channel vector, and every reader is linear in the result and may change its weight."""
        alone = kept.numel() == kept.shape[axis] and len(self.axes(call)) == 1
        alone = alone and list(labels.of(self.x(call))) == [axis]
        return (
            alone and not self.is_shared(call) and nonlinear_reader(call.node, axis, labels.program) is None
        )

    def _own(self, call: Call, facts: FactTable) -> tuple[int | None, bool]:
        """The channel axis, and whether the result has labels of its own."""
        fields = facts.fields(self.x(call))
        axis = self.axis(call, fields)
        if axis is None or self.is_shared(call) or axis not in facts.fields(call.node):
            return None, False
        return axis, self.is_open(call, facts.labeller, fields[axis], axis)

    # -------------------------------------------------------------- facts
    def _vector(self, call: Call, facts: FactTable, name: str, default: float) -> Tensor:
        value = call.value(name)
        if value is None:
            return torch.tensor(default, dtype=torch.float64)
        return facts.constancy(value).value.double().cpu()

    def forward(self, call: Call, facts: FactTable) -> Constancy:
        c = facts.constancy(self.x(call))
        gamma, beta = self._vector(call, facts, "weight", 1.0), self._vector(call, facts, "bias", 0.0)
        settled = self._of_constants(call, c, gamma, beta)
        if settled is not None:
            return settled
        axis, is_open = self._own(call, facts)
        still = (gamma == 0).view((1,) * (len(call.out_shape) - gamma.dim()) + tuple(gamma.shape))
        value = torch.where(still, beta, 0.0)
        if self.emits(call):
            extra = [len(self.emits(call)) if d == len(call.out_shape) - 1 else 1 for d in range(value.dim())]
            width = call.shape(self.x(call))[-1]
            wide = [width if d == value.dim() - 1 else n for d, n in enumerate(value.shape)]
            still = torch.cat([still.expand(wide), torch.zeros(extra, dtype=torch.bool)], -1)
            value = torch.cat([value.expand(wide), torch.zeros(extra, dtype=torch.float64)], -1)
        affine = self._affine(call, c, gamma, beta, axis) if is_open and axis is not None else None
        return Constancy(~still, value, affine)

    def _of_constants(self, call: Call, c: Constancy, gamma: Tensor, beta: Tensor) -> Constancy | None:
        """The result when nothing that is normalised varies; None when something does, or statistics are emitted."""
        if not c.is_known or self.emits(call) or not gamma.isfinite().all() or not beta.isfinite().all():
            return None
        shape, axes = call.shape(self.x(call)), self.axes(call)
        value = c.value.double().cpu()
        value = value.expand([shape[a] if a in axes else n for a, n in enumerate(value.shape)])
        y = self._normalised(call, value, axes) * gamma + beta
        return Constancy.known(y) if bool(y.isfinite().all()) else None

    def _normalised(self, call: Call, value: Tensor, axes: list[int]) -> Tensor:
        """Return (x - mu) r over these axes and the constants removed before."""
        gone = self._before(call)
        total = torch.Size(value.shape[a] for a in axes).numel() + gone.n_values
        mean = (value.sum(axes, keepdim=True) + gone.sum) / total
        square = (
            ((value - mean) ** 2).sum(axes, keepdim=True) + gone.m2 + gone.n_values * (gone.mean - mean) ** 2
        )
        deviation: Tensor = (square / total + call.get("eps", 1e-5)).sqrt()
        return (value - mean) / deviation

    def _affine(self, call: Call, c: Constancy, gamma: Tensor, beta: Tensor, axis: int) -> Affine:
        width, n_extra = call.shape(self.x(call))[axis], len(self.emits(call))
        flat = [width if d == axis else 1 for d in range(c.varies.dim())]
        varies, value = c.varies.cpu().expand(flat).flatten(), c.value.double().cpu().expand(flat).flatten()
        gamma, beta = gamma.expand(width), beta.expand(width)
        mask = ~varies & (gamma != 0) & (self.centred | (value != 0))
        mask, value, gamma, beta = (F.pad(v, (0, n_extra)) for v in (mask, value, gamma, beta))
        return Affine(call.node, axis, mask, value, gamma, beta, self.centred)

    def shift(self, call: Call, constants: Tensor) -> float:
        """Choose c of the emitted (mu - c) r: near the constants that readers take from it; their value, if it is one.

        Then the coefficients of r are small, or all 0.
        """
        if not self.centred:
            return 0.0
        if "mu_r" in self.emits(call):
            return float(call.get("emit_shift", 0.0))
        if not constants.numel():
            return 0.0
        first = constants[0]
        return float(first if bool((constants == first).all()) else constants.mean())

    def backward(self, call: Call, live: Live, facts: FactTable) -> Demand:
        assert isinstance(live, Tensor)
        x = self.x(call)
        c, axes = facts.constancy(x), self.axes(call)
        axis, is_open = self._own(call, facts)
        truly, rows = live, live
        for d in axes:
            rows = rows.any(d, keepdim=True)
        if call.get("eps", 1e-5) == 0.0:
            rows = torch.ones_like(rows)  # a partial function: no leftover may come in (theory: Lemma E4)
        if axis is not None:
            width = call.shape(x)[axis]
            truly = live.expand(
                [call.out_shape[axis] if d == axis else n for d, n in enumerate(live.shape)]
            ).narrow(axis, 0, width)
            places = [at for at in facts.emitted.get(call.node, {}).values() if at < width]
            if places:
                truly = truly.index_fill(axis, torch.tensor(places), False)
        wanted = rows & (c.varies.cpu() | facts.kept_channels(x))
        if axis is not None:
            self._refuse(call, facts, axis, is_open, truly & ~c.varies.cpu())
            wanted = wanted | truly | (rows & ~self._absorbable(call, facts, c, axis))
        else:
            self._refuse_all(call, facts)
            wanted = rows
        return {x: collapse(wanted & torch.ones(facts.layout(x), dtype=torch.bool), facts.layout(x))}

    def _refuse_all(self, call: Call, facts: FactTable) -> None:
        reason = Reason.SHARED_WEIGHT if self.is_shared(call) else Reason.CHANNEL_MIXING
        facts.refuse_constants(call.node, self.x(call), self.axes(call), reason)

    def _refuse(self, call: Call, facts: FactTable, axis: int, is_open: bool, staying: Tensor) -> None:
        """Say why constant channels stay: who reads them as they are, or what no statistics are made for."""
        if not bool(staying.any()) or (is_open and call.node not in facts.closed):
            return
        reader = nonlinear_reader(call.node, axis, facts.program)
        if reader is not None:
            facts.refuse(call.node, Reason.NOT_LINEAR_IN_NORM, f"{reader.name} reads it")
        elif not is_open:
            facts.refuse(call.node, Reason.CHANNEL_MIXING, "no statistics are emitted along several axes")

    def _absorbable(self, call: Call, facts: FactTable, c: Constancy, axis: int) -> Tensor:
        """Channels whose constant every outer position has alike: 0 where the rows keep different channels."""
        if facts.fields(self.x(call))[axis].numel() != call.shape(self.x(call))[axis]:
            return c.is_constant(0).cpu()
        alike = c.settle([axis])
        return ~alike.varies.cpu()

    def sustain(self, call: Call, facts: FactTable) -> Tensor | None:
        """A channel of the result that is kept, and is no statistic, needs its channel of the operand."""
        axis, is_open = self._own(call, facts)
        if axis is None or not is_open:
            return None
        x, width = self.x(call), call.shape(self.x(call))[axis]
        kept = facts.is_kept(facts.fields(call.node)[axis]).flatten()[:width].clone()
        places = [at for at in facts.emitted.get(call.node, {}).values() if at < width]
        kept[places] = False
        return facts.fields(x)[axis].flatten()[kept]

    def choose_shift(self, call: Call, facts: FactTable, gone: Tensor) -> None:
        """Choose the c of (mu - c) r for the channels [C] that readers take from the statistics."""
        affine = facts.constancy(call.node).affine
        assert affine is not None
        facts.shifts[call.node] = self.shift(call, affine.value[gone])

    def place(self, call: Call, facts: FactTable, names: set[str], gone: Tensor) -> bool:
        """Choose where the statistics in ``names`` travel; True when the choice is new."""
        axis, is_open = self._own(call, facts)
        if axis is None or not is_open or call.node in facts.closed:
            return False
        x, width = self.x(call), call.shape(self.x(call))[axis]
        stays = facts.is_kept(facts.fields(x)[axis]).flatten()
        places = {name: width + i for i, name in enumerate(self.emits(call))}
        before = facts.emitted.get(call.node)
        if (
            before is not None
            and names <= set(before)
            and not any(bool(stays[at]) for at in before.values() if at < width)
        ):
            return False
        new = [name for name in EMITS if name in names and name not in places]
        free = (gone[:width] & ~stays).nonzero().flatten().tolist() if gone.numel() else []
        if len(free) < len(new):
            facts.refuse(call.node, Reason.GROWS, f"{len(new)} statistics would replace {len(free)} channels")
            facts.closed.add(call.node)
            new = []
        facts.emitted[call.node] = {**places, **dict(zip(new, free, strict=False))}
        self._rank(call, facts, axis)
        return before != facts.emitted[call.node] or call.node in facts.closed

    def _rank(self, call: Call, facts: FactTable, axis: int) -> None:
        own = facts.classes.representative[facts.fields(call.node)[axis].flatten()]
        facts.ranks[own] = 0
        for name, at in facts.emitted[call.node].items():
            facts.ranks[own[at]] = 1 + EMITS.index(name)

    # -------------------------------------------------------------- edits
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

    def _before(self, call: Call) -> RemovedConstants:
        if isinstance(call.module, CompensatedLayerNorm):
            return call.module.removed
        if "n_total" in call.bound:
            n = call.get("n_total") - torch.Size(call.get("normalized_shape")).numel()
            return RemovedConstants(n, call.get("removed_mean", 0.0), call.get("removed_m2", 0.0))
        return RemovedConstants()


op_rule(
    nn.LayerNorm, F.layer_norm, torch.layer_norm, aten.layer_norm.default, CompensatedLayerNorm,
    (functional.compensated_layer_norm,
     "input normalized_shape n_total removed_mean removed_m2 weight bias eps emits emit_shift"),
)(LayerNorm)  # fmt: skip


def _ref(call: Call, name: str) -> Any:
    raw = call.bound.get(name)
    return Ref(raw.name) if isinstance(raw, fx.Node) else raw


def nonlinear_reader(node: fx.Node, axis: int, program: Program) -> fx.Node | None:
    """What reads ``node`` along ``axis`` and is no contraction with a private weight; None when all readers are."""
    for user in node.users:
        found = _nonlinear(user, node, axis, program)
        if found is not None:
            return found
    return None


def _nonlinear(user: fx.Node, node: fx.Node, axis: int, program: Program) -> fx.Node | None:
    if user.op == "output":
        return user
    rule, call = resolve(user, program)
    if isinstance(rule, Contraction):
        if rule.refused(call) is not None or rule.x(call) is not node or rule.channel_axis(call) != axis:
            return user
        tensors = [call.value(n) for n in ("weight", "bias")]
        is_shared = any(isinstance(t, Param) and t.n_sites > 1 for t in tensors)
        return user if rule.groups(call) > 1 or not rule.takes_statistics or is_shared else None
    if isinstance(rule, Movement) and rule.is_followed(call) and rule.source(call) is node:
        there = follow(rule.steps(call), axis)
        return user if there is None else nonlinear_reader(user, there, program)
    if isinstance(rule, Random) and not rule.is_active(call):
        return nonlinear_reader(user, axis, program)
    return user if program.is_tensor(user) else None


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
        width = found.varies.shape[-1]
        if zero.shape[-1] not in (1, width) and width > 1:
            zero = F.pad(zero, (0, width - zero.shape[-1]))
        return Constancy(found.varies & ~zero, torch.where(zero, 0.0, found.value), found.affine)

    def rewrite(
        self,
        call: Call,
        facts: FactTable,
        shape: list[int],
        gone: Tensor,
        repeat: int,
        emits: tuple[str, ...],
    ) -> Iterable[GraphEdit]:
        removed = RemovedConstants.from_values(gone, repeat=repeat)
        squares = self._squares(call) + removed.sum_squares
        n_kept = torch.Size(shape).numel()
        n_total = self._total(call) or n_kept + removed.n_values
        if emits or len(shape) > 1 or self._total(call):
            return self._compensated(call, shape, n_total, squares, emits)
        dtype = call.output.dtype
        eps = resolved_rms_eps(call.get("eps"), dtype)
        weight = call.value("weight")
        if weight is None or not isinstance(weight, Param):
            return self._compensated(call, shape, n_total, squares, emits)
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
        self, call: Call, shape: list[int], n_total: int, squares: float, emits: tuple[str, ...]
    ) -> Iterable[GraphEdit]:
        if call.module is not None:
            affine = call.get("weight") is not None
            module = CompensatedRMSNorm(
                shape[-1], n_total, squares, eps=call.get("eps"), elementwise_affine=affine, emits=emits
            )
            return [ReplaceModule(call.node.name, module, ("weight",) if affine else ())]
        args = (Ref(call["input"].name), tuple(shape), n_total, squares)
        kwargs = {"weight": _ref(call, "weight"), "eps": call.get("eps"), "emits": emits}
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
    (functional.compensated_rms_norm, "input normalized_shape n_total removed_sum_squares weight eps emits"),
)(RMSNorm)  # fmt: skip


class GroupNorm(OpRule):
    """y = (x - mean_g) / sqrt(var_g + eps) * gamma + beta, statistics over the channels of a group and all positions.

    A constant channel may go when nobody reads its output, or its gamma is 0.
    """

    signature: tuple[str, ...] = ("input", "num_groups", "weight", "bias", "eps")

    def x(self, call: Call) -> Value:
        value = call.value("input")
        assert value is not None
        return value

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
        moving = torch.zeros(int(groups.max()) + 1).index_add(0, groups, varies.float()) > 0
        value = self._normalised(call, c.value.double().cpu().flatten().expand(groups.numel())).view(
            [-1 if a == 1 else 1 for a in range(gamma.dim())]
        )
        still = ~moving[groups].view(value.shape) & value.isfinite()
        result = torch.where(still, value, 0.0) * gamma + beta
        is_constant = still | (gamma == 0)
        return Constancy(~is_constant, torch.where(is_constant, result, 0.0))

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
