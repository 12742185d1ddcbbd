"""Which values of a graph share storage: what an in-place write through one of them changes."""

from __future__ import annotations

import operator
from enum import Enum
from functools import cache
from typing import Any

import torch
from torch import fx, nn
from torch.nn import functional as F

from srfx.ir.attrs import get_attr
from srfx.ir.effects import is_mutating, op_name, updates_statistics

_VIEWS = frozenset(
    [
        "view", "view_as", "transpose", "permute", "slice", "select", "narrow", "unsqueeze", "squeeze",
        "expand", "expand_as", "t", "T", "mT", "swapaxes", "swapdims", "movedim", "moveaxis", "detach",
        "alias", "diagonal", "as_strided", "unfold", "split", "split_with_sizes", "chunk", "unbind",
        "tensor_split", "real", "broadcast_to", "unflatten", "unsafe_chunk",
    ]
)  # fmt: skip
_MAYBE_VIEWS = frozenset(
    [
        "reshape", "reshape_as", "flatten", "contiguous", "to", "type", "type_as", "float", "half",
        "double", "bfloat16", "long", "int", "bool", "cpu", "cuda", "dropout", "dropout1d", "dropout2d",
        "dropout3d", "alpha_dropout", "feature_dropout", "feature_alpha_dropout", "stochastic_depth",
        "clone_", "requires_grad_", "pad", "lift", "lift_fresh", "ravel", "atleast_1d", "atleast_2d",
        "atleast_3d",
    ]
)  # fmt: skip
_TUPLE_VIEWS = frozenset(["split", "split_with_sizes", "chunk", "unbind", "tensor_split"])
_MAYBE_VIEW_MODULES = (
    nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout, nn.Flatten,
)  # fmt: skip
_SCALAR_ATTRIBUTES = frozenset({"shape", "ndim", "dtype", "device", "layout", "is_cuda", "requires_grad"})
_SCALAR_METHODS = frozenset(
    {"size", "dim", "numel", "ndimension", "item", "stride", "nelement", "get_device"}
)
_SCALAR_ATEN = frozenset(
    {"sym_size", "sym_numel", "sym_stride", "sym_is_contiguous", "item", "_local_scalar_dense"}
)


class Link(Enum):
    """How a node's value relates to the storage of one of its operands."""

    SAME = "the operand itself"
    VIEW = "always a view of the operand"
    MAYBE = "a view or a copy, not known here"


class Kind(Enum):
    """What a node's value is, as far as the graph alone tells."""

    TENSOR = "tensor"
    SCALAR = "number, size, dtype ..."
    UNKNOWN = "unknown"


def alias_link(node: fx.Node, kinds: dict[fx.Node, Kind] | None = None) -> tuple[fx.Node, Link] | None:
    """The operand whose storage the result of ``node`` shares, and how; None when the result is fresh."""
    if node.op in ("placeholder", "get_attr", "output"):
        return None
    sources = node.all_input_nodes
    if not sources or updates_statistics(node):
        return None
    first = written_operand(node) or (
        node.args[0] if node.args and isinstance(node.args[0], fx.Node) else sources[0]
    )
    if node.op == "call_module":
        return _module_link(node, first)
    if is_mutating(node):
        return first, Link.SAME
    name = op_name(node)
    if node.target is operator.getitem or name == "__getitem__":
        return _getitem_link(node, first, kinds or {})
    if name in _MAYBE_VIEWS:
        return first, Link.MAYBE
    if name in _VIEWS:
        is_reinterpreting = name == "view" and any(isinstance(a, torch.dtype) for a in node.args)
        return first, Link.MAYBE if is_reinterpreting else Link.VIEW
    if _is_fresh(node.target, name):
        return None
    return first, Link.MAYBE


def written_operand(node: fx.Node) -> fx.Node | None:
    """The operand that a mutating node writes; None when it writes none, or not a single node."""
    if not is_mutating(node) or updates_statistics(node):
        return None
    out = node.kwargs.get("out")
    if out is not None:
        return out if isinstance(out, fx.Node) else None
    first = node.args[0] if node.args else node.kwargs.get("input", node.kwargs.get("self"))
    return first if isinstance(first, fx.Node) else None


def _module_link(node: fx.Node, first: fx.Node) -> tuple[fx.Node, Link] | None:
    assert node.graph.owning_module is not None
    module = get_attr(node.graph.owning_module, str(node.target))
    if type(module) is nn.Identity or (is_mutating(node) and getattr(module, "inplace", False)):
        return first, Link.SAME
    if isinstance(module, _MAYBE_VIEW_MODULES):
        return first, Link.MAYBE
    if type(module) is nn.Unflatten:
        return first, Link.VIEW
    is_torch = type(module).__module__.startswith(("torch.nn.modules", "torch.ao.nn"))
    return None if is_torch and type(module) is not nn.Sequential else (first, Link.MAYBE)


def _getitem_link(node: fx.Node, source: fx.Node, kinds: dict[fx.Node, Kind]) -> tuple[fx.Node, Link] | None:
    if kinds.get(source) is Kind.SCALAR:
        return None
    name = op_name(source)
    if name in _TUPLE_VIEWS:
        return source, Link.VIEW
    if isinstance(source.meta.get("val"), (tuple, list)) or _returns_tuple(source):
        return None if alias_link(source, kinds) is None else (source, Link.MAYBE)
    index = node.args[1] if isinstance(node.args[1], (tuple, list)) else (node.args[1],)
    if any(isinstance(item, (list, torch.Tensor)) for item in index):
        return None  # advanced indexing copies
    unclear = [item for item in index if isinstance(item, fx.Node) and kinds.get(item) is not Kind.SCALAR]
    if any(kinds.get(item) is Kind.TENSOR for item in unclear):
        return None
    return source, Link.MAYBE if unclear else Link.VIEW


def _returns_tuple(node: fx.Node) -> bool:
    if node.op == "call_module":
        assert node.graph.owning_module is not None
        module = get_attr(node.graph.owning_module, str(node.target))
        return isinstance(module, (nn.RNNBase, nn.MultiheadAttention, nn.LSTMCell))
    return isinstance(node.target, torch._ops.OpOverload) and len(node.target._schema.returns) > 1


@cache
def _is_fresh(target: Any, name: str) -> bool:
    """Whether torch documents a result with storage of its own."""
    if isinstance(target, torch._ops.OpOverload):
        return not any(value.alias_info for value in target._schema.returns)
    if getattr(target, "__module__", "") in ("_operator", "math"):
        return True
    packet = getattr(torch.ops.aten, name, None)
    if packet is not None and isinstance(packet, torch._ops.OpOverloadPacket):
        if callable(target) and not _is_torchs_own(target, name):
            return False
        schemas = [getattr(packet, overload)._schema for overload in packet.overloads()]
        schemas = [schema for schema in schemas if not schema.is_mutable]
        return not any(value.alias_info for schema in schemas for value in schema.returns)
    return callable(target) and getattr(F, name, None) is target


def _is_torchs_own(target: Any, name: str) -> bool:
    return getattr(torch, name, None) is target or getattr(F, name, None) is target


def value_kinds(graph: fx.Graph) -> dict[fx.Node, Kind]:
    """Tensor, scalar or unknown for every node, from metadata where it is there, else from the ops."""
    kinds: dict[fx.Node, Kind] = {}
    for node in graph.nodes:
        kinds[node] = _kind(node, kinds)
    return kinds


def _kind(node: fx.Node, kinds: dict[fx.Node, Kind]) -> Kind:
    value = node.meta.get("val")
    if value is not None:
        return (
            Kind.TENSOR
            if isinstance(value, torch.Tensor)
            else Kind.SCALAR
            if _is_scalar(value)
            else Kind.UNKNOWN
        )
    if node.op in ("placeholder", "get_attr", "call_module"):
        return Kind.TENSOR
    name = op_name(node)
    if node.target is getattr:
        return Kind.SCALAR if node.args[1] in _SCALAR_ATTRIBUTES else Kind.TENSOR
    if (
        (name in _SCALAR_METHODS and node.op == "call_method")
        or name in _SCALAR_ATEN
        or node.target in (len, int, float)
    ):
        return Kind.SCALAR
    module = getattr(node.target, "__module__", "")
    operands = [kinds[source] for source in node.all_input_nodes]
    if module == "math":
        return Kind.SCALAR
    if module in ("_operator", "builtins") or (node.op == "call_method" and name == "__getitem__"):
        if node.target is operator.getitem and operands:
            return kinds[node.args[0]] if isinstance(node.args[0], fx.Node) else Kind.UNKNOWN
        if all(kind is Kind.SCALAR for kind in operands):
            return Kind.SCALAR
        return Kind.TENSOR if Kind.TENSOR in operands else Kind.UNKNOWN
    return Kind.TENSOR


def _is_scalar(value: Any) -> bool:
    return isinstance(
        value, (int, float, complex, torch.SymInt, torch.SymFloat, torch.SymBool, torch.Size, torch.dtype)
    )


class AliasClasses:
    """The storages of a graph: nodes that may share one, and how each leads to its source.

    Attributes:
        position: the place of each node in the graph's order.
        link: see :func:`alias_link`.
    """

    def __init__(self, graph: fx.Graph) -> None:
        self.kinds = value_kinds(graph)
        self.position = {node: i for i, node in enumerate(graph.nodes)}
        self.link = {node: alias_link(node, self.kinds) for node in graph.nodes}
        self._top: dict[fx.Node, fx.Node] = {}
        self._members: dict[fx.Node, list[fx.Node]] = {}
        for node, link in self.link.items():  # operands come first, so one sweep is enough
            # fx's generated code rebinds the name that += is applied to, also when it is a number's
            is_number = self.kinds[node] is Kind.SCALAR and (link is None or link[1] is not Link.SAME)
            top = node if link is None or is_number else self._top[link[0]]
            self._top[node] = top
            self._members.setdefault(top, []).append(node)

    def top(self, node: fx.Node) -> fx.Node:
        """The node that made the storage, as far as is known; the same for all nodes of a class."""
        return self._top[node]

    def members(self, node: fx.Node) -> list[fx.Node]:
        """All nodes that may share storage with ``node``, in graph order, itself included."""
        return self._members[self._top[node]]

    def chain(self, node: fx.Node) -> list[fx.Node]:
        """To ``node`` by sure links (itself last), from as far up as there are any."""
        path = [node]
        while (link := self.link[path[-1]]) is not None and link[1] is not Link.MAYBE:
            path.append(link[0])
        return path[::-1]

    def are_disjoint(self, a: fx.Node, b: fx.Node) -> bool:
        """Whether two nodes surely share no element: they come from different pieces of one split."""
        for x, y in zip(self.chain(a), self.chain(b), strict=False):
            if x is not y:
                source = self.link[x]
                if source is None or source != self.link[y] or op_name(source[0]) not in _TUPLE_VIEWS:
                    return False
                i, j = x.args[-1], y.args[-1]
                if not (
                    x.target is y.target is operator.getitem and isinstance(i, int) and isinstance(j, int)
                ):
                    return False
                return i != j and int(i < 0) == int(j < 0)  # 1 and -1 may be the same piece
        return False


def mutation_barriers(gm: fx.GraphModule) -> set[fx.Node]:
    """Nodes that no analysis may reason about: those that share storage with something written in place.

    Norms that update running statistics are not among them: their rule knows what they do.
    """
    writers = [node for node in gm.graph.nodes if is_mutating(node) and not updates_statistics(node)]
    if not writers:
        return set()
    classes = AliasClasses(gm.graph)
    barred: dict[fx.Node, None] = dict.fromkeys(writers)
    for writer in writers:
        for source in [written_operand(writer)] if written_operand(writer) else writer.all_input_nodes:
            if source is not None and classes.kinds[source] is not Kind.SCALAR:
                barred.update(dict.fromkeys(classes.members(source)))
    return set(barred)
