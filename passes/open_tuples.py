"""Write a joined tuple of pieces as a list of them.

Before: y = cat(split(x, [3, 5], 1)[::-1], 1)      After: p = split(x, [3, 5], 1); y = cat([p[1], p[0]], 1)

torch.fx hands a tuple on as one value.  As a list each piece is an operand of its own, so the channels of each are
followed; nothing else changes (theory: Lemma M6).
"""

from __future__ import annotations

import operator
from dataclasses import dataclass

from torch import fx

from srfx.ir.dead_code import remove_dead_nodes
from srfx.ir.plan import Edit, Plan, Reason, Refusal
from srfx.ir.program import Param, Program
from srfx.ir.shapes import propagate
from srfx.ops.join import Concat, Stack
from srfx.ops.registry import resolve
from srfx.ops.splitting import Splitting
from srfx.passes._channels import holds_channels
from srfx.passes.base import HintedPass, register_pass


@dataclass(frozen=True)
class OpenTuple(Edit):
    """The operand ``given`` of ``node`` becomes the list of these elements of ``pieces``."""

    given: str
    pieces: str
    indices: tuple[int, ...]


@register_pass("open-tuples")
class OpenTuples(HintedPass):
    """Turn the tuple that a concatenation or stack takes into a list, where a split of channels makes it.

    The axis has to come from the rows of a weight: then there are as many pieces at every call.

    Refuses: DATA_DEPENDENT when the number of pieces may differ from call to call.
    """

    def plan(self, gm: fx.GraphModule) -> Plan:
        """Every tuple, in graph order; propagates shapes only where there is one."""
        plan, found = Plan(), [n for n in gm.graph.nodes if _takes_one(n)]
        if not found:
            return plan
        program = Program(gm, propagate(gm, self.hints))
        for node in found:
            rule, call = resolve(node, program)
            given = call.bound.get("tensors") if isinstance(rule, (Concat, Stack)) else None
            if not isinstance(given, fx.Node):
                continue
            opened = _elements(given, program)
            if opened is None:
                continue
            pieces, indices = opened
            if _is_fixed(pieces, program):
                plan.edits.append(OpenTuple(node.name, given.name, pieces.name, tuple(indices)))
            else:
                plan.refusals.append(Refusal(node.name, Reason.DATA_DEPENDENT, "the number of pieces"))
        return plan

    def apply(self, gm: fx.GraphModule, edit: Edit) -> None:
        assert isinstance(edit, OpenTuple)
        nodes = {n.name: n for n in gm.graph.nodes}
        node, given, pieces = nodes[edit.node], nodes[edit.given], nodes[edit.pieces]
        with gm.graph.inserting_before(node):
            opened = [gm.graph.call_function(operator.getitem, (pieces, i)) for i in edit.indices]
        node.args = tuple(opened if a is given else a for a in node.args)
        node.kwargs = {k: opened if v is given else v for k, v in node.kwargs.items()}

    def finish(self, gm: fx.GraphModule) -> None:
        remove_dead_nodes(gm)


def _takes_one(node: fx.Node) -> bool:
    first = node.args[0] if node.args else node.kwargs.get("tensors")
    return node.op == "call_function" and isinstance(first, fx.Node)


def _elements(node: fx.Node, program: Program) -> tuple[fx.Node, list[int]] | None:
    """The split that makes a tuple, and which of its pieces the tuple holds."""
    hint = program.hints.get(node)
    if not isinstance(hint, (tuple, list)) or not node.op.startswith("call"):
        return None
    if node.target is operator.getitem:
        part, source = node.args[1], node.args[0]
        if not isinstance(part, slice) or not isinstance(source, fx.Node):
            return None
        if any(isinstance(bound, fx.Node) for bound in (part.start, part.stop, part.step)):
            return None
        inner = _elements(source, program)
        return None if inner is None else (inner[0], inner[1][part])
    is_split = isinstance(resolve(node, program)[0], Splitting)
    return (node, list(range(len(hint)))) if is_split else None


def _is_fixed(pieces: fx.Node, program: Program) -> bool:
    rule, call = resolve(pieces, program)
    assert isinstance(rule, Splitting)
    source = call.value("input")
    if pieces.all_input_nodes[1:]:
        return False  # a size that is computed, or an input
    return isinstance(source, Param) or (
        source is not None and holds_channels(program, source, rule.axis(call))
    )
