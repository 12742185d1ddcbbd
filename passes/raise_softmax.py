"""Write the softmax of a decomposed attention as the one op it is, where every query sees a key.

Before: where(~any(~(s == -inf), dim), 0, softmax(s, dim))     After: softmax(s, dim)

Decomposed, attention puts zeros where all keys are masked.  If every row of the scores has an entry that is not -inf
the choice is never taken; while it stands, no constant value can be told to come out of the attention as it went in, and
no part of the scores can be dropped, since the comparison reads them (theory: Lemma A7).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from srfx.ir.dead_code import remove_dead_nodes
from srfx.ir.evaluate import evaluate
from srfx.ir.plan import Edit, Plan
from srfx.ir.program import Param, Program, Value
from srfx.ir.shapes import propagate
from srfx.lattice.movement import follow
from srfx.ops.attention import Product
from srfx.ops.contraction import Contraction
from srfx.ops.elementwise import Product as Multiply
from srfx.ops.elementwise import Sum
from srfx.ops.movement import Movement
from srfx.ops.registry import resolve
from srfx.passes.base import HintedPass, register_pass

aten = torch.ops.aten
_SOFTMAX = (aten._softmax.default, aten.softmax.int)
_ZEROS = (aten.full_like.default, aten.zeros_like.default)


@dataclass(frozen=True)
class RaiseSoftmax(Edit):
    """The choice at ``node`` becomes the node ``softmax``."""

    softmax: str = ""


@register_pass("raise-softmax")
class RaiseSoftmaxes(HintedPass):
    """Drop the choice of zeros around a softmax whose rows all have an entry that is not -inf.

    That is known of sums, products and contractions of finite values, and of such a sum with a mask that no input decides
    and that leaves something in each row.
    """

    def plan(self, gm: fx.GraphModule) -> Plan:
        """Every such choice, in graph order; propagates shapes only where there is a candidate."""
        candidates = [(n, s) for n in gm.graph.nodes if (s := _guarded(n)) is not None]
        if not candidates:
            return Plan()
        program = Program(gm, propagate(gm, self.hints))
        edits = [
            RaiseSoftmax(node.name, softmax.name)
            for node, softmax in candidates
            if _sees_some(program, softmax.args[0], _axis(softmax, program))
        ]
        return Plan(list(edits))

    def apply(self, gm: fx.GraphModule, edit: Edit) -> None:
        """Replace one choice."""
        assert isinstance(edit, RaiseSoftmax)
        nodes = {n.name: n for n in gm.graph.nodes}
        nodes[edit.node].replace_all_uses_with(nodes[edit.softmax])

    def finish(self, gm: fx.GraphModule) -> None:
        """Drop the comparisons."""
        remove_dead_nodes(gm)


# ---------------------------------------------------------------------- recognising
def _guarded(node: fx.Node) -> fx.Node | None:
    """The softmax that a choice guards against rows of -inf."""
    if node.target is not aten.where.self or not node.users:
        return None
    choice: Any
    choice, zeros, softmax = node.args
    if not isinstance(softmax, fx.Node) or softmax.target not in _SOFTMAX or not _is_zero(zeros):
        return None
    dim: Any = softmax.args[1]
    steps: list[tuple[Any, tuple[Any, ...]]] = [
        (aten.logical_not.default, ()),
        (aten.any.dim, (dim, True)),
        (aten.logical_not.default, ()),
    ]
    for target, rest in steps:
        if not isinstance(choice, fx.Node) or choice.target is not target or choice.args[1:] != rest:
            return None
        choice = choice.args[0]
    if not isinstance(choice, fx.Node) or choice.target is not aten.eq.Scalar:
        return None
    return softmax if choice.args == (softmax.args[0], -math.inf) else None


def _axis(softmax: fx.Node, program: Program) -> int:
    dim: Any = softmax.args[1]
    return int(dim) % len(program.shape(softmax))


def _is_zero(node: object) -> bool:
    """Whether a node is full of zeros."""
    if not isinstance(node, fx.Node) or node.target not in _ZEROS:
        return False
    return node.target is aten.zeros_like.default or bool(node.args[1] == 0)


# ---------------------------------------------------------------------- what is known of the scores
def _sees_some(program: Program, node: Any, axis: int) -> bool:
    """Whether each row of a value along an axis has an entry that is not -inf."""
    if _is_finite(program, node):
        return True
    rule, call = resolve(node, program) if node.op.startswith("call") else (None, None)
    if isinstance(rule, Movement) and call is not None and rule.is_followed(call):
        source = rule.source(call)
        whole = [a for a in range(len(call.shape(source))) if follow(rule.steps(call), a) == axis]
        return len(whole) == 1 and isinstance(source, fx.Node) and _sees_some(program, source, whole[0])
    if not isinstance(rule, Sum) or call is None:
        return False
    others = [v for v in call.values() if not _is_finite(program, v)]
    return len(others) == 1 and _leaves_some(program, others[0], axis - len(call.out_shape))


def _leaves_some(program: Program, value: Value, from_end: int) -> bool:
    """Whether a summand that no input decides has, in each row, an entry that is not -inf."""
    if isinstance(value, Param):
        table = value.tensor.detach()
    else:
        found = evaluate(value, program) if value in program.independent else None
        if found is None:
            return False
        table = found
    if table.dim() < -from_end or bool(table.isnan().any()) or bool((table == math.inf).any()):
        return False
    return bool((table != -math.inf).any(from_end).all())


def _is_finite(program: Program, value: Any) -> bool:
    """Whether all numbers of a value are finite because what they are computed from is (theory: H1)."""
    while True:
        if isinstance(value, Param):
            return program.is_finite(value)
        if not isinstance(value, fx.Node) or not value.op.startswith("call"):
            return False
        rule, call = resolve(value, program)
        if isinstance(rule, (Product, Contraction)):
            return True
        if isinstance(rule, (Multiply, Sum)):
            numbers = [a for a in value.args if isinstance(a, (int, float))]
            return all(map(math.isfinite, numbers)) and all(_is_finite(program, v) for v in call.values())
        if not isinstance(rule, Movement) or not rule.is_followed(call):
            return False
        value = rule.source(call)
