"""Values made from literals alone: slopes of ALiBi, tables of distances (theory: Lemma S3)."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, fx

from srfx.ir.call import Call
from srfx.ir.editor import GraphEdit
from srfx.ir.edits import StoreResult
from srfx.ir.evaluate import evaluate
from srfx.ir.program import Program, Value
from srfx.lattice.constancy import Constancy
from srfx.lattice.movement import Fields
from srfx.ops.facts import Demand, FactTable, Labeller, Live
from srfx.ops.rule import OpRule

MAX_ELEMENTS = 1 << 16


class Literal(OpRule):
    """A call that no input and no stored tensor reaches: it is a table of known numbers, with channels on every axis.

    Where channels go, the rest of the table is stored.  It stands in for the op's own rule at the last such call.
    """

    def __init__(self, value: Tensor) -> None:
        self.value = value

    def label(self, call: Call, labels: Labeller) -> Fields:
        shape = call.out_shape
        return {
            a: labels.table.fresh(n).view([n if i == a else 1 for i in range(len(shape))])
            for a, n in enumerate(shape)
            if n > 1
        }

    def forward(self, call: Call, facts: FactTable) -> Constancy:
        return Constancy.known(self.value)

    def backward(self, call: Call, live: Live, facts: FactTable) -> Demand:
        return {}

    def reads(self, call: Call, facts: FactTable) -> list[Value]:
        return call.values()

    def compact(self, call: Call, facts: FactTable) -> Iterable[GraphEdit]:
        fields, shape = facts.fields(call.node), call.out_shape
        if not facts.steps(fields, shape):
            return []
        kept = facts.compact(self.value, fields, shape).contiguous()
        return [StoreResult(call.node.name, f"{call.node.name}_kept", kept)]


def literals(program: Program) -> dict[fx.Node, Literal]:
    """Rules for the float values that literals alone make and that something else reads; uniform ones need none."""
    made: set[fx.Node] = set()
    for node in program.nodes:
        is_call = node.op in ("call_function", "call_method")
        if is_call and all(n in made for n in node.all_input_nodes):
            made.add(node)
    found: dict[fx.Node, Literal] = {}
    for node in program.nodes:
        hint = program.hints.get(node)
        if node not in made or all(user in made for user in node.users):
            continue
        if (
            not isinstance(hint, Tensor)
            or not hint.is_floating_point()
            or not 1 < hint.numel() <= MAX_ELEMENTS
        ):
            continue
        value = evaluate(node, program)
        if (
            value is not None
            and bool(torch.isfinite(value).all())
            and bool((value != value.flatten()[0]).any())
        ):
            found[node] = Literal(value)
    return found
