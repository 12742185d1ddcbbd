"""Contractions with a known weight: how they are folded and cut.  `ContractionFacts` says what they read."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, fx

from srfx.ir.call import Call
from srfx.ir.editor import GraphEdit, same_numbers
from srfx.ir.edits import AddLinear, NarrowOperand, SetArgument, SetTensor
from srfx.ir.program import Param
from srfx.lattice.constancy import EMITS
from srfx.ops.contraction_facts import ContractionFacts
from srfx.ops.facts import FactTable
from srfx.ops.matrix_form import columns_read, flat_positions
from srfx.ops.rule import Shifted


class Contraction(ContractionFacts):
    """y = W x + b by channels; subclasses say how the weight is laid out and what a constant meets."""

    def fold(self, call: Call, facts: FactTable) -> Iterable[GraphEdit]:
        private = self.is_private(call, facts)
        calls = (call,) if private else facts.siblings.get(call.node, ())
        if self.refused(call) is not None or not calls:
            return []
        c, varies, value = self._operand(call, facts)
        varies, value = flat_positions(varies)[0], flat_positions(value)[0]
        # [G, C]: the constants that go have no outer positions
        still = ~varies if private else self.agreed(call, facts)
        rows, wanted = self._needs(calls, facts)
        reads = self._reads(call, facts)
        read = columns_read(rows, reads)
        absorbed = torch.where(read & still & ~wanted, value, 0.0)
        gone = self._combinable(call, facts, c) if private else None
        gone = (
            (gone.flatten(0, -2).any(0) & read[0]) if gone is not None else torch.zeros(0, dtype=torch.bool)
        )
        edits: list[GraphEdit] = []
        w, shift = self.w(call), torch.zeros(rows.shape, dtype=torch.float64)
        assert isinstance(w, Param)
        weight = w.tensor.detach()
        carried = self.has_border(call) and bool((absorbed != 0).any())
        is_more = bool((read & ~wanted).any()) or bool(columns_read(~rows, reads).any())
        is_changed = carried or is_more or bool(gone.any())
        if is_changed and call.node is self._writer(calls, facts):
            used = rows.unsqueeze(2) & wanted.unsqueeze(1)  # [G, R, C]
            mask = self.unmatrix(call, used.to(weight.device), weight)
            new = torch.where(mask, weight, 0).contiguous()  # `matrix` has to be a view
            if carried:
                new = new + self._carry(call, facts, weight, absorbed[0], value[0], rows[0])
            if bool(gone.any()):
                shift = self._take_statistics(call, facts, new, gone, rows[0])
            edits.append(SetTensor(call.node.name, "weight", tuple(w.names), new))
        if not self.has_border(call):
            shift = shift + self._fold_value(call, absorbed)
        if private:
            facts.cache.pop(self._reads_key(call), None)  # a byte for each weight, not needed any more
        return edits + self._fold_bias(call, shift, rows)

    def _needs(self, calls: Iterable[Call], facts: FactTable) -> tuple[Tensor, Tensor]:
        """Rows that are live at some of the calls that share a weight, [G, R], and columns that some reads, [G, C]."""
        rows, wanted = [], []
        for call in calls:
            live = facts.liveness(call.node)
            rows.append(flat_positions(self._rows_by_group(call, live)).any(0))
            wanted.append(flat_positions(self._wanted(call, live, facts)).any(0))
        return torch.stack(rows).any(0), torch.stack(wanted).any(0)

    def _writer(self, calls: tuple[Call, ...], facts: FactTable) -> fx.Node | None:
        """The one call that brings the new weight: the first of which anything is needed, or the only one."""
        needed = (call.node for call in calls if bool(facts.liveness(call.node).any()))
        return next(needed, calls[0].node if len(calls) == 1 else None)

    def _take_statistics(
        self, call: Call, facts: FactTable, new: Tensor, gone: Tensor, rows: Tensor
    ) -> Tensor:
        """Write the statistics' columns into the new weight; returns what goes to the bias, [1, R]."""
        affine = self.known(call, facts).affine
        assert affine is not None
        columns = self._combine(call, gone, affine, facts) * rows.view(1, -1, 1)
        m, to_bias = self.matrix(call, new), not self._carries_one(call, facts)
        for name, column in zip(EMITS, columns, strict=True):
            at = facts.emitted.get(affine.norm, {}).get(name)
            if at is not None:
                column = torch.zeros_like(column) if name == "one" and to_bias else column
                before = (
                    0.0 if bool(affine.mask[at]) else m[0, :, at].double().cpu()
                )  # the norm emitted it already
                m[0, :, at] = (before + column).to(new)
        return (
            columns[2].sum(-1).unsqueeze(0) if to_bias else torch.zeros(1, rows.numel(), dtype=torch.float64)
        )

    def _carry(
        self, call: Call, facts: FactTable, weight: Tensor, absorbed: Tensor, value: Tensor, rows: Tensor
    ) -> Tensor:
        """Sum_c (k_c / k_0) W[:, c] at the carrier's column, zero elsewhere; computed in float64."""
        carrier = facts.carriers[self.x(call)]
        m = self.matrix(call, weight)[0]  # [R, C, taps]
        columns = (absorbed != 0).nonzero().flatten()
        ratio = (absorbed[columns] / value[carrier]).to(m.device)
        moved = (m.index_select(1, columns.to(m.device)).double() * ratio.view(1, -1, 1)).sum(1) * rows.to(
            m
        ).view(-1, 1)
        new = torch.zeros_like(weight, memory_format=torch.contiguous_format)
        self.matrix(call, new)[0, :, carrier] = moved.to(weight.dtype)
        return new

    def shifted(self, call: Call, axis: int, shift: Tensor) -> list[Shifted]:
        is_row = self.refused(call) is None and axis == self.channel_axis(call)
        if not is_row or self.is_shared(call) or not self.has_own_bias(call) or "bias" not in call.signature:
            return []
        if call.value("bias") is None and call.program.has_attribute(call.slot("bias")):
            return []
        groups = shift.view(self.groups(call), -1)
        return [Shifted(tuple(self._fold_bias(call, groups, torch.ones_like(groups, dtype=torch.bool))))]

    def _fold_bias(self, call: Call, shift: Tensor, rows: Tensor) -> list[GraphEdit]:
        """The bias edit for an addition ``shift`` [G, R]; rows that are not live get 0."""
        bias, w = call.value("bias"), self.w(call)
        assert isinstance(w, Param)
        if bias is None:
            shift = torch.where(rows, shift, 0.0).flatten()
            if not bool((shift != 0).any()):
                return []
            new = shift.to(w.tensor)
            return [
                SetTensor(
                    call.node.name,
                    "bias",
                    (call.slot("bias"),),
                    new,
                    True,
                    w.tensor.requires_grad,
                    call.signature,
                )
            ]
        if not isinstance(bias, Param) or bias.tensor.dim() != 1:
            return []
        old = bias.tensor.detach()
        folded = (old.double().cpu() + shift.flatten()).to(old)
        new = torch.where(rows.flatten().to(old.device), folded, 0.0)
        return [] if same_numbers(new, old) else [SetTensor(call.node.name, "bias", tuple(bias.names), new)]

    def compact(self, call: Call, facts: FactTable) -> Iterable[GraphEdit]:
        if self.refused(call) is not None:
            return []
        return [*self.resize(call, facts), *self._leave_statistics(call, facts)]

    def _leave_statistics(self, call: Call, facts: FactTable) -> list[GraphEdit]:
        """A bound call reads what stands in front of the statistics, and these, if it may, by a matrix of its own."""
        x, axis = self.x(call), self.channel_axis(call)
        own, bound = facts.fields(x), self.operand(call, facts.labeller)
        if bound is own or facts.count(own, axis) == facts.count(bound, axis):
            return []
        name, operand, dim = call.node.name, call["input"].name, axis - len(call.shape(x))
        n_channels = facts.count(bound, axis)
        first = NarrowOperand(name, operand, dim, n_channels)
        found = self._own_matrix(call, facts)
        if found is None:
            return [first]
        weight, bias = found
        assert facts.count(own, axis) - n_channels == weight.shape[1]
        w = self.w(call)
        assert isinstance(w, Param)
        return [first, AddLinear(name, operand, dim, n_channels, weight, bias, w.tensor.requires_grad)]

    def _own_matrix(self, call: Call, facts: FactTable) -> tuple[Tensor, Tensor | None] | None:
        """Columns for all statistics of the norm, and a bias, in place of channels that a bound call does not read."""
        taken, affine = self.taken(call, facts), self.known(call, facts).affine
        if taken is None or affine is None:
            return None
        live = self._rows_by_group(call, facts.liveness(call.node)).flatten(0, -2).any(0)
        columns = self._combine(call, taken[1], affine, facts)[..., 0] * live  # [3, R]
        kept = facts.is_kept(facts.fields(self.x(call))[self.channel_axis(call)]).flatten()
        names = [n for n in EMITS if n in facts.emitted[affine.norm] and kept[facts.emitted[affine.norm][n]]]
        w, rows = self.w(call), facts.index(facts.fields(call.node), self.channel_axis(call))
        assert isinstance(w, Param)
        columns = columns[:, rows]
        bias = None if affine.bordered or not bool(columns[2].any()) else columns[2].to(w.tensor, copy=True)
        if bias is not None:
            columns[2] = 0
        return columns[[EMITS.index(n) for n in names]].t().contiguous().to(w.tensor), bias

    def module_widths(self, call: Call, facts: FactTable, *names: str) -> list[GraphEdit]:
        """Edits of a module's width attributes (operand, result), where they change."""
        return [
            SetArgument(call.node.name, name, width)
            for name, width in zip(names, self.widths(call, facts), strict=True)
            if call.get(name) != width
        ]

    def widths(self, call: Call, facts: FactTable) -> tuple[int, int]:
        """Channels that stay in the operand and in the result."""
        x, axis = self.x(call), self.channel_axis(call)
        fields = self.operand(call, facts.labeller)
        before = facts.count(fields, axis) if axis in fields else call.shape(x)[axis]
        return before, facts.count(facts.fields(call.node), axis)
