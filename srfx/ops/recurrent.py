"""Recurrent layers and cells: LSTM, GRU, RNN; one layer in one direction (theory: section 15, Lemmas Q1 to Q4).

Stacked and bidirectional layers are taken apart first (`srfx.passes.decompose_recurrent`).  What the weights say is
in `srfx.ops.gates`; here stands how a call spells them, and what its operands and results have to do with them.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from srfx.ir.call import Call
from srfx.ir.editor import GraphEdit, same_numbers
from srfx.ir.edits import SelectOperands, SetArgument, SetTensor
from srfx.ir.plan import Reason
from srfx.ir.program import Param, Value
from srfx.lattice.constancy import Constancy
from srfx.lattice.movement import Fields
from srfx.ops import gates
from srfx.ops.facts import Demand, FactTable, Labeller, Live
from srfx.ops.gates import GRU, LSTM, RNN_RELU, RNN_TANH, Constants, Known, Liveness, Weights
from srfx.ops.recurrent_call import TENSORS, Operands, RecurrentCall
from srfx.ops.registry import op_rule

aten = torch.ops.aten


@dataclass(frozen=True)
class Solved:
    """What backward and fold share: the live parts, and which channels of x and of h the rewritten weights read."""

    live: Liveness
    reads_x: Tensor
    reads_h: Tensor


class Recurrent(RecurrentCall):
    """States and units as channels: W_ih [G H, I], W_hh [G H, P], b [G H], W_hr [P, H]; the gates of a unit are tied."""

    # -------------------------------------------------------------- labels
    def label(self, call: Call, labels: Labeller) -> Fields | tuple[Fields, ...]:
        reason = self.refused(call)
        if reason is not None:
            labels.refuse(call.node, reason)
            return super().label(call, labels)
        o, site = self.known(call), call.node.name
        units = self._unit_labels(labels, o)
        states = labels.of(o.weights["weight_hr"])[0].flatten() if "weight_hr" in o.weights else units
        labels.table.tie(labels.of(o.weights["weight_hh"])[1].flatten(), states)
        columns = labels.of(o.weights["weight_ih"])[1].flatten()
        self._tie_operand(labels, o.x, columns, site, pins=True)
        for name, value in o.states:
            self._tie_operand(labels, value, states if name == "h" else units, site, pins=False)
        last = [
            states if i < len(call.leaves) - self.kind.has_cell else units for i in range(len(call.leaves))
        ]
        found = tuple(
            {hint.dim() - 1: _along_last(f, hint.dim())} for f, hint in zip(last, call.leaves, strict=True)
        )
        return found[0] if isinstance(call.output, Tensor) else found

    def _unit_labels(self, labels: Labeller, o: Operands) -> Tensor:
        """One label for each unit, tied over its gates in every tensor [G H, ..]."""
        units = labels.of(o.weights["weight_ih"])[0].flatten().view(-1, o.n_units)[0]
        for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh"):
            if name in o.weights:
                labels.table.tie(labels.of(o.weights[name])[0].flatten().view(-1, o.n_units), units)
        if "weight_hr" in o.weights:
            labels.table.tie(labels.of(o.weights["weight_hr"])[1].flatten(), units)
        return units

    def _tie_operand(self, labels: Labeller, value: Value, wanted: Tensor, site: str, pins: bool) -> None:
        """The last axis holds the channels.  A state without channels is cut by a selection at the call."""
        fields = labels.of(value)
        axis = len(labels.program.shape(value)) - 1
        labels.pin(value, site, Reason.CHANNEL_MIXING, [a for a in fields if a != axis])
        found = fields.get(axis)
        if found is None:
            if pins:
                labels.table.pin(wanted, site, Reason.UNTRACKED_AXIS.name)
            return
        for outer in range(axis):
            if found.shape[outer] > 1:
                labels.table.tie(found, found.narrow(outer, 0, 1))
                found = found.narrow(outer, 0, 1)
        labels.table.tie(found.flatten(), wanted)

    # -------------------------------------------------------------- facts
    def constancy(self, facts: FactTable, value: Value | None, width: int) -> tuple[Tensor, Tensor]:
        """Which channels of an operand vary, and the value of the others, [width] each; no operand means zeros."""
        if value is None:
            return torch.zeros(width, dtype=torch.bool), torch.zeros(width, dtype=torch.float64)
        c = facts.constancy(value)
        c = c.settle([c.value.dim() - 1])
        varies = c.varies.cpu().expand([*c.varies.shape[:-1], width]).reshape(-1)
        return varies, c.value.double().cpu().expand([*c.value.shape[:-1], width]).reshape(-1)

    def view(self, call: Call, facts: FactTable, o: Operands) -> Weights:
        """The weights as `gates` reads them, with the constants of the operands gone through them."""
        w, n = o.weights, self.kind.n_gates
        masks = {}
        for name in ("weight_ih", "weight_hh", "weight_hr"):
            if name in w:
                key = (id(w[name].tensor), n, -1)
                if key not in facts.cache:
                    facts.cache[key] = (w[name].tensor.detach() != 0).to(torch.uint8).cpu()
                masks[name] = facts.cache[key]
        h = o.h if self.is_cell else None
        shifts = [
            self._shift(facts, o, "ih", o.x, w["weight_ih"].shape[1]),
            self._shift(facts, o, "hh", h, w["weight_hh"].shape[1]),
        ]
        return Weights(
            self.kind_of(call),
            masks["weight_ih"].view(n, o.n_units, -1),
            masks["weight_hh"].view(n, o.n_units, -1),
            masks.get("weight_hr"),
            *(s.view(n, -1) for s in shifts),
        )

    is_cell = False

    def _shift(self, facts: FactTable, o: Operands, side: str, value: Value | None, width: int) -> Tensor:
        """Bias plus the constants of an operand through its weight, [G H], float64."""
        _, k = self.constancy(facts, value, width)
        return self._bias(o, side) + _through(o.weights[f"weight_{side}"].tensor, k)

    def _bias(self, o: Operands, side: str) -> Tensor:
        bias = o.weights.get(f"bias_{side}")
        if bias is None:
            return torch.zeros(self.kind.n_gates * o.n_units, dtype=torch.float64)
        return bias.tensor.detach().double().cpu()

    def solve_constants(self, facts: FactTable, o: Operands, w: Weights) -> tuple[Constants, Tensor]:
        """What is known of the states, and which states are 0 before the first step."""
        varies_x, _ = self.constancy(facts, o.x, w.ih.shape[2])
        varies_h, value_h = self.constancy(facts, o.h, w.hh.shape[2])
        varies_c, value_c = self.constancy(facts, o.c, o.n_units)
        h, c = Known(~varies_h, value_h), Known(~varies_c, value_c)
        if self.is_cell:
            return gates.cell_constants(w, varies_x, h, c), h.is_zero
        return gates.constants(w, varies_x, h.is_zero, c.is_zero), h.is_zero

    def forward(self, call: Call, facts: FactTable) -> Constancy | tuple[Constancy, ...]:
        if self.refused(call) is not None:
            return super().forward(call, facts)
        o = self.known(call)
        known, _ = self.solve_constants(facts, o, self.view(call, facts, o))
        states = (known.steady, known.value)
        units = known.cell.parts
        n_states = len(call.leaves) - self.kind.has_cell
        found = tuple(
            Constancy(~_along_last(fixed, hint.dim()), _along_last(value, hint.dim()))
            for (fixed, value), hint in zip(
                [states] * n_states + [units] * self.kind.has_cell, call.leaves, strict=True
            )
        )
        return found[0] if isinstance(call.output, Tensor) else found

    def solve(self, call: Call, facts: FactTable, o: Operands, live: Live) -> Solved:
        """Lemma Q3 for what is live outside, with the kept set so far."""
        w = self.view(call, facts, o)
        known, rest_h = self.solve_constants(facts, o, w)
        parts = live if isinstance(live, tuple) else (live,)
        flat = [_last(part, width) for part, width in zip(parts, self._widths(call, w, o), strict=True)]
        cells = flat[-1] if self.kind.has_cell else torch.zeros(o.n_units, dtype=torch.bool)
        states = torch.stack(flat[:-1] if self.kind.has_cell else flat).any(0)
        private = self.is_private(o)
        kept_units = facts.is_kept(facts.fields(o.weights["weight_hh"])[0]).flatten()[: o.n_units]
        kept_h = facts.is_kept(facts.fields(o.weights["weight_hh"])[1]).flatten()
        kept_x = facts.is_kept(facts.fields(o.weights["weight_ih"])[1]).flatten()
        if private:
            needed, units = gates.needed_gates(w, known, rest_h), ~known.empty
        else:  # the weights stay as they are, and so must all that they read
            needed, units = torch.ones(w.ih.shape[:2], dtype=torch.bool), ~known.empty | kept_units
        if self.is_cell:
            found = gates.liveness(w, states, cells, needed, torch.zeros_like(states), units)
        else:
            found = gates.liveness(w, states, cells, needed, ~known.still | (kept_h & (not private)), units)
        rows = found.rows.flatten()
        varies_h, value_h = self.constancy(facts, o.h, w.hh.shape[2])
        varies_x, value_x = self.constancy(facts, o.x, w.ih.shape[2])
        reads_x = gates.read_from(w.ih.flatten(0, 1), rows)
        reads_h = gates.read_from(w.hh.flatten(0, 1), rows)
        reads_x = reads_x & self._not_absorbed(o, "ih", varies_x, value_x, kept_x, private)
        if self.is_cell:
            reads_h = reads_h & self._not_absorbed(o, "hh", varies_h, value_h, kept_h, private)
            if self.kind.name == "gru":
                reads_h = reads_h | found.states  # h' = (1 - z) n + z h
        else:
            reads_h = found.states
        return Solved(found, reads_x, reads_h)

    def _not_absorbed(
        self, o: Operands, side: str, varies: Tensor, value: Tensor, kept: Tensor, private: bool
    ) -> Tensor:
        if not private:
            return varies | (value != 0) | kept
        return varies if f"bias_{side}" in o.weights else varies | (value != 0)

    def _widths(self, call: Call, w: Weights, o: Operands) -> list[int]:
        n_states = len(call.leaves) - self.kind.has_cell
        return [w.hh.shape[2]] * n_states + [o.n_units] * self.kind.has_cell

    def backward(self, call: Call, live: Live, facts: FactTable) -> Demand:
        if self.refused(call) is not None:
            return super().backward(call, live, facts)
        o = self.known(call)
        found = self.solve(call, facts, o, live)
        demand: Demand = {o.x: _along_last(found.reads_x, len(call.shape(o.x)))}
        if self.is_private(o) and bool(
            (found.reads_x & ~self.constancy(facts, o.x, found.reads_x.numel())[0]).any()
        ):
            facts.refuse(call.node, Reason.GROWS, "constants would need biases, of which the layer has none")
        for name, value in o.states:
            wanted = found.reads_h if name == "h" else found.live.cells
            wanted = _along_last(wanted, len(call.shape(value)))
            demand[value] = demand[value] | wanted if value in demand else wanted
        if not self.is_cell:  # what live rows read through W_hh is live in the result as well
            demand[call.node, 0] = _along_last(found.live.states, call.leaves[0].dim())
            if self.kind.has_cell:
                demand[call.node, 2] = _along_last(found.live.cells, call.leaves[2].dim())
        return demand

    def sustain(self, call: Call, facts: FactTable) -> Tensor | None:
        """Torch tells a projected layer by its widths: fewer states than units have to stay."""
        o = self.operands(call) if self.refused(call) is None else None
        if o is None or "weight_hr" not in o.weights:
            return None
        fields = facts.fields(o.weights["weight_hr"])
        units, n_states = facts.is_kept(fields[1]).flatten(), facts.count(fields, 0)
        missing = n_states + 1 - int(units.sum())
        if n_states == 0 or missing <= 0:
            return None
        return fields[1].flatten()[(~units).nonzero().flatten()[:missing]]

    # -------------------------------------------------------------- edits
    def fold(self, call: Call, facts: FactTable) -> Iterable[GraphEdit]:
        if self.refused(call) is not None:
            return []
        o = self.known(call)
        if not self.is_private(o):
            return []
        live = facts.live.get(call.node)
        if live is None:
            leaves = [torch.zeros((1,) * hint.dim(), dtype=torch.bool) for hint in call.leaves]
            live = leaves[0] if isinstance(call.output, Tensor) else tuple(leaves)
        found = self.solve(call, facts, o, live)
        rows = found.live.rows.flatten()
        edits: list[GraphEdit] = []
        for side, value, reads in (
            ("ih", o.x, found.reads_x),
            ("hh", o.h if self.is_cell else None, found.reads_h),
        ):
            weight = o.weights[f"weight_{side}"]
            _, k = self.constancy(facts, value, weight.shape[1])
            edits += self._masked(call, o, f"weight_{side}", rows, reads)
            if f"bias_{side}" in o.weights:
                shift = _through(weight.tensor, torch.where(reads, 0.0, k))
                edits += self._new_bias(call, o, side, shift, rows)
        if "weight_hr" in o.weights:
            edits += self._masked(call, o, "weight_hr", found.live.states, found.live.outs)
        for weight in o.weights.values():  # a byte for each weight, not needed any more
            facts.cache.pop((id(weight.tensor), self.kind.n_gates, -1), None)
        return edits

    def _masked(self, call: Call, o: Operands, name: str, rows: Tensor, columns: Tensor) -> list[GraphEdit]:
        """The weight with zeros wherever a row or a column is not live."""
        param = o.weights[name]
        old = param.tensor.detach()
        used = (rows.unsqueeze(1) & columns).to(old.device)
        if not bool(((old != 0) & ~used).any()):
            return []
        return [SetTensor(call.node.name, name, tuple(param.names), torch.where(used, old, 0))]

    def _new_bias(self, call: Call, o: Operands, side: str, shift: Tensor, rows: Tensor) -> list[GraphEdit]:
        param = o.weights[f"bias_{side}"]
        old = param.tensor.detach()
        new = torch.where(rows, old.double().cpu() + shift, 0.0).to(old)
        if same_numbers(new, old):
            return []
        return [SetTensor(call.node.name, f"bias_{side}", tuple(param.names), new)]

    def compact(self, call: Call, facts: FactTable) -> Iterable[GraphEdit]:
        if self.refused(call) is not None:
            return []
        o = self.known(call)
        widths = {"input_size": facts.count(facts.fields(o.weights["weight_ih"]), 1)}
        n_states = facts.count(facts.fields(o.weights["weight_hh"]), 1)
        widths["hidden_size"] = n_states
        if "weight_hr" in o.weights:
            widths["hidden_size"] = facts.count(facts.fields(o.weights["weight_hr"]), 1)
            widths["proj_size"] = n_states
        edits: list[GraphEdit] = []
        if call.module is not None:
            edits += [
                SetArgument(call.node.name, name, width)
                for name, width in widths.items()
                if call.get(name) != width
            ]
        return edits + self._select_states(call, facts, o)

    def _select_states(self, call: Call, facts: FactTable, o: Operands) -> list[GraphEdit]:
        """States that carry no channels of their own (an input, an unknown op) are cut at the call."""
        selections: list[tuple[int, Tensor] | None] = []
        for name, value in o.states:
            axis = len(call.shape(value)) - 1
            weight, side = (o.weights["weight_hh"], 1) if name == "h" else (o.weights["weight_ih"], 0)
            fields = facts.fields(weight)
            if axis in facts.fields(value) or not facts.changed(fields, side, weight.shape[side]):
                selections.append(None)
                continue
            index = facts.index(fields, side).to(weight.tensor.device)
            selections.append((axis, index[: index.numel() // self.kind.n_gates] if name == "c" else index))
        if not any(s is not None for s in selections):
            return []
        return [SelectOperands(call.node.name, "hx", tuple(selections), call.signature)]


class RecurrentCell(Recurrent):
    """One step: the state is an operand as x is, and the step's own state is the result."""

    is_cell = True
    suffix = ""
    signature: tuple[str, ...] = ("input", "hx", "weight_ih", "weight_hh", "bias_ih", "bias_hh")

    def _weights(self, call: Call) -> dict[str, Param] | None:
        raw = {name: call.get(name) for name in TENSORS if call.get(name) is not None}
        values = {name: call.value(name) for name in raw}
        known = {name: value for name, value in values.items() if isinstance(value, Param)}
        return known if len(known) == len(values) and {"weight_ih", "weight_hh"} <= set(known) else None


def _through(weight: Tensor, k: Tensor) -> Tensor:
    """Sum_c W[:, c] k[c] in float64; reads only columns with k != 0."""
    used = (k != 0).nonzero().flatten()
    if not used.numel():
        return torch.zeros(weight.shape[0], dtype=torch.float64)
    part = weight.detach().index_select(1, used.to(weight.device)).double().cpu()
    return part @ k[used]


def _along_last(vector: Tensor, rank: int) -> Tensor:
    """A vector as the layout tensor of the last axis."""
    return vector.view((1,) * (rank - 1) + (-1,))


def _last(live: Tensor | None, width: int) -> Tensor:
    """A layout tensor reduced to its last axis, [width]; None is nothing."""
    if live is None:
        return torch.zeros(width, dtype=torch.bool)
    return live.reshape(-1, live.shape[-1]).any(0).expand(width)


_CELL = "input hx weight_ih weight_hh bias_ih bias_hh"
for _rule, _kind, _targets in (
    (Recurrent, LSTM, (nn.LSTM, torch.lstm, aten.lstm.input)),
    (Recurrent, GRU, (nn.GRU, torch.gru, aten.gru.input)),
    (Recurrent, RNN_TANH, (nn.RNN, torch.rnn_tanh, aten.rnn_tanh.input)),
    (Recurrent, RNN_RELU, (torch.rnn_relu, aten.rnn_relu.input)),
    (RecurrentCell, LSTM, (nn.LSTMCell, torch.lstm_cell, (aten.lstm_cell.default, _CELL))),
    (RecurrentCell, GRU, (nn.GRUCell, torch.gru_cell, (aten.gru_cell.default, _CELL))),
    (RecurrentCell, RNN_TANH, (nn.RNNCell, torch.rnn_tanh_cell, (aten.rnn_tanh_cell.default, _CELL))),
    (RecurrentCell, RNN_RELU, (torch.rnn_relu_cell, (aten.rnn_relu_cell.default, _CELL))),
):
    op_rule(*_targets, kind=_kind)(_rule)
