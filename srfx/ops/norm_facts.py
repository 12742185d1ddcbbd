"""Norms over channels: layer norm, RMS norm, group norm, and their compensated forms (theory: Lemmas N1 to N9).

A norm's statistics run over all channels, so a varying channel is live as soon as any output is.  A constant one may
go: the compensated norm remembers its share.  Its output, though, still varies with the statistics; linear readers
take these instead (`srfx.lattice.constancy.Affine`), all other readers keep the channel.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from srfx.ir.call import Call
from srfx.ir.plan import Reason
from srfx.ir.program import Param, Value
from srfx.lattice.constancy import EMITS, Affine, Constancy
from srfx.lattice.movement import Fields
from srfx.nn import (
    CompensatedLayerNorm,
    RemovedConstants,
)
from srfx.ops.facts import Demand, FactTable, Labeller, Live, collapse
from srfx.ops.norm_readers import nonlinear_reader
from srfx.ops.rule import OpRule


class NormFacts(OpRule):
    """What a norm over the last axes reads, what is constant behind it, and where its statistics travel."""

    signature: tuple[str, ...] = ("input", "normalized_shape", "weight", "bias", "eps")
    centred = True

    # -------------------------------------------------------------- the call
    def is_even(self, call: Call) -> bool:
        return True

    def x(self, call: Call) -> Value:
        return call.operand("input")

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

    def outputs(self, call: Call) -> Tensor:
        """Channels of the operand that come out, in this order, [M]: all of them unless the call says which."""
        stored = call.value("outputs")
        if isinstance(stored, Param):
            return stored.tensor.detach().cpu().long()
        return torch.arange(call.shape(self.x(call))[-1])

    def is_shared(self, call: Call) -> bool:
        """Whether another site uses the same parameters or module: then it cannot be compensated for one."""
        sites = [n for n in call.program.nodes if n.op == "call_module" and n.target == call.node.target]
        params = [call.value(name) for name in ("weight", "bias")]
        return len(sites) > 1 or any(isinstance(p, Param) and p.n_sites > 1 for p in params)

    # -------------------------------------------------------------- labels
    def label(self, call: Call, labels: Labeller) -> Fields:
        x, site = self.x(call), call.node.name
        if self.is_separate(call, labels):
            return self._own_fields(call, labels)
        if self.emits(call) or call.value("outputs") is not None:  # where its statistics go is not known here
            for value in call.values():
                labels.pin(
                    value, site, Reason.SHARED_WEIGHT if self.is_shared(call) else Reason.CHANNEL_MIXING
                )
            return {}
        fields = self._unified(call, labels)
        axis = self.axis(call, fields)
        if axis is None or self.is_shared(call):
            reason = Reason.CHANNEL_MIXING if axis is None else Reason.SHARED_WEIGHT
            labels.pin(x, site, reason, self.axes(call))
            return {a: f for a, f in fields.items() if call.out_shape[a] == call.shape(x)[a]}
        return fields

    def is_separate(self, call: Call, labels: Labeller) -> bool:
        """Whether the result's channels may be fewer than the operand's: one channel vector, stored scale and shift."""
        fields, axis = labels.of(self.x(call)), len(call.out_shape) - 1
        alone = list(fields) == [axis] == self.axes(call) and fields[axis].numel() == fields[axis].shape[axis]
        affine = [v for v in (call.value("weight"), call.value("bias")) if v is not None]
        width = self.outputs(call).numel() if alone else 0
        return (
            alone
            and not self.is_shared(call)
            and all(isinstance(v, Param) and v.shape == (width,) for v in affine)
        )

    def is_open(self, call: Call, labels: Labeller) -> bool:
        """Whether every reader is linear in the result and may change its weight: then it takes statistics."""
        axis, n_emitted = len(call.out_shape) - 1, len(self.emits(call))
        return (
            self.is_separate(call, labels)
            and nonlinear_reader(call.node, axis, labels.program, n_emitted) is None
        )

    def _own_fields(self, call: Call, labels: Labeller) -> Fields:
        """Labels of their own: a channel that is kept needs its operand's, or is the place of a statistic."""
        axis, sources = len(call.out_shape) - 1, self.sources(call, labels)
        own, n_emitted = labels.table.fresh(sources.numel()), len(self.emits(call))
        plain = labels.table.fresh(sources.numel())  # written, and no statistic
        labels.table.equate(plain, [own, sources])
        for name in ("weight", "bias"):
            value = call.value(name)
            if value is not None:
                labels.table.tie(labels.of(value)[0], plain)
                labels.followers.add(value)
        is_open = self.is_open(call, labels)
        if is_open and own.numel():  # none where statistics alone come out
            labels.bind(own, plain)
        stored = call.value("outputs")
        if stored is not None:
            labels.pin(stored, call.node.name, Reason.CONSTANT_TABLE)
        if n_emitted:
            extra = labels.table.fresh(n_emitted)
            if not is_open:
                labels.table.pin(extra, call.node.name, Reason.NOT_LINEAR_IN_NORM.name)
            own = torch.cat([own, extra])
        return {axis: own.view([-1 if d == axis else 1 for d in range(axis + 1)])}

    def sources(self, call: Call, labels: Labeller) -> Tensor:
        """Label of the operand's channel behind each channel of the result, [M]."""
        return labels.of(self.x(call))[len(call.out_shape) - 1].flatten()[self.outputs(call)]

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

    def _own(self, call: Call, facts: FactTable) -> tuple[int | None, bool]:
        """The channel axis, and whether the result has labels of its own."""
        if self.is_separate(call, facts.labeller):
            return len(call.out_shape) - 1, True
        axis = self.axis(call, facts.fields(self.x(call)))
        if axis is None or self.is_shared(call) or axis not in facts.fields(call.node):
            return None, False
        return axis, False

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
        is_lone = self._is_lone(call)
        still = ((gamma == 0) | is_lone).view((1,) * (len(call.out_shape) - gamma.dim()) + tuple(gamma.shape))
        value = torch.where(still, beta, 0.0)
        if self.emits(call):
            extra = [len(self.emits(call)) if d == len(call.out_shape) - 1 else 1 for d in range(value.dim())]
            width = self.outputs(call).numel()
            wide = [width if d == value.dim() - 1 else n for d, n in enumerate(value.shape)]
            still = torch.cat([still.expand(wide), torch.zeros(extra, dtype=torch.bool)], -1)
            value = torch.cat([value.expand(wide), torch.zeros(extra, dtype=torch.float64)], -1)
        is_open = self.is_open(call, facts.labeller) and not is_lone
        return Constancy(~still, value, self._affine(call, facts, gamma, beta) if is_open else None)

    def _is_lone(self, call: Call) -> bool:
        """Whether one number is normalised, which is its own mean."""
        shape = call.shape(self.x(call))
        size = math.prod(shape[a] for a in self.axes(call))
        return self.centred and not self.emits(call) and size + self._before(call).n_values == 1

    def _of_constants(self, call: Call, c: Constancy, gamma: Tensor, beta: Tensor) -> Constancy | None:
        """The result when nothing that is normalised varies; None when something does, or statistics are emitted."""
        if not c.is_known or self.emits(call) or not gamma.isfinite().all() or not beta.isfinite().all():
            return None
        shape, axes = call.shape(self.x(call)), self.axes(call)
        value = c.value.double().cpu()
        value = value.expand([shape[a] if a in axes else n for a, n in enumerate(value.shape)])
        y = self._normalised(call, value, axes)
        if call.value("outputs") is not None:
            y = y.index_select(-1, self.outputs(call))
        y = y * gamma + beta
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

    def _affine(self, call: Call, facts: FactTable, gamma: Tensor, beta: Tensor) -> Affine:
        c = facts.constancy(self.x(call))
        axis, n_extra, outputs = c.varies.dim() - 1, len(self.emits(call)), self.outputs(call)
        flat = [call.shape(self.x(call))[axis] if d == axis else 1 for d in range(axis + 1)]
        varies = c.varies.cpu().expand(flat).flatten()[outputs]
        value = c.value.double().cpu().expand(flat).flatten()[outputs]
        gamma, beta = gamma.expand(outputs.numel()), beta.expand(outputs.numel())
        mask = ~varies & (gamma != 0) & (self.centred | (value != 0))
        labels = self.sources(call, facts.labeller)
        mask, value, gamma, beta, labels = (
            F.pad(v, (0, n_extra)) for v in (mask, value, gamma, beta, labels)
        )
        return Affine(call.node, axis, mask, value, gamma, beta, labels, self.centred)

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
        axis, has_own = self._own(call, facts)
        truly, rows = live, live
        for d in axes:
            rows = rows.any(d, keepdim=True)
        if call.get("eps", 1e-5) == 0.0:
            rows = torch.ones_like(rows)  # a partial function: no leftover may come in (theory: Lemma E4)
        if axis is not None:
            truly = live.expand([call.out_shape[axis] if d == axis else n for d, n in enumerate(live.shape)])
            if has_own:
                truly = self._of_operand(call, self._plain(call, facts, truly.flatten())).view(
                    [-1 if d == axis else 1 for d in range(axis + 1)]
                )
        wanted = rows & (c.varies.cpu() | facts.kept_channels(x))
        if axis is not None:
            self._refuse(call, facts, axis, truly & ~c.varies.cpu())
            wanted = wanted | truly | (rows & ~self._absorbable(call, facts, c, axis))
        else:
            self._refuse_all(call, facts)
            wanted = rows
        return {x: collapse(wanted & torch.ones(facts.layout(x), dtype=torch.bool), facts.layout(x))}

    def _plain(self, call: Call, facts: FactTable, marked: Tensor) -> Tensor:
        """Of marked channels of the result those that no statistic travels in, [M]."""
        width = self.outputs(call).numel()
        plain = marked[:width].clone()
        plain[[at for at in facts.emitted.get(call.node, {}).values() if at < width]] = False
        return plain

    def _of_operand(self, call: Call, marked: Tensor) -> Tensor:
        """Channels of the operand behind marked channels of the result, [C] bool."""
        found = torch.zeros(call.shape(self.x(call))[-1], dtype=torch.bool)
        found[self.outputs(call)[marked]] = True
        return found

    def _refuse_all(self, call: Call, facts: FactTable) -> None:
        reason = Reason.SHARED_WEIGHT if self.is_shared(call) else Reason.CHANNEL_MIXING
        facts.refuse_constants(call.node, self.x(call), self.axes(call), reason)

    def _refuse(self, call: Call, facts: FactTable, axis: int, staying: Tensor) -> None:
        """Say why constant channels stay: who reads them as they are, or what no statistics are made for."""
        is_open = self.is_open(call, facts.labeller)
        if not bool(staying.any()) or (is_open and call.node not in facts.closed):
            return
        reader = nonlinear_reader(call.node, axis, facts.program, len(self.emits(call)))
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
        axis, has_own = self._own(call, facts)
        if axis is None or not has_own:
            return None
        own, sources = facts.fields(call.node)[axis].flatten(), self.sources(call, facts.labeller)
        needed = sources[self._plain(call, facts, facts.is_kept(own))]
        if call.node not in facts.whole:
            return needed
        return torch.cat([needed, own[: sources.numel()][facts.is_kept(sources)]])

    def left_out(self, call: Call, facts: FactTable) -> Tensor | None:
        """Labels of the result's channels that are not kept though their operand's are; None when no call selects.

        A call that selects channels already may as well select fewer.
        """
        axis, has_own = self._own(call, facts)
        if axis is None or not has_own or call.value("outputs") is not None or call.node in facts.whole:
            return None
        own = facts.fields(call.node)[axis].flatten()[: self.outputs(call).numel()]
        left = own[facts.is_kept(self.sources(call, facts.labeller)) & ~facts.is_kept(own)]
        return torch.cat([left, facts.labeller.bound(left)])  # columns of bound readers too

    def choose_shift(self, call: Call, facts: FactTable, gone: Tensor) -> None:
        """Choose the c of (mu - c) r for the channels [C] that readers take from the statistics."""
        affine = facts.constancy(call.node).affine
        assert affine is not None
        facts.shifts[call.node] = self.shift(call, affine.value[gone])

    def place(
        self, call: Call, facts: FactTable, names: set[str], gone: Tensor, makes_bias: bool = False
    ) -> bool:
        """Choose where the statistics in ``names`` travel; True when the choice is new.

        Readers lose a column for each channel that goes, and get one for each new statistic, and a bias if
        ``makes_bias``: no channel goes where that is more (theory: Lemma N6).
        """
        if not self.is_open(call, facts.labeller) or call.node in facts.closed:
            return False
        axis, width = len(call.out_shape) - 1, self.outputs(call).numel()
        stays = facts.is_kept(self.sources(call, facts.labeller))
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
        if len(free) < len(new) + makes_bias:
            added = f"statistics {new}{' and a bias' * makes_bias}"
            facts.refuse(call.node, Reason.GROWS, f"{added} would replace {len(free)} of the channels")
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

    def _before(self, call: Call) -> RemovedConstants:
        if isinstance(call.module, CompensatedLayerNorm):
            return call.module.removed
        if "n_total" in call.bound:
            n = call.get("n_total") - torch.Size(call.get("normalized_shape")).numel()
            return RemovedConstants(n, call.get("removed_mean", 0.0), call.get("removed_m2", 0.0))
        return RemovedConstants()
