"""The editor: carries out edits of a graph; arguments that are computed in the graph are expressions."""

from __future__ import annotations

import copy
import operator
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from srfx.ir.attrs import free_path, set_attr
from srfx.ir.plan import Edit


@dataclass(frozen=True)
class Ref:
    """The value of another node."""

    node: str


@dataclass(frozen=True)
class Item:
    """Element ``index`` of a node that yields a tuple or a torch.Size."""

    node: str
    index: int


@dataclass(frozen=True)
class Scaled:
    """``size * numerator // denominator``: an axis that repeats its channels, a kept part of it (exact)."""

    size: Ref | Item | SizeOf | int
    numerator: int
    denominator: int


@dataclass(frozen=True)
class SizeOf:
    """The runtime size of a tensor node along an axis."""

    node: str
    axis: int


@dataclass(frozen=True)
class Stored:
    """A constant tensor, kept in a buffer at ``path``."""

    path: str
    tensor: Tensor


Expr = Any


"""int, bool, str, None, Ref, Item, Scaled, SizeOf, or a list or tuple of these."""


class GraphEditor:
    """A GraphModule under edit: nodes by name, new nodes before or after old ones."""

    def __init__(self, gm: fx.GraphModule) -> None:
        self.gm = gm
        self.nodes: dict[str, fx.Node] = {n.name: n for n in gm.graph.nodes}
        self._sizes: dict[tuple[Any, ...], fx.Node] = {}
        self._calls: Counter[torch.nn.Module] | None = None  # how many nodes call a module
        self.selections: dict[tuple[Any, ...], fx.Node] = {}  # made so far, by what they select
        self.restored: dict[str, fx.Node] = {}  # what the output returns for a value, by its name

    def build(self, expr: Expr, before: fx.Node) -> Any:
        """Turn an expression into an argument, creating nodes before ``before``."""
        graph = self.gm.graph
        if isinstance(expr, (list, tuple)):
            return type(expr)(self.build(e, before) for e in expr)
        if isinstance(expr, dict):
            return {key: self.build(e, before) for key, e in expr.items()}
        if isinstance(expr, Ref):
            return self.nodes[expr.node]
        with graph.inserting_before(before):
            if isinstance(expr, Item):
                return graph.call_function(operator.getitem, (self.nodes[expr.node], expr.index))
            if isinstance(expr, SizeOf):
                return graph.call_function(torch.ops.aten.sym_size.int, (self.nodes[expr.node], expr.axis))
            if isinstance(expr, Stored):
                return self.store(expr.path, expr.tensor, before)
            if isinstance(expr, Scaled):
                size = self.build(expr.size, before)
                product = graph.call_function(operator.mul, (size, expr.numerator))
                return graph.call_function(operator.floordiv, (product, expr.denominator))
        return expr

    def own_module(self, node: fx.Node) -> torch.nn.Module:
        """The module that a node calls; one without tensors that other nodes call too is copied for this one.

        Sites of a module with tensors keep the same channels, those of a module without may differ.
        """
        module = self.gm.get_submodule(str(node.target))
        if next(module.parameters(), None) is None and next(module.buffers(), None) is None:
            if self._calls is None:
                calls = self.gm.graph.find_nodes(op="call_module")
                self._calls = Counter(self.gm.get_submodule(str(n.target)) for n in calls)
            if self._calls[module] > 1:
                self._calls[module] -= 1
                module = copy.copy(module)
                node.target = free_path(self.gm, f"{node.name}_own")
                set_attr(self.gm, node.target, module)
                self._calls[module] = 1
        return module

    def store(self, wanted: str, tensor: Tensor, before: fx.Node) -> fx.Node:
        """Keep a tensor in a buffer at ``wanted``, or at a path like it that is free, and read it there.

        An edit of an earlier round, or of another operand, may have taken the path.
        """
        path = free_path(self.gm, wanted)
        set_attr(self.gm, path, tensor)
        return self.attribute_node(path, before)

    def attribute_node(self, path: str, before: fx.Node) -> fx.Node:
        """A get_attr node of ``path`` that stands before ``before``."""
        with self.gm.graph.inserting_before(before):
            return self.gm.graph.get_attr(path)


class GraphEdit(Edit):
    """An edit that a GraphEditor can carry out."""

    def apply(self, editor: GraphEditor) -> None:
        """Change the graph under edit."""
        raise NotImplementedError


def take(tensor: Tensor, axis: int, index: Tensor) -> Tensor:
    """Select positions along an axis; a ragged index has the tensor's rank and picks per outer row."""
    index = index.to(tensor.device)
    if index.dim() == 1:
        return tensor.index_select(axis, index)
    wide = [
        index.shape[d] if d == axis else max(index.shape[d], tensor.shape[d]) for d in range(tensor.dim())
    ]
    base = [tensor.shape[d] if d == axis else wide[d] for d in range(tensor.dim())]
    return tensor.expand(base).gather(axis, index.expand(wide))


def same_numbers(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors of one shape hold the same numbers; a nan is the same as a nan, or no rewrite would end."""
    return bool(((a == b) | (a.isnan() & b.isnan())).all())


def put_tensor(gm: fx.GraphModule, paths: Iterable[str], tensor: Tensor, like: Tensor) -> None:
    """Store one tensor under all its names: a parameter where ``like`` is one, in its memory format."""
    for memory_format in (torch.channels_last, torch.channels_last_3d):
        if like.dim() == tensor.dim() and _is_only(like, memory_format):
            tensor = tensor.contiguous(memory_format=memory_format)
    new = torch.nn.Parameter(tensor, like.requires_grad) if isinstance(like, torch.nn.Parameter) else tensor
    for path in paths:
        set_attr(gm, path, new)


def _is_only(tensor: Tensor, memory_format: torch.memory_format) -> bool:
    n_axes = 4 if memory_format is torch.channels_last else 5
    return (
        tensor.dim() == n_axes
        and tensor.is_contiguous(memory_format=memory_format)
        and not tensor.is_contiguous()
    )
