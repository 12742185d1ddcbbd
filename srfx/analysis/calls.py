"""Every node of a program with its rule, resolved once."""

from __future__ import annotations

from dataclasses import dataclass

from torch import fx

from srfx.ir.call import Call
from srfx.ir.effects import is_mutating
from srfx.ir.program import Program
from srfx.ir.shapes import UNKNOWN
from srfx.ops.registry import resolve
from srfx.ops.rule import OpRule, Unknown

_CALLS = ("call_function", "call_method", "call_module")


@dataclass(frozen=True)
class Site:
    """A call node, its rule, and the call bound to the rule's argument names."""

    node: fx.Node
    rule: OpRule
    call: Call

    @property
    def is_unknown(self) -> bool:
        return isinstance(self.rule, Unknown)


def sites(program: Program) -> list[Site]:
    """All calls in graph order; an in-place write that is left over, or a size that depends on data, has no rule."""
    found = []
    for node in program.nodes:
        if node.op not in _CALLS:
            continue
        rule, call = resolve(node, program)
        if is_mutating(node) or _depends_on_data(node, program):
            rule = Unknown()
        found.append(Site(node, rule, call))
    return found


def _depends_on_data(node: fx.Node, program: Program) -> bool:
    return any(program.hints.get(n) is UNKNOWN for n in (node, *node.all_input_nodes))
