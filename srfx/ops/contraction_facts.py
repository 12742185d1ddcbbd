"""Contractions with a known weight: linear, matmul with a parameter, and every convolution.

All of them are, seen by channels, y[r] = sum_c W[r, c, taps] x[c] + b[r] in G groups.  The weight is viewed as
M [G, R, C, taps] (R outputs and C inputs of a group), and everything below is said once for that form.

    constant   y[r] is, when W[r, c] = 0 for every c that varies            (theory: Lemma L1)
    live       x[c] is, when it varies and some live row reads it; constants are folded into the bias (L2, L3, L6)
    border     where the reader does not see a constant alike at every position (zero padding, transposed stride), all
               nonzero constants of the operand are carried by one of them   (theory: Lemma L4)
"""

from __future__ import annotations

import torch
from torch import Tensor, fx

from srfx.ir.call import Call
from srfx.ir.plan import Reason
from srfx.ir.program import Param, Value, rows_at_once
from srfx.lattice.constancy import EMITS, Affine, Constancy
from srfx.lattice.movement import Fields
from srfx.ops.contraction_call import ContractionCall
from srfx.ops.facts import Demand, FactTable, Labeller, Live, collapse
from srfx.ops.matrix_form import columns_read, flat_positions, marked_at, nonzero, rows_reading, split_axis
from srfx.ops.rule import PortSite


class ContractionFacts(ContractionCall):
    """What a contraction reads and makes constant."""

    # -------------------------------------------------------------- operands
    def agreed(self, call: Call, facts: FactTable) -> Tensor:
        """Channels that are one and the same constant at all sites of a shared weight, [G, C]: all take it alike."""
        calls, w = facts.siblings.get(call.node), self.w(call)
        if calls is None:
            return torch.zeros(1, 1, dtype=torch.bool)
        assert isinstance(w, Param)
        key = (id(w.tensor), self.groups(call), self.row_axis(call), len(calls))
        if key not in facts.cache:
            facts.cache[key] = self._agree(calls, facts)
        return facts.cache[key]

    def _agree(self, calls: tuple[Call, ...], facts: FactTable) -> Tensor:
        found, values = torch.ones(1, 1, dtype=torch.bool), []
        for call in calls:
            x, axis, c = self.x(call), self.channel_axis(call), self.known(call, facts)
            if any(n > 1 for a, n in enumerate(facts.layout(x)) if a != axis):
                return torch.zeros(1, 1, dtype=torch.bool)
            value = flat_positions(self._by_group(call, c.value.double().cpu()))[0]
            found = found & ~flat_positions(self._by_group(call, c.varies.cpu()))[0]
            found = found & (value == 0) if self.has_border(call) else found
            values.append(value)
        return found & torch.stack([value == values[0] for value in values]).all(0)

    def sustain(self, call: Call, facts: FactTable) -> Tensor | None:
        """What a bound call reads is a channel of the norm's operand: it may not become a statistic's place."""
        live, axis = facts.live.get(call.node), self.channel_axis(call)
        if self.refused(call) is not None or not isinstance(live, Tensor):
            return None
        labels = self.operand(call, facts.labeller).get(axis)
        if labels is None or labels is facts.fields(self.x(call))[axis]:
            return None
        return labels.flatten()[self._channels(call, live, facts).flatten(0, -2).any(0)]

    def ports(self, call: Call, facts: FactTable) -> list[PortSite]:
        """The operand; constants that meet a border in a grouped convolution have to be there, from anywhere."""
        x = call.value("input")
        if self.refused(call) is not None or not isinstance(x, fx.Node):
            return []
        is_single = self.groups(call) == 1
        if is_single and self.is_bound(call) and self.taken(call, facts) is not None:
            return []  # it takes statistics beside its operand
        return [PortSite(x, self.channel_axis(call), not is_single, is_single and self.is_bound(call))]

    # -------------------------------------------------------------- labels
    def label(self, call: Call, labels: Labeller) -> Fields | tuple[Fields, ...]:
        reason = self.refused(call)
        if reason is not None:
            labels.refuse(call.node, reason)
            return super().label(call, labels)
        x, w, axis, g = self.x(call), self.w(call), self.channel_axis(call), self.groups(call)
        fields = self.outer(call, labels)
        rows = self._rows(call, labels, w)
        if g == 1:
            columns = labels.of(w)[self.column_axis(call)].reshape(-1)
            rank = len(call.shape(x))
            self._unify_columns(call, labels, fields, columns, rank)
            labels.of(w)
        else:
            self._label_groups(call, labels, fields, rows, g)
        self._pin_kernel(call, labels, w)
        self._label_bias(call, labels, rows)
        shape = [1] * len(call.out_shape)
        shape[axis] = rows.numel()
        return {**labels.even(fields, axis), axis: rows.view(shape)}

    def outer(self, call: Call, labels: Labeller) -> Fields:
        """Fields of the operand that the op can follow; subclasses pin the rest."""
        return dict(self.operand(call, labels))

    def column_axis(self, call: Call) -> int:
        return 1 - self.row_axis(call)

    def _rows(self, call: Call, labels: Labeller, w: Value) -> Tensor:
        fields = labels.of(w)[self.row_axis(call)]
        return fields.reshape(-1)

    def _unify_columns(
        self, call: Call, labels: Labeller, fields: Fields, columns: Tensor, rank: int
    ) -> None:
        axis = self.channel_axis(call)
        shape = tuple(columns.numel() if a == axis else 1 for a in range(rank))
        labels.unify(
            [(fields, call.shape(self.x(call))), ({axis: columns.view(shape)}, shape)], rank, call.node.name
        )

    def _label_groups(self, call: Call, labels: Labeller, fields: Fields, rows: Tensor, g: int) -> None:
        raise NotImplementedError

    def _pin_kernel(self, call: Call, labels: Labeller, w: Value) -> None:
        labels.pin(w, call.node.name, Reason.CHANNEL_MIXING, range(2, len(call.shape(w))))

    def _label_bias(self, call: Call, labels: Labeller, rows: Tensor) -> None:
        bias = call.value("bias")
        if bias is None:
            labels.declare(call.slot("bias"), {0: rows})
        elif call.shape(bias) == (rows.numel(),):
            labels.table.tie(labels.of(bias)[0], rows)
        else:
            labels.pin(bias, call.node.name, Reason.UNTRACKED_AXIS)
            labels.table.pin(rows, call.node.name, Reason.UNTRACKED_AXIS.name)

    # -------------------------------------------------------------- facts as [outer.., G, C] and [outer.., G, R]
    def known(self, call: Call, facts: FactTable) -> Constancy:
        """Constancy of the operand; subclasses settle it along the axes that the op mixes."""
        return facts.constancy(self.x(call))

    def _operand(self, call: Call, facts: FactTable) -> tuple[Constancy, Tensor, Tensor]:
        """`known`, and by group which channels vary and the value of those that do not, [outer.., G, C]."""
        if call.node not in facts.operands:
            c = self.known(call, facts)
            varies, value = self._by_group(call, c.varies.cpu()), self._by_group(call, c.value.double().cpu())
            facts.operands[call.node] = c, varies, value
        return facts.operands[call.node]

    def _reads(self, call: Call, facts: FactTable) -> Tensor:
        """Which rows read which columns, [G, R, C] uint8."""
        w = self.w(call)
        assert isinstance(w, Param)
        key = self._reads_key(call)
        if key not in facts.cache:
            facts.cache[key] = nonzero(self.matrix(call, w.tensor.detach()))
        return facts.cache[key]

    def _reads_key(self, call: Call) -> tuple[int, int, int]:
        w = self.w(call)
        assert isinstance(w, Param)
        return id(w.tensor), self.groups(call), self.row_axis(call)

    def _by_group(self, call: Call, t: Tensor) -> Tensor:
        """A layout tensor of the operand as [outer.., G, C]: channels last, split by group."""
        axis, x = self.channel_axis(call), self.x(call)
        width = call.shape(x)[axis]
        t = t.expand([width if a == axis else n for a, n in enumerate(t.shape)])
        return split_axis(t.movedim(axis, -1), -1, self.groups(call))

    def _rows_layout(self, call: Call, t: Tensor) -> Tensor:
        """[outer.., G, R] as a layout tensor of the result."""
        return t.flatten(-2).movedim(-1, self.channel_axis(call))

    def _rows_by_group(self, call: Call, live: Tensor) -> Tensor:
        axis = self.channel_axis(call)
        width = call.out_shape[axis]
        live = live.expand([width if a == axis else n for a, n in enumerate(live.shape)])
        return split_axis(live.movedim(axis, -1), -1, self.groups(call))

    def forward(self, call: Call, facts: FactTable) -> Constancy | tuple[Constancy, ...]:
        if self.refused(call) is not None:
            return super().forward(call, facts)
        _, varies, value = self._operand(call, facts)
        reads = self._reads(call, facts)
        disturbing = varies | (value != 0) if self.has_border(call) else varies
        moved = rows_reading(disturbing, reads)
        if bool((disturbing & ~varies).any()) and bool((moved & ~rows_reading(varies, reads)).any()):
            facts.refuse(call.node, Reason.BORDER, "a row reads constants alone, and zeros around them")
        result = self._fold_value(call, torch.where(disturbing, 0.0, value))
        bias = call.value("bias")
        if bias is not None:
            found = facts.constancy(bias)
            shift = (
                found.value.double()
                .cpu()
                .expand(torch.broadcast_shapes(found.value.shape, found.varies.shape))
            )
            if shift.dim() != 1 or not found.is_known:
                return Constancy.top(len(call.out_shape))
            result = (
                result + shift.unflatten(0, (self.groups(call), -1)) if shift.numel() > 1 else result + shift
            )
        moved, result = torch.broadcast_tensors(moved, result)
        return Constancy(self._rows_layout(call, moved), self._rows_layout(call, result))

    def _fold_value(self, call: Call, value: Tensor) -> Tensor:
        """Sum_c W[r, c] k[c] over all taps, [outer.., G, R], in float64; reads only columns with k != 0."""
        w = self.w(call)
        assert isinstance(w, Param)
        m = self.matrix(call, w.tensor.detach())
        used = (value != 0).flatten(0, -2).any(0)
        if not bool(used.any()):
            return torch.zeros(*value.shape[:-1], m.shape[1], dtype=torch.float64)
        columns = used.nonzero().flatten()
        k, at = value.index_select(-1, columns).unsqueeze(-1), columns.to(m.device)  # [outer.., G, C, 1]
        sums = []
        for rows in m.split(
            rows_at_once(m, 1), 1
        ):  # in float64 a whole weight would be larger than the model's
            part = rows.index_select(2, at).double().sum(-1).cpu()
            sums.append((part @ k).squeeze(-1))
        return torch.cat(sums, -1)

    def backward(self, call: Call, live: Live, facts: FactTable) -> Demand:
        if self.refused(call) is not None or not isinstance(live, Tensor):
            return super().backward(call, live, facts)
        x = self.x(call)
        wanted = self._wanted(call, live, facts)
        axis = self.channel_axis(call)
        self._refuse_statistics(call, live, facts)
        demand: Demand = {x: collapse(wanted.flatten(-2).movedim(-1, axis), facts.layout(x))}
        bias = call.value("bias")
        if bias is not None and not isinstance(bias, Param):
            demand[bias] = collapse(live.movedim(axis, -1), facts.layout(bias))
        return demand

    def _wanted(self, call: Call, live: Tensor, facts: FactTable) -> Tensor:
        """Channels this call reads in its folded form, statistics in places of channels included, [outer.., G, C]."""
        c, _, _ = self._operand(call, facts)
        wanted, gone = self._channels(call, live, facts), self._combinable(call, facts, c)
        if gone is not None and c.affine is not None:
            read = columns_read(self._rows_by_group(call, live), self._reads(call, facts))
            if bool((read & gone).any()):
                wanted[..., list(facts.emitted.get(c.affine.norm, {}).values())] = True
        return wanted

    def _channels(self, call: Call, live: Tensor, facts: FactTable) -> Tensor:
        """Channels this call reads as they are, [outer.., G, C]."""
        c, varies, value = self._operand(call, facts)
        reads = self._reads(call, facts)
        read = columns_read(self._rows_by_group(call, live), reads)
        gone = self._combinable(call, facts, c)
        if not self.is_private(call, facts):
            kept = self._by_group(call, self.kept_operand(call, facts))
            wanted = read & (varies | (value != 0) | kept) & ~self.agreed(call, facts)
            wanted = wanted | self._left_in_place(call, read & ~varies & (value != 0), facts)
            return wanted if gone is None else wanted & ~gone
        wanted = read & varies if gone is None else read & varies & ~gone
        border = read & ~varies & (value != 0)
        if gone is None or not bool((read & gone).any()):
            wanted = wanted | self._left_in_place(call, border, facts)
        if self.has_border(call) and bool(border.any()):
            wanted = wanted | (border if self.groups(call) > 1 else self._carrier(call, facts, border))
        return wanted

    def _left_in_place(self, call: Call, constants: Tensor, facts: FactTable) -> Tensor:
        """Constants [outer.., G, C] that stay in any case, and for which alone no bias is made (theory: Lemma L2)."""
        if call.value("bias") is not None or not bool(constants.any()):
            return torch.zeros_like(constants)
        kept = self._by_group(call, facts.kept_channels(self.x(call)))
        return torch.zeros_like(constants) if bool((constants & ~kept).any()) else constants

    def _combinable(self, call: Call, facts: FactTable, c: Constancy) -> Tensor | None:
        """Channels of a norm's output that this call takes as combinations of its statistics, [.., 1, C].

        A channel that the norm sees anyway is read as it is.
        """
        affine = c.affine
        if (
            affine is None
            or affine.axis != self.channel_axis(call)
            or self.groups(call) > 1
            or affine.norm in facts.closed
        ):
            return None
        kept = self._by_group(call, self.kept_operand(call, facts)) | facts.is_kept(affine.sources)
        if self.is_bound(call):
            return affine.mask & ~kept if self.may_add(call, facts) else None
        if not self.is_private(call, facts):
            return None
        return affine.mask & (~kept | marked_at(kept, facts.emitted.get(affine.norm)))

    def taken(self, call: Call, facts: FactTable) -> tuple[fx.Node, Tensor] | None:
        """The norm whose channels [C] this call does not read, but takes from the norm's statistics."""
        live = facts.live.get(call.node)
        if self.refused(call) is not None or not isinstance(live, Tensor):
            return None
        c = self.known(call, facts)
        gone = self._combinable(call, facts, c)
        if gone is None or c.affine is None:
            return None
        rows = self._rows_by_group(call, live).flatten(0, -2).any(0)
        read = columns_read(rows.unsqueeze(0), self._reads(call, facts)).flatten()
        gone = gone.flatten(0, -2).any(0) & read
        assert isinstance(c.affine.norm, fx.Node)
        return (c.affine.norm, gone) if bool(gone.any()) else None

    def _refuse_statistics(self, call: Call, live: Tensor, facts: FactTable) -> None:
        """Say so where a norm's channels stay because this call reads them as they are."""
        affine = self.known(call, facts).affine
        if affine is None or affine.axis != self.channel_axis(call) or not self.is_bound(call):
            return
        assert isinstance(affine.norm, fx.Node)
        if bool((self._channels(call, live, facts) & affine.mask).any()):
            reason, why = Reason.NOT_LINEAR_IN_NORM, "and has no bias of its own"
            if self.is_shared(call):
                reason, why = Reason.SHARED_WEIGHT, "with a weight used elsewhere"
            facts.refuse(affine.norm, reason, f"{call.node.name} reads it {why}")

    def pays(self, call: Call, facts: FactTable, gone: Tensor) -> bool:
        """Whether a matrix for statistics is smaller than the columns ``gone`` [C] of the weight, for a bound call."""
        affine, w = self.known(call, facts).affine, self.w(call)
        assert affine is not None and isinstance(w, Param)
        n_extra = len(self.statistics(call, facts, gone))
        n_extra += bool((self._combine(call, gone, affine, facts)[2] != 0).any()) and not affine.bordered
        return (w.n_sites - 1) * n_extra < int(gone.sum())

    def statistics(self, call: Call, facts: FactTable, gone: Tensor) -> set[str]:
        """Names of the statistics that take the place of the channels ``gone`` [C] here."""
        needed = self._needed(call, facts, gone)
        return needed if self._carries_one(call, facts) else needed - {"one"}

    def makes_bias(self, call: Call, facts: FactTable, gone: Tensor) -> bool:
        """Whether a call without bias gets one for the channels ``gone`` [C]: a column's worth of numbers."""
        if call.value("bias") is not None or self.is_bound(call) or self._carries_one(call, facts):
            return False
        return "one" in self._needed(call, facts, gone)

    def _carries_one(self, call: Call, facts: FactTable) -> bool:
        """Whether the constant part of a norm's channels is a channel, as no bias can hold it at a border."""
        affine = self.known(call, facts).affine
        assert affine is not None
        return affine.bordered or self.has_border(call)

    def _needed(self, call: Call, facts: FactTable, gone: Tensor) -> set[str]:
        """Names in whose terms the live rows take the channels ``gone`` [C]."""
        affine = self.known(call, facts).affine
        assert affine is not None
        rows = self._rows_by_group(call, facts.liveness(call.node)).flatten(0, -2).any(0)
        columns = self._combine(call, gone, affine, facts)
        return {name for name, column in zip(EMITS, columns, strict=True) if bool((column[rows] != 0).any())}

    def _combine(self, call: Call, gone: Tensor, affine: Affine, facts: FactTable) -> Tensor:
        """Sum over removed channels of W[:, d, taps] times their coefficients, [3, R, taps], float64."""
        w = self.w(call)
        assert isinstance(w, Param)
        at = gone.nonzero().flatten()
        part = self.matrix(call, w.tensor.detach())[0].index_select(1, at.to(w.tensor.device)).double().cpu()
        return torch.einsum("rct,ec->ert", part, affine.coefficients(facts.shifts[affine.norm])[:, at])

    def _carrier(self, call: Call, facts: FactTable, border: Tensor) -> Tensor:
        """The one channel that carries the operand's constants; not chosen yet in the first phase."""
        chosen = facts.carriers.get(self.x(call))
        if self.channel_axis(call) not in facts.fields(self.x(call)):
            return border  # they stay in any case
        marked = torch.zeros_like(border)
        if chosen is not None:
            marked[..., chosen] = True
        return marked

    def border_constants(self, call: Call, facts: FactTable) -> Tensor | None:
        """Nonzero constants of the operand that need a carrier, [C]; None when there is no such need."""
        live = facts.live.get(call.node)
        if self.refused(call) is not None or not isinstance(live, Tensor) or self.groups(call) > 1:
            return None
        if not self.has_border(call) or not self.is_private(call, facts):
            return None
        _, varies, value = self._operand(call, facts)
        read = columns_read(self._rows_by_group(call, live), self._reads(call, facts))
        border = (read & ~varies & (value != 0)).flatten(0, -2).any(0)
        return border if bool(border.any()) else None
