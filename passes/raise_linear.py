"""Raise what decomposition made of linear layers back to one op.

Before: w = t(weight); y = addmm(bias, x, w)      After: y = linear(x, weight, bias)
Before: y = x @ weight.T  (mm, matmul)            After: y = linear(x, weight)         [the same sums]
Before: y = bmm(x, expand(w))                     After: y = linear(x, weight), or matmul(x, w)
Before: y = view(linear(x, weight)) + bias        After: y = view(linear(x, weight, bias))

The weight then stands where rules look for it, its zeros are seen, there is a place for a bias that takes constants,
and the result is the smaller graph.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx

from srfx.ir.attrs import get_attr
from srfx.ir.dead_code import remove_dead_nodes
from srfx.ir.effects import op_name
from srfx.ir.plan import Edit, Plan
from srfx.passes.base import Pass, register_pass

aten = torch.ops.aten
_PRODUCTS = (aten.mm.default, aten.matmul.default, torch.mm, torch.matmul, operator.matmul)
_METHODS = ("mm", "matmul")
_VIEWS = (aten.view.default, aten.reshape.default, aten._unsafe_view.default)
_REPEATS = (aten.expand.default, *_VIEWS)
_LINEAR = (aten.linear.default, F.linear)
_SUMS = (operator.add, torch.add, aten.add.Tensor)
_FLIPS = ("t", "numpy_T", "matrix_H", "mT", "adjoint")


@dataclass(frozen=True)
class RaiseLinear(Edit):
    """``node`` becomes ``linear(x, weight, bias)``, or ``x @ weight``; all named by node."""

    x: str = ""
    weight: str = ""
    bias: str | None = None
    is_transposed: bool = True


@dataclass(frozen=True)
class TakeBias(Edit):
    """The linear layer ``node``, which has no bias, adds the stored vector at ``path`` in place of the node ``sum``."""

    sum: str = ""
    path: str = ""


@register_pass("raise-linear")
class RaiseLinears(Pass):
    """Turn addmm and mm with a transposed stored weight into linear, bmm with a repeated one too; add what is a bias.

    Left alone: scaled addmm, a bias that is not one stored vector, a weight that is computed.
    """

    def plan(self, gm: fx.GraphModule) -> Plan:
        edits: list[Edit] = []
        for node in gm.graph.nodes:
            if _is_product(node):
                weight = _transposed(node.args[1])
                if weight is not None and isinstance(node.args[0], fx.Node):
                    edits.append(RaiseLinear(node.name, node.args[0].name, weight.name))
            elif node.target is aten.bmm.default:
                matrix = _repeated(node.args[1])
                weight = _transposed(matrix) if matrix is not None else None
                if matrix is not None and (weight is not None or _stored_rank(matrix) == 2):
                    found = weight if weight is not None else matrix
                    edits.append(
                        RaiseLinear(
                            node.name, node.args[0].name, found.name, is_transposed=weight is not None
                        )
                    )
            elif node.target is aten.addmm.default and all(v == 1 for v in node.kwargs.values()):
                bias, weight = node.args[0], _transposed(node.args[2])
                if weight is not None and _stored_rank(bias) == 1:
                    edits.append(RaiseLinear(node.name, node.args[1].name, weight.name, bias.name))
            elif node.target in _LINEAR and len(node.args) == 2 and not node.kwargs:
                added = _added(node)
                if added is not None:
                    edits.append(TakeBias(node.name, *added))
        return Plan(edits)

    def apply(self, gm: fx.GraphModule, edit: Edit) -> None:
        nodes = {n.name: n for n in gm.graph.nodes}
        if isinstance(edit, TakeBias):
            node, sum_ = nodes[edit.node], nodes[edit.sum]
            with gm.graph.inserting_before(node):
                node.args = (*node.args, gm.graph.get_attr(edit.path))
            sum_.replace_all_uses_with(sum_.args[0])
            return
        assert isinstance(edit, RaiseLinear)
        node, names = nodes[edit.node], (edit.x, edit.weight, edit.bias)
        is_aten = isinstance(node.target, torch._ops.OpOverload)
        node.op, node.target = "call_function", aten.linear.default if is_aten else F.linear
        if not edit.is_transposed:
            node.target = aten.matmul.default
        node.args, node.kwargs = tuple(nodes[n] for n in names if n is not None), {}

    def finish(self, gm: fx.GraphModule) -> None:
        remove_dead_nodes(gm)


def _is_product(node: fx.Node) -> bool:
    """Whether a node is x @ w, in any spelling."""
    is_one = node.target in (_METHODS if node.op == "call_method" else _PRODUCTS)
    return is_one and node.op.startswith("call") and len(node.args) == 2 and not node.kwargs


def _repeated(node: object) -> fx.Node | None:
    """The matrix that a node repeats along leading axes: views and expands that leave its two axes as they are."""
    above: list[Any] = []
    while isinstance(node, fx.Node) and node.target in _REPEATS:
        above.append(node.args[1])
        node = node.args[0]
    if not isinstance(node, fx.Node) or not above:
        return None
    stored = _transposed(node)
    shape = _stored_shape(node) if stored is None else _stored_shape(stored)[::-1]
    return node if len(shape) == 2 and all(tuple(sizes[-2:]) == shape for sizes in above) else None


def _added(node: fx.Node) -> tuple[str, str] | None:
    """The sum of a linear layer's result, through views that leave its last axis, with a stored vector; its path."""
    weight = node.args[1]
    width = _stored_shape(weight)[:1]
    value = node
    while len(value.users) == 1:
        user = next(iter(value.users))
        sizes: Any = user.args[1] if len(user.args) > 1 else ()
        if user.target in _VIEWS and tuple(sizes[-1:]) == width:
            value = user
            continue
        if user.target not in _SUMS or len(user.args) != 2 or user.kwargs or user.args[0] is not value:
            return None
        bias = user.args[1]
        is_bias = isinstance(bias, fx.Node) and width and _stored_shape(bias) == width
        return (user.name, str(bias.target)) if is_bias else None  # type: ignore[union-attr]
    return None


def _transposed(node: object) -> fx.Node | None:
    """The stored matrix whose transpose a node is."""
    if not isinstance(node, fx.Node) or node.op not in ("call_function", "call_method") or node.kwargs:
        return None
    source, *rest = node.args or (None,)
    if not isinstance(source, fx.Node) or _stored_rank(source) != 2:
        return None
    name = op_name(node)
    if name in ("permute", "transpose"):
        given: Any = rest[0] if len(rest) == 1 else rest
        is_known = isinstance(given, (list, tuple)) and all(isinstance(a, int) for a in given)
        axes = [a % 2 for a in given] if is_known else []
        return source if axes == [1, 0] or (name == "transpose" and axes == [0, 1]) else None
    flips = rest in (["T"], ["mT"]) if name == "getattr" else name in _FLIPS and not rest
    return source if flips else None


def _stored_rank(node: object) -> int | None:
    """Number of axes of a stored tensor; None for anything computed."""
    return len(_stored_shape(node)) or None


def _stored_shape(node: object) -> tuple[int, ...]:
    """Sizes of a stored tensor; () for anything computed."""
    if not isinstance(node, fx.Node) or node.op != "get_attr":
        return ()
    owner = node.graph.owning_module
    assert owner is not None
    found = get_attr(owner, str(node.target))
    return tuple(found.shape) if isinstance(found, torch.Tensor) else ()
