"""Who reads a norm's output: only readers that are linear in it may take the norm's statistics instead."""

from __future__ import annotations

from torch import Tensor, fx
from torch.utils import _pytree as pytree

from srfx.ir.program import Program
from srfx.lattice.movement import Take, follow
from srfx.ops.activation import Random
from srfx.ops.attention import Matmul
from srfx.ops.contraction import Contraction
from srfx.ops.movement import Movement
from srfx.ops.port import Port
from srfx.ops.reduction import SumOver
from srfx.ops.registry import resolve
from srfx.ops.shape import Creation
from srfx.ops.spatial import PerChannel


def nonlinear_reader(
    node: fx.Node, axis: int, program: Program, n_emitted: int = 0, may_bind: bool = True
) -> fx.Node | None:
    """What reads ``node`` along ``axis`` and is no contraction; None when all readers are.

    Args:
        node: the norm, or what movement makes of it.
        axis: of its channels.
        program: that both belong to.
        n_emitted: how many statistics stand behind the channels already.
        may_bind: whether the labels of the norm's channels arrive here, so that a reader may be bound to them.
    """
    may_bind = may_bind and not n_emitted
    for user in node.users:
        found = _nonlinear(user, node, axis, program, n_emitted, may_bind)
        if found is not None:
            return found
    return None


def _nonlinear(
    user: fx.Node, node: fx.Node, axis: int, program: Program, n_emitted: int, may_bind: bool
) -> fx.Node | None:
    if user.op == "output":
        return user
    rule, call = resolve(user, program)
    rule = rule.rule(call) if isinstance(rule, Matmul) else rule
    if isinstance(rule, Contraction):
        if rule.refused(call) is not None or rule.x(call) is not node or rule.channel_axis(call) != axis:
            return user
        return user if rule.groups(call) > 1 or (rule.is_bound(call) and not may_bind) else None
    if isinstance(rule, Movement) and rule.is_followed(call) and rule.source(call) is node:
        steps = rule.steps(call)
        if rule.binds and isinstance(steps[0], Take) and is_part(steps[0], axis, n_emitted):
            return None  # whoever reads this takes channels without places, or what is emitted already
        if isinstance(rule, Port) and rule.is_bound(call):
            return None if may_bind else user
        may_bind = may_bind and not isinstance(rule, Port)  # numbers its channels anew
        there = follow(steps, axis)
        return user if there is None else nonlinear_reader(user, there, program, n_emitted, may_bind)
    if isinstance(rule, (PerChannel, SumOver)) and rule.source(call) is node:
        found = rule.averaged(call, axis)
        return user if found is None else nonlinear_reader(user, found, program, n_emitted, may_bind)
    if isinstance(rule, Random) and not rule.is_active(call):
        return nonlinear_reader(user, axis, program, n_emitted, may_bind)
    if isinstance(rule, Creation):  # of its kind only
        return None
    return (
        user
        if any(isinstance(part, Tensor) for part in pytree.tree_leaves(program.hints.get(user)))
        else None
    )


def is_part(step: Take, axis: int, n_emitted: int) -> bool:
    """Whether a step takes some channels and no statistics, or only statistics."""
    is_statistic = step.source >= step.extent - n_emitted
    return (
        step.axis == axis
        and bool((step.source >= 0).all())
        and bool((is_statistic == is_statistic[:1]).all())
    )
