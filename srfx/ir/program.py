"""A graph as the analyses see it: values, parameters by identity, and concrete hint shapes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from srfx.ir.attrs import get_attr

AT_ONCE = 1 << 20
"""Entries of a weight that are read at a time, where that needs room."""


@dataclass(eq=False)
class Param:
    """A parameter, buffer or constant tensor, one object however many names and sites it has."""

    tensor: Tensor
    names: list[str] = field(default_factory=list)
    n_sites: int = 0

    @property
    def shape(self) -> tuple[int, ...]:
        """Sizes of the stored tensor."""
        return tuple(self.tensor.shape)

    def __repr__(self) -> str:
        return f"Param({self.names[0] if self.names else '?'}, {list(self.shape)})"


Value: TypeAlias = fx.Node | Param


class Program:
    """A GraphModule with the hint value of every node; reads only.

    Args:
        gm: the owned graph.
        hints: node -> fake tensor, int or container, as `srfx.ir.shapes.propagate` returns them.
    """

    def __init__(self, gm: fx.GraphModule, hints: dict[fx.Node, Any]) -> None:
        self.gm = gm
        self.hints = hints
        self.modules: dict[str, torch.nn.Module] = dict(gm.named_modules(remove_duplicate=False))
        self._params: dict[int, Param] = {}
        self._finite: dict[Param, bool] = {}
        self._shapes: dict[fx.Node, tuple[int, ...]] = {}
        for name, tensor in named_tensors(gm):
            self._params.setdefault(id(tensor), Param(tensor)).names.append(name)
        self._attributes: dict[fx.Node, Param] = {}
        self._count_sites()
        self.independent = self._independent()
        self.tables = self._tables()

    @property
    def nodes(self) -> Iterator[fx.Node]:
        """All nodes in graph order."""
        return iter(self.gm.graph.nodes)

    def param(self, tensor: Tensor) -> Param:
        """The one Param of this tensor object."""
        return self._params.setdefault(id(tensor), Param(tensor))

    def params(self) -> Iterator[Param]:
        """All parameters, in the order of their first names."""
        return iter(self._params.values())

    def value(self, node: fx.Node) -> Value:
        """The node itself, or the Param that a get_attr node reads."""
        return self._attributes.get(node, node)

    def readers(self, param: Param) -> list[fx.Node]:
        """Calls that take a parameter, as an argument or in their module."""
        found: dict[fx.Node, None] = {}
        for node in self.nodes:
            if node.op == "get_attr" and self._attributes.get(node) is param:
                found |= dict.fromkeys(node.users)
            elif node.op == "call_module" and any(
                t is param.tensor for _, t in named_tensors(self.modules[str(node.target)])
            ):
                found[node] = None
        return list(found)

    def shape(self, value: Value) -> tuple[int, ...]:
        """Concrete hint shape of a tensor value."""
        if isinstance(value, Param):
            return value.shape
        if value not in self._shapes:  # fake tensors are slow to ask
            self._shapes[value] = tuple(int(s) for s in self.hints[value].shape)
        return self._shapes[value]

    def has_attribute(self, path: str) -> bool:
        """Whether the tree has something under this path (an empty slot, as of a missing bias, is nothing)."""
        try:
            return get_attr(self.gm, path) is not None
        except AttributeError:
            return False

    def is_finite(self, param: Param) -> bool:
        """Whether a stored tensor holds no inf and no nan."""
        if param not in self._finite:
            self._finite[param] = _is_finite(param.tensor.detach())
        return self._finite[param]

    def leaves(self, node: fx.Node) -> list[Any]:
        """Hints of the elements of a tuple-valued node, nested ones in a row: facts of a tuple are in this order."""
        return list(pytree.tree_leaves(self.hints.get(node)))

    def is_tensor(self, node: fx.Node) -> bool:
        """Whether a node yields one tensor."""
        return isinstance(self.hints.get(node), Tensor)

    def _independent(self) -> set[fx.Node]:
        """Nodes that no input reaches, not even by its sizes."""
        found: set[fx.Node] = set()
        for node in self.gm.graph.nodes:
            if node.op not in ("placeholder", "output") and all(n in found for n in node.all_input_nodes):
                found.add(node)
        return found

    def _tables(self) -> set[Value]:
        """Tensors made from sizes, literals and stored constants alone: no input's data, nothing that trains."""
        found: set[Value] = set()
        ready: set[fx.Node] = set()
        for node in self.gm.graph.nodes:
            hint, value = self.hints.get(node), self.value(node)
            if isinstance(value, Param):
                made = not isinstance(value.tensor, torch.nn.Parameter)
            else:
                is_number = isinstance(hint, (int, float, bool, torch.Size, torch.dtype, torch.device))
                made = is_number or (
                    node.op.startswith("call")
                    and all(n in ready for n in node.all_input_nodes)
                    and not (node.op == "call_module" and next(self._trained(node), None) is not None)
                )
            if made:
                ready.add(node)
                if isinstance(hint, Tensor) and hint.is_floating_point():
                    found.add(value)
        return found

    def _trained(self, node: fx.Node) -> Iterator[Tensor]:
        """Parameters of the called module."""
        return self.modules[str(node.target)].parameters()

    def _count_sites(self) -> None:
        uses: Counter[int] = Counter()
        for node in self.gm.graph.nodes:
            if node.op == "get_attr":
                tensor = get_attr(self.gm, str(node.target))
                if isinstance(tensor, Tensor):
                    param = self.param(tensor)
                    if node.target not in param.names:
                        param.names.append(node.target)
                    self._attributes[node] = param
                    uses[id(tensor)] += sum(list(_flat(u)).count(node) for u in node.users)
            elif node.op == "call_module":
                for _, tensor in named_tensors(self.modules[node.target]):
                    uses[id(tensor)] += 1
        for key, param in self._params.items():
            param.n_sites = uses[key]


def _flat(node: fx.Node) -> Iterator[fx.Node]:
    found: list[fx.Node] = []
    fx.node.map_arg((node.args, node.kwargs), lambda n: found.append(n))
    return iter(found)


def named_tensors(module: torch.nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Parameters and buffers of a module and all below it, under every name."""
    if not module._modules:  # most called modules: no walk is needed
        for own in (module._parameters, module._buffers):
            yield from ((name, tensor) for name, tensor in own.items() if tensor is not None)
        return
    yield from module.named_parameters(remove_duplicate=False)
    yield from module.named_buffers(remove_duplicate=False)


def rows_at_once(tensor: Tensor, axis: int = 0) -> int:
    """How many positions of an axis to compute with at a time: a wider copy of the whole may be larger than the model."""
    return max(1, AT_ONCE // max(1, tensor.numel() // max(1, tensor.shape[axis])))


def _is_finite(tensor: Tensor) -> bool:
    wide = torch.float64 if tensor.dtype == torch.float64 else torch.float32
    parts = tensor.split(rows_at_once(tensor)) if tensor.dim() else (tensor,)
    return all(
        bool(torch.isfinite(part.sum(dtype=wide))) or bool(torch.isfinite(part).all()) for part in parts
    )
