"""Who reads a norm's output: only readers that are linear in it may take the norm's statistics instead."""

from __future__ import annotations

from torch import fx

from srfx.ir.program import Param, Program
from srfx.lattice.movement import follow
from srfx.ops.activation import Random
from srfx.ops.contraction import Contraction
from srfx.ops.movement import Movement
from srfx.ops.registry import resolve


def nonlinear_reader(node: fx.Node, axis: int, program: Program) -> fx.Node | None:
    """What reads ``node`` along ``axis`` and is no contraction with a private weight; None when all readers are."""
    for user in node.users:
        found = _nonlinear(user, node, axis, program)
        if found is not None:
            return found
    return None


def _nonlinear(user: fx.Node, node: fx.Node, axis: int, program: Program) -> fx.Node | None:
    if user.op == "output":
        return user
    rule, call = resolve(user, program)
    if isinstance(rule, Contraction):
        if rule.refused(call) is not None or rule.x(call) is not node or rule.channel_axis(call) != axis:
            return user
        return user if rule.groups(call) > 1 or not rule.takes_statistics or is_tied(user, program) else None
    if isinstance(rule, Movement) and rule.is_followed(call) and rule.source(call) is node:
        there = follow(rule.steps(call), axis)
        return user if there is None else nonlinear_reader(user, there, program)
    if isinstance(rule, Random) and not rule.is_active(call):
        return nonlinear_reader(user, axis, program)
    return user if program.is_tensor(user) else None


def is_tied(reader: fx.Node, program: Program) -> bool:
    """Whether a contraction's weight or bias serves another site too, so that it can take no statistics."""
    rule, call = resolve(reader, program)
    if not isinstance(rule, Contraction):
        return False
    tensors = [call.value(name) for name in ("weight", "bias")]
    return any(isinstance(t, Param) and t.n_sites > 1 for t in tensors)
