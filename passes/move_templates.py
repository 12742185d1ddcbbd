"""Move the constants that a spread brings to a sum into what makes the other summand.

Before: z = bn(x) + spread(y, dim, index, C, template)      After: z = bn'(x) + spread(y, dim, index, C)

The bias of bn' is that of bn plus the template.  What is left is added by `fuse-spreads`, without a full-width copy
(theory: Lemma G9).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from srfx.ir.attrs import drop_unused_attributes, get_attr
from srfx.ir.editor import GraphEdit, GraphEditor
from srfx.ir.edits import SetArgument
from srfx.ir.plan import Edit, Plan
from srfx.ir.program import Program
from srfx.ir.shapes import propagate
from srfx.nn.selection import spread
from srfx.ops.registry import resolve
from srfx.passes.base import HintedPass, register_pass
from srfx.passes.fuse_spreads import FuseSpreads, is_bare, plain_sums

MAX_ROUNDS = 100
"""Sums that hand their constants to one and the same bias wait for each other; to stop early costs a copy each."""


@dataclass(frozen=True)
class MoveTemplate(Edit):
    """The constants of the spread ``node`` go where ``edits`` put them."""

    edits: tuple[GraphEdit, ...] = ()


@register_pass("move-templates")
class MoveTemplates(HintedPass):
    """Let a summand bring the constants of the spread that is added to it.

    Left alone: a spread or a summand that others read too, a summand in front of which nothing adds numbers to channels,
    one whose bias serves other sites, a sum with a bare spread already.
    """

    def plan(self, gm: fx.GraphModule) -> Plan:
        if not any(_brings_constants(n) for n in gm.graph.nodes):
            return Plan()
        values = propagate(gm, self.hints)
        program, edits, taken = Program(gm, values), list[Edit](), set[str]()
        for _, a, b in plain_sums(gm, values):
            if is_bare(gm, a) or is_bare(gm, b):
                continue
            found = _moved(program, a, b) or _moved(program, b, a)
            if found is None or taken & {e.node for e in found.edits}:  # the latter waits for the next round
                continue
            taken |= {e.node for e in found.edits}
            edits.append(found)
        return Plan(edits)

    def apply(self, gm: fx.GraphModule, edit: Edit) -> None:
        assert isinstance(edit, MoveTemplate)
        editor = GraphEditor(gm)
        with torch.no_grad():
            for step in edit.edits:
                step.apply(editor)

    def finish(self, gm: fx.GraphModule) -> None:
        drop_unused_attributes(gm)


def add_narrow_summands(gm: fx.GraphModule, hints: Sequence[Any], on_change: Callable[[], None]) -> None:
    """Move templates, then add what is left of spreads where it belongs.

    Args:
        gm: a graph module that the caller owns.
        hints: as for `MoveTemplates`.
        on_change: called after every round that changed the graph.
    """
    for _ in range(MAX_ROUNDS):
        if not MoveTemplates(hints)(gm).modified:
            break
        on_change()
    if FuseSpreads(hints)(gm).modified:
        on_change()


def _brings_constants(node: fx.Node) -> bool:
    """A spread with a template that one node reads."""
    return node.target is spread and len(node.users) == 1 and _template(node) is not None


def _template(node: fx.Node) -> Any:
    return node.args[4] if len(node.args) > 4 else node.kwargs.get("template")


def _moved(program: Program, narrow: fx.Node, other: fx.Node) -> MoveTemplate | None:
    """The template of one summand goes to the other."""
    if not _brings_constants(narrow):
        return None
    rule, call = resolve(narrow, program)
    template = _template(narrow)
    if not isinstance(template, fx.Node) or template.op != "get_attr" or rule.is_unrecognised(call):
        return None
    numbers = get_attr(program.gm, str(template.target)).detach().double().cpu()
    found = _way(program, other, call["dim"] % len(call.out_shape), numbers)
    if found is None:
        return None
    return MoveTemplate(narrow.name, (*found, SetArgument(narrow.name, "template", None, rule.signature)))


def _way(program: Program, node: fx.Node, axis: int, shift: Tensor) -> tuple[GraphEdit, ...] | None:
    """Edits that add numbers to the channels of ``node``, each call on the way to which has one reader."""
    stack: list[tuple[fx.Node, int, Tensor, tuple[GraphEdit, ...]]] = [(node, axis, shift, ())]
    while stack:
        node, axis, shift, edits = stack.pop()
        if len(node.users) != 1 or not node.op.startswith("call") or not program.is_tensor(node):
            continue
        rule, call = resolve(node, program)
        if rule.is_unrecognised(call):
            continue
        for way in rule.shifted(call, axis, shift):
            if way.operand is None:
                return (*edits, *way.edits)
            assert way.shift is not None
            stack.append((way.operand, way.axis, way.shift, (*edits, *way.edits)))
    return None
