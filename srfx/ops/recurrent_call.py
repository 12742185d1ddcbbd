"""How a call spells a recurrent layer: its operand, its states and its weights by name, whatever the spelling."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from srfx.ir.call import Call
from srfx.ir.plan import Reason
from srfx.ir.program import Param, Value
from srfx.ops.gates import LSTM, RNN_RELU, Kind
from srfx.ops.rule import OpRule

TENSORS = ("weight_ih", "weight_hh", "bias_ih", "bias_hh", "weight_hr")


@dataclass(frozen=True)
class Operands:
    """The tensors of one call: the operand, the states before the first step (None: zeros), the weights."""

    x: Value
    h: Value | None
    c: Value | None
    weights: dict[str, Param]

    @property
    def n_units(self) -> int:
        """Lanes of the cell state."""
        return self.weights["weight_hr" if "weight_hr" in self.weights else "weight_hh"].shape[1]

    @property
    def states(self) -> list[tuple[str, Value]]:
        """The states that are given, with what they are called."""
        return [(name, v) for name, v in (("h", self.h), ("c", self.c)) if v is not None]


class RecurrentCall(OpRule):
    """Reads the calls of nn.LSTM, nn.GRU, nn.RNN, their functions and their ATen ops: one layer in one direction."""

    kind: Kind = LSTM
    suffix = "_l0"
    barrier = Reason.UNRECOGNISED_CALL
    signature: tuple[str, ...] = ("input", "hx", "params", "has_biases", "num_layers", "dropout", "train",
                                  "bidirectional", "batch_first")  # fmt: skip

    # -------------------------------------------------------------- the call
    def kind_of(self, call: Call) -> Kind:
        if self.kind.name == "rnn" and call.get("nonlinearity") == "relu":
            return RNN_RELU
        return self.kind

    def operands(self, call: Call) -> Operands | None:
        """The tensors by name; None when the call is of a form that is not followed."""
        x, weights = call.value("input"), self._weights(call)
        states = self.states_of(call)
        if x is None or weights is None or states is None or not self._is_one_layer(call):
            return None
        return Operands(x, *states, weights)

    def _is_one_layer(self, call: Call) -> bool:
        return call.get("num_layers", 1) == 1 and not call.get("bidirectional", False)

    def _weights(self, call: Call) -> dict[str, Param] | None:
        found: dict[str, Any] = {}
        if call.module is not None:
            found = {name: getattr(call.module, name + self.suffix, None) for name in TENSORS}
        else:
            params = call.bound.get("params")
            if not isinstance(params, (tuple, list)):
                return None
            names = list(TENSORS) if call.get("has_biases") else ["weight_ih", "weight_hh", "weight_hr"]
            if len(params) > len(names):
                return None
            found = dict(zip(names, params, strict=False))
        values = {name: call.as_value(raw) for name, raw in found.items() if raw is not None}
        known = {name: value for name, value in values.items() if isinstance(value, Param)}
        return known if len(known) == len(values) else None

    def states_of(self, call: Call) -> tuple[Value | None, Value | None] | None:
        """The states before the first step, both None where none are given; None where they are no tensors."""
        raw = call.bound.get("hx")
        if raw is None:
            return None, None
        parts = raw if isinstance(raw, (tuple, list)) else (raw,)
        values = [call.as_value(part) for part in parts]
        if len(values) != 1 + self.kind.has_cell or any(v is None for v in values):
            return None
        return values[0], values[1] if self.kind.has_cell else None

    def refused(self, call: Call) -> Reason | None:
        """Why this call is a barrier, if it is one."""
        found = self.operands(call)
        if found is None:
            return Reason.UNRECOGNISED_CALL
        for weight in found.weights.values():
            if not weight.tensor.is_floating_point():
                return Reason.UNSUPPORTED_DTYPE
            if not call.program.is_finite(weight):
                return Reason.NON_FINITE
        return None

    def known(self, call: Call) -> Operands:
        """The tensors of a call that is not refused."""
        found = self.operands(call)
        assert found is not None
        return found

    def is_private(self, o: Operands) -> bool:
        """Whether the weights belong to this site alone."""
        return all(w.n_sites <= 1 for w in o.weights.values())
