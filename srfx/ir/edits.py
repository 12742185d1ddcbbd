"""Edits: what a plan wants changed, as data, each with the one way to carry it out.

Edits refer to nodes by name and to tensors by attribute path, so a plan can be written down and replayed.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from srfx.ir.attrs import free_path, get_attr, set_attr
from srfx.ir.call import write_argument
from srfx.ir.editor import Expr, GraphEdit, GraphEditor, put_tensor, take


@dataclass(frozen=True)
class SetArgument(GraphEdit):
    """Argument ``name`` of a call becomes ``value``; for a module the attribute of that name."""

    name: str
    value: Expr
    signature: tuple[str, ...] = ()

    def apply(self, editor: GraphEditor) -> None:
        node = editor.nodes[self.node]
        if node.op == "call_module":
            setattr(editor.own_module(node), self.name, self.value)
        else:
            write_argument(node, self.signature, self.name, editor.build(self.value, node))


@dataclass(frozen=True)
class CompactTensor(GraphEdit):
    """The tensor at ``paths`` keeps ``index`` along each axis, in this order (see `take`)."""

    paths: tuple[str, ...]
    selections: tuple[tuple[int, Tensor], ...]
    is_done: bool = False  # a `SetTensor` of the same plan brings the cut tensor already

    def apply(self, editor: GraphEditor) -> None:
        if self.is_done:
            return
        old = get_attr(editor.gm, self.paths[0])
        new = old.detach()
        for axis, index in self.selections:
            new = take(new, axis, index)
        put_tensor(editor.gm, self.paths, new.contiguous(), like=old)


@dataclass(frozen=True)
class SetTensor(GraphEdit):
    """Argument ``name`` of a call, a tensor at ``paths``, gets new values; created where the call had none.

    Without a ``signature`` the created tensor is stored only.
    """

    name: str
    paths: tuple[str, ...]
    tensor: Tensor
    creates: bool = False
    trainable: bool = True
    signature: tuple[str, ...] = ()

    def apply(self, editor: GraphEditor) -> None:
        node = editor.nodes[self.node]
        fresh = (
            torch.nn.Parameter(self.tensor, self.trainable)
            if self.creates and self.trainable
            else self.tensor
        )
        like = fresh if self.creates else get_attr(editor.gm, self.paths[0])
        put_tensor(editor.gm, self.paths, self.tensor, like=like)
        if self.creates and self.signature and node.op != "call_module":
            write_argument(node, self.signature, self.name, editor.attribute_node(self.paths[0], node))


@dataclass(frozen=True)
class ReplaceOperand(GraphEdit):
    """Every use of node ``operand`` in this call becomes a constant tensor kept in a buffer at ``path``."""

    operand: str
    path: str
    tensor: Tensor

    def apply(self, editor: GraphEditor) -> None:
        node = editor.nodes[self.node]
        node.replace_input_with(editor.nodes[self.operand], editor.store(self.path, self.tensor, node))


@dataclass(frozen=True)
class NarrowOperand(GraphEdit):
    """This call reads only the first ``length`` channels of node ``operand``."""

    operand: str
    dim: int
    length: int

    def apply(self, editor: GraphEditor) -> None:
        node, operand = editor.nodes[self.node], editor.nodes[self.operand]
        with editor.gm.graph.inserting_before(node):
            first = editor.gm.graph.call_function(torch.narrow, (operand, self.dim, 0, self.length))
        node.replace_input_with(operand, first)


@dataclass(frozen=True)
class AddLinear(GraphEdit):
    """To the call's result a new linear layer of the channels of ``operand`` from ``start`` on is added."""

    operand: str
    dim: int
    start: int
    weight: Tensor
    bias: Tensor | None
    trainable: bool

    def apply(self, editor: GraphEditor) -> None:
        node, operand, graph = editor.nodes[self.node], editor.nodes[self.operand], editor.gm.graph
        n_rows, n_columns = self.weight.shape
        layer = nn.Linear(n_columns, n_rows, bias=self.bias is not None, device="meta")
        layer.weight = nn.Parameter(self.weight, self.trainable)
        if self.bias is not None:
            layer.bias = nn.Parameter(self.bias, self.trainable)
        path = free_path(editor.gm, f"{self.node}_statistics")
        set_attr(editor.gm, path, layer.train(editor.gm.training))
        users = list(node.users)
        with graph.inserting_after(node):
            rest = graph.call_function(torch.narrow, (operand, self.dim, self.start, n_columns))
        with graph.inserting_after(rest):
            extra = graph.call_module(path, (rest,))
        with graph.inserting_after(extra):
            total = graph.call_function(operator.add, (node, extra))
        for user in users:
            user.replace_input_with(node, total)
        editor.nodes[self.node] = total  # what a later edit means by this name


@dataclass(frozen=True)
class AddStored(GraphEdit):
    """To the call's result the tensor at ``path`` is added."""

    path: str

    def apply(self, editor: GraphEditor) -> None:
        node, graph = editor.nodes[self.node], editor.gm.graph
        users = list(node.users)
        stored = editor.attribute_node(self.path, node.next)
        with graph.inserting_after(stored):
            total = graph.call_function(operator.add, (node, stored))
        for user in users:
            user.replace_input_with(node, total)
        editor.nodes[self.node] = total  # what a later edit means by this name


@dataclass(frozen=True)
class PickFromTable(GraphEdit):
    """This call reads only the kept positions of node ``operand``, of another set for each head where they differ.

    ``selections``: (axis of the result, index); an index of one axis selects, a ragged one gathers and broadcasts.
    ``n_missing``: leading axes of the result that the table does not have.
    """

    operand: str
    path: str
    selections: tuple[tuple[int, Tensor], ...]
    rank: int
    n_missing: int = 0

    def apply(self, editor: GraphEditor) -> None:
        node, table = editor.nodes[self.node], editor.nodes[self.operand]
        graph, picked = editor.gm.graph, editor.nodes[self.operand]
        if self.n_missing and any(index.dim() > 1 for _, index in self.selections):
            with graph.inserting_before(node):
                entry: Any = (None,) * self.n_missing + (Ellipsis,)
                picked = graph.call_function(operator.getitem, (picked, entry))
        for axis, index in self.selections:
            stored = editor.store(f"{self.path}_{axis}", index, node)
            function = torch.index_select if index.dim() == 1 else torch.take_along_dim
            args = (
                (picked, axis - self.rank, stored) if index.dim() == 1 else (picked, stored, axis - self.rank)
            )
            with graph.inserting_before(node):
                picked = graph.call_function(function, args)
        node.replace_input_with(table, picked)


@dataclass(frozen=True)
class Bypass(GraphEdit):
    """The call computes its operand ``by`` and goes."""

    by: str

    def apply(self, editor: GraphEditor) -> None:
        node = editor.nodes[self.node]
        node.replace_all_uses_with(editor.nodes[self.by])
        editor.nodes[self.node] = editor.nodes[self.by]  # what a later edit means by this name


@dataclass(frozen=True)
class StoreResult(GraphEdit):
    """The call goes; whoever reads its result reads a constant tensor kept in a buffer at ``path``."""

    path: str
    tensor: Tensor

    def apply(self, editor: GraphEditor) -> None:
        node = editor.nodes[self.node]
        stored = editor.store(self.path, self.tensor, node)
        node.replace_all_uses_with(stored)
        editor.nodes[self.node] = stored


@dataclass(frozen=True)
class AffineAfter(GraphEdit):
    """The call's result is multiplied by a number and a constant tensor at ``path`` is added."""

    scale: float
    path: str | None
    tensor: Tensor | None

    def apply(self, editor: GraphEditor) -> None:
        node, graph = editor.nodes[self.node], editor.gm.graph
        users = list(node.users)
        result = node
        if self.scale != 1:
            with graph.inserting_after(result):
                result = graph.call_function(operator.mul, (result, self.scale))
        if self.path is not None and self.tensor is not None:
            shift = editor.store(self.path, self.tensor, result.next)
            with graph.inserting_after(shift):
                result = graph.call_function(operator.add, (result, shift))
        for user in users:
            user.replace_input_with(node, result)
        editor.nodes[self.node] = result


@dataclass(frozen=True)
class Retarget(GraphEdit):
    """The call becomes a call of ``target`` with the same first operand and ``rest`` behind it."""

    target: Any
    rest: tuple[Expr, ...]

    def apply(self, editor: GraphEditor) -> None:
        node = editor.nodes[self.node]
        first = node.args[0] if node.args else next(iter(node.kwargs.values()))
        node.op, node.target = "call_function", self.target
        node.args, node.kwargs = (first, *self.rest), {}


@dataclass(frozen=True)
class ViewAnyLayout(GraphEdit):
    """A ``view`` becomes a ``reshape``, which is the same view where its operand's strides allow one."""

    def apply(self, editor: GraphEditor) -> None:
        node = editor.nodes[self.node]
        if node.target == "view":
            node.target = "reshape"
        elif node.target is torch.ops.aten.view.default:
            node.target = torch.ops.aten.reshape.default


@dataclass(frozen=True)
class Recall(GraphEdit):
    """The call becomes a call of the function ``target`` with these arguments."""

    target: Any
    args: tuple[Expr, ...]
    kwargs: dict[str, Expr]

    def apply(self, editor: GraphEditor) -> None:
        node = editor.nodes[self.node]
        args, kwargs = editor.build(self.args, node), editor.build(self.kwargs, node)
        node.op, node.target, node.args, node.kwargs = "call_function", self.target, args, kwargs


@dataclass(frozen=True)
class ReplaceModule(GraphEdit):
    """The called module becomes another one, which takes over the old one's ``tensors``."""

    module: torch.nn.Module
    tensors: tuple[str, ...]

    def apply(self, editor: GraphEditor) -> None:
        path = str(editor.nodes[self.node].target)
        old = editor.gm.get_submodule(path)
        for name in self.tensors:
            setattr(self.module, name, getattr(old, name))
        self.module.train(old.training)
        set_attr(editor.gm, path, self.module)


@dataclass(frozen=True)
class IndexInstead(GraphEdit):
    """A slicing call becomes ``index_select`` of its operand along ``axis`` (positions no longer form a slice)."""

    operand: str
    axis: int
    path: str
    index: Tensor

    def apply(self, editor: GraphEditor) -> None:
        node, graph = editor.nodes[self.node], editor.gm.graph
        index = editor.store(self.path, self.index, node)
        with graph.inserting_before(node):
            new = graph.call_function(torch.index_select, (editor.nodes[self.operand], self.axis, index))
        node.replace_all_uses_with(new)
        editor.nodes[self.node] = new


@dataclass(frozen=True)
class ReorderOperand(GraphEdit):
    """The call reads positions ``index`` of its operand along ``axis`` instead of the operand itself."""

    operand: str
    axis: int
    path: str
    index: Tensor

    def apply(self, editor: GraphEditor) -> None:
        node, graph = editor.nodes[self.node], editor.gm.graph
        operand = editor.nodes[self.operand]
        index = editor.store(self.path, self.index, node)
        with graph.inserting_before(node):
            new = graph.call_function(torch.index_select, (operand, self.axis, index))
        node.replace_input_with(operand, new)


@dataclass(frozen=True)
class SelectOperands(GraphEdit):
    """Tensors of argument ``name`` (one, or a tuple of them) are read at an index along an axis; None leaves one."""

    name: str
    selections: tuple[tuple[int, Tensor] | None, ...]
    signature: tuple[str, ...]

    def apply(self, editor: GraphEditor) -> None:
        node, graph = editor.nodes[self.node], editor.gm.graph
        raw: Any = (
            node.kwargs[self.name] if self.name in node.kwargs else node.args[self.signature.index(self.name)]
        )
        is_one = isinstance(raw, fx.Node)
        parts: list[Any] = [raw] if is_one else list(raw)
        for i, selection in enumerate(self.selections):
            if selection is None:
                continue
            index = editor.store(f"{self.node}_{self.name}_{i}", selection[1], node)
            with graph.inserting_before(node):
                parts[i] = graph.call_function(torch.index_select, (parts[i], selection[0], index))
        value = parts[0] if is_one else tuple(parts) if isinstance(raw, tuple) else parts
        write_argument(node, self.signature, self.name, value)


@dataclass(frozen=True)
class RestoreOutput(GraphEdit):
    """An output regains its removed channels: gather the kept ones, put constants elsewhere.

    ``where(mask, index_select(y, axis, index), template)`` needs no sizes, so any batch and picture size works.
    ``node`` is the output node, ``result`` the value that lost channels.
    """

    result: str
    axis: int
    index: Tensor
    mask: Tensor
    template: Tensor

    def apply(self, editor: GraphEditor) -> None:
        graph, output = editor.gm.graph, editor.nodes[self.node]
        result = editor.restored.get(
            self.result, editor.nodes[self.result]
        )  # of another axis that lost channels
        index, mask, template = (
            editor.store(f"{self.result}_output_{role}", getattr(self, role), output)
            for role in ("index", "mask", "template")
        )
        with graph.inserting_before(output):
            gathered = graph.call_function(torch.index_select, (result, self.axis, index))
            restored = graph.call_function(torch.where, (mask, gathered, template))
        output.replace_input_with(result, restored)
        editor.restored[self.result] = restored


@dataclass(frozen=True)
class FreezeSize(GraphEdit):
    """A read of a size that is about to change keeps yielding the original number."""

    value: Expr

    def apply(self, editor: GraphEditor) -> None:
        node = editor.nodes[self.node]
        users = list(node.users)
        frozen = editor.build(self.value, node.next)  # it may be computed from the number itself
        for user in users:
            user.args = fx.node.map_arg(user.args, lambda n: frozen if n is node else n)
            user.kwargs = fx.node.map_arg(user.kwargs, lambda n: frozen if n is node else n)
