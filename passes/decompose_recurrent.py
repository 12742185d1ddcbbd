"""Take stacked and bidirectional recurrent layers apart into one call for each layer and direction.

Before: y, (h, c) = lstm(x)                              two layers, both directions
After:  f = lstm.l0(x);  b = flip(lstm.l0_reverse(flip(x, [0])), [0]);  y0 = cat([f, b], -1)
        y = cat([lstm.l1(y0), ..], -1);  h = cat([h of l0, h of l0_reverse, h of l1, ..], 0)

Each piece keeps as many units as it needs: nn.LSTM and its kin have one ``hidden_size`` for all.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.utils import parametrize

from srfx.ir.attrs import get_attr, set_attr
from srfx.ir.call import Call, write_argument
from srfx.ir.dead_code import remove_dead_nodes
from srfx.ir.plan import Edit, Plan, Reason, Refusal
from srfx.ir.program import Program
from srfx.ir.shapes import propagate
from srfx.ops.recurrent import Recurrent, RecurrentCell
from srfx.ops.registry import registered, resolve
from srfx.ops.shape import Creation
from srfx.passes._tuples import hand_over, spell_out, whole_readers
from srfx.passes.base import HintedPass, register_pass

_TENSORS = ("weight_ih", "weight_hh", "bias_ih", "bias_hh", "weight_hr")


@dataclass(frozen=True)
class DecomposeRecurrent(Edit):
    """One call becomes ``n_layers`` times ``n_directions`` calls; of one and one, only its tuples are spelled out."""

    n_layers: int = 1
    n_directions: int = 1


@register_pass("decompose-recurrent")
class DecomposeRecurrentPass(HintedPass):
    """Write stacked and bidirectional nn.LSTM, nn.GRU and nn.RNN, and their ATen calls, as layers of one direction.

    The layers of a module stand below its path as ``l0``, ``l0_reverse``, ``l1`` and so on, each an nn.LSTM (GRU,
    RNN) that holds the module's own parameters; dropout between layers follows ``train()`` and ``eval()`` as before.
    Who takes one entry of the last states (``h_n[-1]``) reads that layer's.  A tuple of states that is handed on as
    a whole, to another call or to the output, becomes its elements.

    Refuses: UNRECOGNISED_CALL for packed sequences and classes with a forward of their own; OPAQUE_HOOK;
    COMPUTED_WEIGHT when a weight is parametrized.
    Source: torch/nn/modules/rnn.py.
    """

    def __init__(self, hints: Sequence[Any] | None = None) -> None:
        super().__init__(hints)
        self._program: Program | None = None
        self._dissolved: list[str] = []

    def plan(self, gm: fx.GraphModule) -> Plan:
        """Every recurrent call that is stacked, bidirectional or takes its states as one tuple, in graph order."""
        self._program, plan = None, Plan()
        if not _may_have_some(gm):
            return plan
        self._program = Program(gm, propagate(gm, self.hints))
        for node in gm.graph.nodes:
            if not node.op.startswith("call"):
                continue
            reason = _refused(self._program, node)
            if reason is not None:
                plan.refusals.append(Refusal(node.name, reason))
                continue
            rule, call = resolve(node, self._program)
            if not isinstance(rule, Recurrent):
                continue
            layers, directions = _counts(rule, call)
            if layers * directions > 1 or _is_tuple(call) or whole_readers(node, call.output):
                plan.edits.append(DecomposeRecurrent(node.name, layers, directions))
        return plan

    def apply(self, gm: fx.GraphModule, edit: Edit) -> None:
        """Write one call out."""
        assert isinstance(edit, DecomposeRecurrent) and self._program is not None
        node = next(n for n in gm.graph.nodes if n.name == edit.node)
        rule, call = resolve(node, self._program)
        assert isinstance(rule, Recurrent)
        with gm.graph.inserting_before(node):
            if edit.n_layers * edit.n_directions == 1:
                if _is_tuple(call):
                    states = [gm.graph.call_function(operator.getitem, (call["hx"], i)) for i in range(2)]
                    write_argument(node, call.signature, "hx", tuple(states))
                spell_out(node, call.output)
                return
            outputs = _Writer(gm, rule, call, edit.n_layers, edit.n_directions).write()
        hand_over(gm.graph, node, outputs)
        if node.op == "call_module":
            self._dissolved.append(str(node.target))

    def finish(self, gm: fx.GraphModule) -> None:
        """Leave plain containers where the modules were."""
        remove_dead_nodes(gm)
        left = dict(gm.named_modules(remove_duplicate=False))
        for path in dict.fromkeys(self._dissolved):
            if (husk := left.get(path)) is None:  # nobody read its results
                continue
            plain = nn.Module().train(husk.training)
            plain._modules = husk._modules
            set_attr(gm, path, plain)
        self._dissolved = []


# ---------------------------------------------------------------------- recognising
_MODULES = (nn.RNNBase, nn.RNNCellBase)


def _may_have_some(gm: fx.GraphModule) -> bool:
    modules = {n.target for n in gm.graph.find_nodes(op="call_module")}
    if any(isinstance(get_attr(gm, str(path)), _MODULES) for path in modules):
        return True
    return any(n.op == "call_function" and _is_recurrent_function(n.target) for n in gm.graph.nodes)


def _is_recurrent_function(target: Any) -> bool:
    return isinstance(registered(target), Recurrent)


def _refused(program: Program, node: fx.Node) -> Reason | None:
    """Why a call of a recurrent module is left alone as it is."""
    module = program.modules.get(str(node.target)) if node.op == "call_module" else None
    if not isinstance(module, _MODULES):
        return None
    if (
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
    ):
        return Reason.OPAQUE_HOOK
    if parametrize.is_parametrized(module):
        return Reason.COMPUTED_WEIGHT
    rule, call = resolve(node, program)
    if not isinstance(rule, Recurrent) or call.value("input") is None:
        return Reason.UNRECOGNISED_CALL
    return None


def _counts(rule: Recurrent, call: Call) -> tuple[int, int]:
    """Layers and directions; (1, 1) where the call is not of a form that can be written out."""
    if isinstance(rule, RecurrentCell) or call.value("input") is None:
        return 1, 1
    layers, directions = call.get("num_layers", 1), 1 + bool(call.get("bidirectional", False))
    is_plain = isinstance(layers, int) and (
        call.module is not None or isinstance(call.get("params"), (tuple, list))
    )
    states = call.bound.get("hx")
    if not is_plain or (states is not None and not _is_tuple(call) and rule.states_of(call) is None):
        return 1, 1
    return layers, directions


def _is_tuple(call: Call) -> bool:
    """Whether the states of a module are the tuple that another call returns."""
    raw = call.bound.get("hx")
    hint = call.program.hints.get(raw) if isinstance(raw, fx.Node) else None
    return isinstance(hint, (tuple, list)) and len(hint) == 2 and all(isinstance(h, Tensor) for h in hint)


# ---------------------------------------------------------------------- writing
class _Writer:
    """Writes one call as calls of single layers, before it."""

    def __init__(self, gm: fx.GraphModule, rule: Recurrent, call: Call, layers: int, directions: int) -> None:
        self.gm, self.call, self.layers, self.directions = gm, call, layers, directions
        self.has_cell = rule.kind.has_cell
        self.node = call.node
        self.meta = {
            k: v for k, v in self.node.meta.items() if k not in ("val", "tensor_meta", "example_value")
        }
        rank = call.output[0].dim()  # the input may be a new node, of which no shape is known
        self.time_axis = 1 if rank == 3 and call.get("batch_first", False) else 0
        self.states = [self._pieces(raw) for raw in self._given()]

    def _given(self) -> list[Any]:
        raw = self.call.bound.get("hx")
        if raw is None:
            return []
        if _is_tuple(self.call):
            return [self._function(operator.getitem, raw, i) for i in range(2)]
        return list(raw) if isinstance(raw, (tuple, list)) else [raw]

    def _pieces(self, states: fx.Node) -> list[fx.Node]:
        """The state of each layer and direction, [1, N, H] each; zeros made for all are made for each."""
        n, rule = self.layers * self.directions, None
        if states.op.startswith("call"):
            rule, call = resolve(states, self.call.program)
            sizes = call.bound.get("size")
            if type(rule) is Creation and isinstance(sizes, (tuple, list)) and sizes[0] == n:
                made = [self.gm.graph.node_copy(states) for _ in range(n)]
                for piece in made:
                    write_argument(piece, call.signature, "size", type(sizes)((1, *sizes[1:])))
                    self._drop_shapes(piece)
                return made
        return [self._function(torch.narrow, states, 0, k, 1) for k in range(n)]

    def write(self) -> Any:
        """The results of the call, in the structure in which it returns them."""
        x, last = self.call["input"], list[list[fx.Node]]()
        for layer in range(self.layers):
            outs = []
            for direction in range(self.directions):
                out, *states = self._one(x, layer, direction)
                outs.append(out)
                last.append(states)
            x = outs[0] if len(outs) == 1 else self._function(torch.cat, outs, -1)
            if layer + 1 < self.layers:
                x = self._dropped(x)
        joined = [list(pieces) for pieces in zip(*last, strict=True)]
        if self.node.op == "call_module" and self.has_cell:
            return [x, joined]
        return [x, *joined]

    def _one(self, x: fx.Node, layer: int, direction: int) -> list[fx.Node]:
        """Output and last states of one layer in one direction."""
        k = layer * self.directions + direction
        states = [pieces[k] for pieces in self.states]
        if direction:
            x = self._function(torch.flip, x, [self.time_axis])
        name = f"l{layer}" + ("_reverse" if direction else "")
        call = self._module(name, x, states) if self.call.module is not None else self._aten(k, x, states)
        out = self._function(operator.getitem, call, 0)
        if direction:
            out = self._function(torch.flip, out, [self.time_axis])
        if not self.has_cell:
            return [out, self._function(operator.getitem, call, 1)]
        if self.call.module is None:
            return [out, *(self._function(operator.getitem, call, i) for i in (1, 2))]
        both = self._function(operator.getitem, call, 1)
        return [out, *(self._function(operator.getitem, both, i) for i in (0, 1))]

    def _module(self, name: str, x: fx.Node, states: list[fx.Node]) -> fx.Node:
        old = self.call.module
        assert isinstance(old, nn.RNNBase)
        path = f"{self.node.target}.{name}"
        if name not in old._modules:  # once for all calls of the module
            set_attr(self.gm, path, _layer(old, name))
        given = [] if not states else [tuple(states) if self.has_cell else states[0]]
        return self._note(self.gm.graph.call_module(path, (x, *given)))

    def _aten(self, k: int, x: fx.Node, states: list[fx.Node]) -> fx.Node:
        call, params = self.call, list(self.call.bound["params"])
        n = len(params) // (self.layers * self.directions)
        hx = states if self.has_cell else states[0]
        given = (x, hx, params[k * n : (k + 1) * n], call["has_biases"], 1, 0.0, call["train"], False)
        target: Any = self.node.target
        return self._function(target, *given, call["batch_first"])

    def _dropped(self, x: fx.Node) -> fx.Node:
        p = float(self.call["dropout"])
        if p == 0:
            return x
        if self.call.module is None:
            return self._function(torch.ops.aten.dropout.default, x, p, self.call["train"])
        path = f"{self.node.target}.between"
        if "between" not in self.call.module._modules:
            set_attr(self.gm, path, nn.Dropout(p).train(self.call.module.training))
        return self._note(self.gm.graph.call_module(path, (x,)))

    def _function(self, target: Callable[..., Any], *args: Any) -> fx.Node:
        return self._note(self.gm.graph.call_function(target, args))

    def _note(self, node: fx.Node) -> fx.Node:
        node.meta = dict(self.meta)
        return node

    def _drop_shapes(self, node: fx.Node) -> None:
        node.meta = {k: v for k, v in node.meta.items() if k not in ("val", "tensor_meta", "example_value")}


def _layer(old: nn.RNNBase, name: str) -> nn.RNNBase:
    """One layer in one direction, with the parameters of a stacked module."""
    tensors = {t: getattr(old, f"{t}_{name}", None) for t in _TENSORS}
    options: dict[str, Any] = {"bias": old.bias, "batch_first": old.batch_first, "device": "meta"}
    if isinstance(old, nn.RNN):
        options["nonlinearity"] = old.nonlinearity
    if old.proj_size:
        options["proj_size"] = old.proj_size
    kind = next(k for k in (nn.LSTM, nn.GRU, nn.RNN) if isinstance(old, k))
    weight = tensors["weight_ih"]
    assert weight is not None
    new = kind(weight.shape[1], old.hidden_size, **options)
    for t, tensor in tensors.items():
        if tensor is not None:
            setattr(new, f"{t}_l0", tensor)
    return new.train(old.training)
