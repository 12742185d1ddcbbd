"""Give calls that were in place in the user's graph their in-place form back, where nobody can notice.

Before: y = relu(conv(x))      After: y = relu_(conv(x))
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from torch import fx, nn

from srfx.ir.aliases import AliasClasses
from srfx.ir.effects import is_mutating
from srfx.ir.in_place import forget_in_place, make_in_place, was_in_place
from srfx.ir.plan import Edit, Plan, Reason, Refusal
from srfx.ops.registry import rule_of
from srfx.passes.base import Pass, register_pass


@dataclass(frozen=True)
class RestoreInPlace(Edit):
    """Let ``node`` write its result over its operand; a module does so in all its calls."""


@register_pass("restore-in-place")
class RestoreInPlacePass(Pass):
    """Undo `functionalize` where the write is invisible; meant to run after all passes that analyse.

    The operand has to be storage that its op made and does not read in its own backward (`OpRule.is_overwritable`),
    nobody else may read it under any name, and it has to be the only tensor that the call takes.

    Refuses: MUTATION, with what is in the way.  A module is switched only if all its calls may be.
    """

    def plan(self, gm: fx.GraphModule) -> Plan:
        """Every call that was in place."""
        sites = [node for node in gm.graph.nodes if was_in_place(node)]
        if not sites:
            return Plan()
        modules = dict(gm.named_modules(remove_duplicate=False))
        classes = AliasClasses(gm.graph)
        obstacles = {node: _obstacle(node, classes, modules) for node in sites}
        _share(gm.graph.nodes, obstacles, modules)
        plan = Plan()
        for node, found in obstacles.items():
            if found:
                plan.refusals.append(Refusal(node.name, Reason.MUTATION, found))
            elif not is_mutating(node):
                plan.edits.append(RestoreInPlace(node.name))
        return plan

    def apply(self, gm: fx.GraphModule, edit: Edit) -> None:
        """Make one call in place."""
        make_in_place(gm, next(node for node in gm.graph.nodes if node.name == edit.node))

    def finish(self, gm: fx.GraphModule) -> None:
        """The marks are of no more use."""
        forget_in_place(gm.graph)


def _obstacle(node: fx.Node, classes: AliasClasses, modules: dict[str, nn.Module]) -> str:
    """Why a call must not write over its operand; empty if it may."""
    if len(node.all_input_nodes) != 1:
        return "it takes several operands"
    operand = node.all_input_nodes[0]
    if not operand.op.startswith("call") or is_mutating(operand):
        return f"{operand.name} is not made here"
    if not rule_of(operand, modules).is_overwritable:
        return f"the backward of {operand.name} may read its result"
    if list(operand.users) != [node] or classes.members(operand) != [operand]:
        return f"{operand.name} may be read under another name"
    return ""


def _share(nodes: Iterable[fx.Node], obstacles: dict[fx.Node, str], modules: dict[str, nn.Module]) -> None:
    """What is in the way of one call of a module is in the way of all."""
    calls: dict[nn.Module, list[fx.Node]] = {}
    for node in nodes:
        if node.op == "call_module":
            calls.setdefault(modules[str(node.target)], []).append(node)
    for same in calls.values():
        blocked = [n for n in same if obstacles.get(n, "it was not in place")]
        for node in same if blocked else ():
            if not obstacles.get(node, "-"):
                obstacles[node] = f"{blocked[0].name} calls the same module: it cannot write in place"
