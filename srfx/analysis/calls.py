"""Every node of a program with its rule, resolved once."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import fx

from srfx.ir.aliases import mutation_barriers
from srfx.ir.attrs import get_attr
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
    found: list[Site] = []
    barriers: dict[fx.Node, Reason] = {}
    barred, known = mutation_barriers(program.gm), literals(program)
    for node in program.nodes:
        if node.op not in _CALLS:
            continue
        rule, call = resolve(node, program)
        barrier = Reason.MUTATION if node in barred else _barrier(node, call, program, barriers)
        if barrier is None and rule.is_unrecognised(call):
            barrier = Reason.UNRECOGNISED_CALL
        if barrier is not None:
            barriers[node], rule = barrier, Unknown(barrier)
        elif node in known:
            rule = known[node]
        found.append(Site(node, rule, call))
    return found


def _barrier(node: fx.Node, call: Call, program: Program, before: Mapping[fx.Node, Reason]) -> Reason | None:
    """Why this very call is none that a rule can speak for; ``before``: the same of the calls before it."""
    if call.module is not None and (call.module._forward_hooks or call.module._forward_pre_hooks):
        return Reason.OPAQUE_HOOK
    if updates_statistics(node):
        return Reason.TRAINING_MODE
    if not any(program.hints.get(n) is UNKNOWN for n in (node, *node.all_input_nodes)):
        return None
    unknown = [n for n in node.all_input_nodes if program.hints.get(n) is UNKNOWN]
    causes = [before[n] for n in unknown if n in before]
    if causes:  # what stands behind a call of unknown shape is unknown for the same reason
        return causes[0]
    return Reason.UNSUPPORTED_DTYPE if _reads_packed(node, call) else Reason.DATA_DEPENDENT


def _reads_packed(node: fx.Node, call: Call) -> bool:
    """Whether weights of the call are packed away in an object of a kernel, as those of quantized layers are."""
    parts = call.module.modules() if call.module is not None else ()
    if any(isinstance(held, torch.ScriptObject) for part in parts for held in vars(part).values()):
        return True
    stored = [n for n in node.all_input_nodes if n.op == "get_attr"]
    return any(isinstance(get_attr(call.program.gm, str(n.target)), torch.ScriptObject) for n in stored)
