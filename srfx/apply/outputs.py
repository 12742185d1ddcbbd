"""Outputs with constant channels: the small graph fills them in, a module needs its rows back."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, fx

from srfx.ir.attrs import get_attr

_WHERE = (torch.where, torch.ops.aten.where.self)
_SELECT = (torch.index_select, torch.ops.aten.index_select.default)


@dataclass(frozen=True)
class FullRows:
    """How the rows of a layer become those of the original.

    Attributes:
        index: for each original row the one that is there, [n].
        varies: whether the row is there at all, [n] bool.
        constant: the value of the others, [n].
        buffers: names of the tensors that say so in the small model.
    """

    index: Tensor
    varies: Tensor
    constant: Tensor
    buffers: tuple[str, ...]

    def weight(self, small: Tensor) -> Tensor:
        """The weight with a row of zeros for each constant channel."""
        layout = [-1, *[1] * (small.dim() - 1)]
        return small.detach().index_select(0, self.index) * self.varies.view(layout).to(small.dtype)

    def bias(self, small: Tensor | None) -> Tensor:
        """The bias, with the constants in place of the rows that are gone."""
        if small is None:
            return torch.where(self.varies, torch.zeros_like(self.constant), self.constant)
        return torch.where(self.varies, small.detach().index_select(0, self.index), self.constant)


def full_rows(small: fx.GraphModule) -> dict[str, FullRows]:
    """For the path of each layer whose result is an output and nothing else, and is filled in there."""
    found: dict[str, FullRows] = {}
    outputs = small.graph.output_node().all_input_nodes
    for where in outputs:
        if where.target not in _WHERE or len(where.args) != 3:
            continue
        mask, picked, template = where.args
        if not (isinstance(picked, fx.Node) and picked.target in _SELECT and len(picked.users) == 1):
            continue
        source, _, index = picked.args
        tensors = (index, mask, template)
        if not isinstance(source, fx.Node) or len(source.users) != 1:
            continue
        names = [str(t.target) for t in tensors if isinstance(t, fx.Node) and t.op == "get_attr"]
        path = _layer(source)
        n_calls = sum(_layer(node) == path for node in small.graph.nodes)
        if path is not None and len(names) == 3 and n_calls == 1:
            i, varies, constant = (get_attr(small, name) for name in names)
            found[path] = FullRows(i, varies.flatten(), constant.flatten(), tuple(names))
    return found


def _layer(node: fx.Node) -> str | None:
    """Path of the linear layer or convolution that a node calls."""
    if node.op == "call_module":
        return str(node.target)
    weight = node.args[1] if node.op == "call_function" and len(node.args) > 1 else None
    if isinstance(weight, fx.Node) and weight.op == "get_attr" and str(weight.target).endswith(".weight"):
        return str(weight.target).removesuffix(".weight")
    return None
