"""Programs of views and writes drawn at random: out of place they compute what they did in place (theory: W1 to W3)."""

from __future__ import annotations

from typing import Any

import hypothesis.strategies as st
import torch
from hypothesis import given, settings
from torch import fx

from srfx.ir.capture import capture
from srfx.ir.effects import is_mutating
from srfx.passes import Pipeline
from tests.snapshots import assert_same

X = torch.randn(4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))

# All keep what they see square or a vector of 2 or 4, so that many pairs of values broadcast.
VIEWS = (
    ("transpose", (0, 1)), ("t", ()), ("narrow", (0, 1, 2)), ("narrow", (1, 0, 2)), ("select", (0, 1)),
    ("select", (1, 0)), ("view", (4, 4)), ("unsqueeze", (0,)), ("squeeze", ()), ("expand_as",), ("chunk", (2, 0)),
    ("reshape", (-1, 2)), ("contiguous", ()), ("detach", ()), ("clone", ()),
)  # fmt: skip
WRITES = (
    ("add_",), ("mul_",), ("copy_",), ("masked_fill_",), ("relu_", ()), ("zero_", ()), ("fill_", (3.0,)),
    ("clamp_", (-0.5, 0.5)), ("bernoulli_", (0.0,)), ("bernoulli_", (1.0,)), ("unsqueeze_", (0,)), ("t_", ()),
)  # fmt: skip


class Program:
    """A graph as it grows; each step runs as it is drawn, so that only those are kept that torch accepts."""

    def __init__(self) -> None:
        self.graph = fx.Graph()
        x = self.graph.placeholder("x")
        self.values: dict[fx.Node, torch.Tensor] = {}
        for name in ("sin", "cos"):
            self.values[self.graph.call_method(name, (x,))] = getattr(X, name)()

    def step(self, name: str, *args: Any) -> None:
        """Call a method, if it runs and means something."""
        if name.endswith("_") and any(isinstance(a, fx.Node) and self._overlap(args[0], a) for a in args[1:]):
            return
        try:
            found = getattr(self._value(args[0]), name)(*map(self._value, args[1:]))
        except (RuntimeError, IndexError):
            return  # nothing was written: torch checks shapes first
        node = self.graph.call_method(name, args)
        if isinstance(found, tuple):
            node, found = self.graph.call_method("__getitem__", (node, 0)), found[0]
        self.values[node] = found

    def _overlap(self, a: fx.Node, b: fx.Node) -> bool:
        """Whether two values share a storage and are not the same: torch leaves it open what such a write reads."""
        x, y = self.values[a], self.values[b]
        is_same = x.data_ptr() == y.data_ptr() and x.shape == y.shape and x.stride() == y.stride()
        return x.untyped_storage().data_ptr() == y.untyped_storage().data_ptr() and not is_same

    def _value(self, argument: Any) -> Any:
        return self.values[argument] if isinstance(argument, fx.Node) else argument

    def module(self) -> fx.GraphModule:
        """All values are returned, so each name of a storage is read after every write."""
        self.graph.output(tuple(self.values))
        return fx.GraphModule(torch.nn.Module(), self.graph)


@st.composite
def programs(draw: st.DrawFn) -> fx.GraphModule:
    program = Program()
    for _ in range(draw(st.integers(2, 10))):
        nodes = list(program.values)
        target, other = draw(st.sampled_from(nodes)), draw(st.sampled_from(nodes))
        name, *given_args = draw(st.sampled_from(VIEWS) | st.sampled_from(WRITES))
        if given_args:
            program.step(name, target, *given_args[0])
        elif name == "masked_fill_":
            mask = program.graph.call_method("gt", (other, 0))
            program.values[mask] = program.values[other] > 0
            program.step(name, target, mask, 0.5)
        else:
            program.step(name, target, other)
    return program.module()


@settings(max_examples=100)
@given(programs())
def test_out_of_place_is_what_it_was_in_place(program: fx.GraphModule) -> None:
    wanted = program(X)
    gm = capture(program).graph_module
    result = Pipeline(["functionalize"])(gm)
    assert_same(wanted, gm(X))
    left = [n.name for n in gm.graph.nodes if is_mutating(n)]
    assert {r.node for _, r in result.refusals} == set(left)
