"""Whether a value matters only up to a shift: all that is read of it goes into softmax (theory: Lemma A3)."""

from __future__ import annotations

import math
import operator

import torch
from torch import Tensor, fx, nn

from srfx.ir.call import Call
from srfx.ir.program import Param, Program
from srfx.lattice.movement import follow
from srfx.ops.elementwise import Elementwise, Sum
from srfx.ops.elementwise import Product as Multiply
from srfx.ops.movement import Movement
from srfx.ops.reduction import AlongOne, Softmax
from srfx.ops.registry import resolve

aten = torch.ops.aten
_DIVISIONS = (operator.truediv, torch.div, torch.true_divide, "div", "div_", aten.div.Tensor, aten.div.Scalar)
_FILLS = ("masked_fill", torch.masked_fill, aten.masked_fill.Scalar, aten.masked_fill.Tensor)
_CHOICES = (torch.where, aten.where.self, aten.where.ScalarOther, "where")


def is_shift_invariant(node: fx.Node, axis: int, program: Program) -> bool:
    """Whether adding, per position, one number to all of ``node`` along ``axis`` changes no output.

    Followed through sums, through products with what is uniform along the axis, through masks that put a hugely
    negative number, and through movement that leaves the axis whole, up to softmax along that axis.
    """
    users = [u for u in node.users if program.is_tensor(u) or u.op == "output"]
    return bool(users) and all(_absorbs(user, node, axis, program) for user in users)


def _absorbs(user: fx.Node, node: fx.Node, axis: int, program: Program) -> bool:
    if user.op == "output":
        return False
    rule, call = resolve(user, program)
    if isinstance(rule, Softmax):
        return call.value("input") is node and rule.axis(call) == axis
    if isinstance(rule, Movement) and rule.is_followed(call) and rule.source(call) is node:
        there = follow(rule.steps(call), axis)
        return there is not None and is_shift_invariant(user, there, program)
    if (
        isinstance(rule, AlongOne)
        or not isinstance(rule, Elementwise)
        or not _keeps_shift(rule, call, node, axis, program)
    ):
        return False
    shift = len(call.out_shape) - len(program.shape(node))
    return is_shift_invariant(user, axis + shift, program)


def _keeps_shift(rule: Elementwise, call: Call, node: fx.Node, axis: int, program: Program) -> bool:
    """Whether f(x + s) = f(x) + s' with s' uniform along the axis again."""
    target = call.node.target
    if len([n for n in call.node.args if n is node]) != 1 or node in call.node.kwargs.values():
        return False
    if isinstance(rule, Sum):
        return True
    if isinstance(rule, Multiply) or target in _DIVISIONS:
        return (
            call.node.args[0] is node or isinstance(rule, Multiply)
            if _others_uniform(call, node, axis, program)
            else False
        )
    if target in _FILLS:
        return call.node.args[0] is node and _is_mask_value(
            call.bound.get("value", call.node.args[-1]), program
        )
    if target in _CHOICES:
        other = call.node.args[2] if call.node.args[1] is node else call.node.args[1]
        return call.node.args[0] is not node and _is_mask_value(other, program)
    return False


def _others_uniform(call: Call, node: fx.Node, axis: int, program: Program) -> bool:
    """Whether every other operand is a number, or has size 1 along the axis."""
    from_end = len(program.shape(node)) - axis
    for other in call.node.all_input_nodes:
        if other is node or not program.is_tensor(other):
            continue
        shape = program.shape(program.value(other))
        if len(shape) >= from_end and shape[-from_end] != 1:
            return False
    return True


def _is_mask_value(raw: object, program: Program) -> bool:
    """Whether a fill value is so negative that softmax gives 0 whatever is beside it."""
    if isinstance(raw, fx.Node):
        value = program.value(raw)
        raw = value.tensor if isinstance(value, Param) and not isinstance(value.tensor, nn.Parameter) else raw
    if isinstance(raw, Tensor):
        raw = float(raw) if raw.numel() == 1 else math.nan
    return isinstance(raw, (int, float)) and raw <= -1e30
