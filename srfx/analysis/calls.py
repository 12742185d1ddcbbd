"""Every node of a program with its rule, resolved once."""

from __future__ import annotations

from dataclasses import dataclass

from torch import fx

from srfx.ir.aliases import mutation_barriers
from srfx.ir.call import Call
from srfx.ir.effects import updates_statistics
from srfx.ir.fake_run import UNKNOWN
from srfx.ir.plan import Reason
from srfx.ir.program import Program
from srfx.ops.literal import literals
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
        """Whether this call is a barrier that is taken to have effects."""
        return isinstance(self.rule, Unknown)


def sites(program: Program) -> list[Site]:
    """All calls in graph order; an in-place write that is left over, or a size that depends on data, has no rule."""
    found = []
    barred, known = mutation_barriers(program.gm), literals(program)
    for node in program.nodes:
        if node.op not in _CALLS:
            continue
        rule, call = resolve(node, program)
        barrier = Reason.MUTATION if node in barred else _barrier(node, call, program)
        if barrier is None and rule.is_unrecognised(call):
            barrier = Reason.UNRECOGNISED_CALL
        if barrier is not None:
            rule = Unknown(barrier)
        elif node in known:
            rule = known[node]
        found.append(Site(node, rule, call))
    return found


def _barrier(node: fx.Node, call: Call, program: Program) -> Reason | None:
    """Why this very call is none that a rule can speak for."""
    if call.module is not None and (call.module._forward_hooks or call.module._forward_pre_hooks):
        return Reason.OPAQUE_HOOK
    if updates_statistics(node):
        return Reason.TRAINING_MODE
    return Reason.DATA_DEPENDENT if _depends_on_data(node, program) else None


def _depends_on_data(node: fx.Node, program: Program) -> bool:
    return any(program.hints.get(n) is UNKNOWN for n in (node, *node.all_input_nodes))
