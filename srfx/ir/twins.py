"""Functional twins of in-place ops, and the inverses of views: what to write instead of writing in place."""

from __future__ import annotations

import operator
from typing import Any, cast

import torch
from torch import fx
from torch.nn import functional as F

from srfx.ir.aliases import Kind
from srfx.ir.effects import INPLACE_OPERATORS, op_name
from srfx.ir.in_place import functional_arguments

aten = torch.ops.aten

_METADATA_OPS = frozenset({"squeeze_", "unsqueeze_", "transpose_", "t_", "swapaxes_", "swapdims_", "detach_"})
_NO_TWIN = frozenset({"resize_", "resize_as_", "set_", "requires_grad_", "share_memory_", "apply_", "map_"})
_RANDOM = frozenset(
    [
        "normal_", "uniform_", "bernoulli_", "random_", "exponential_", "geometric_", "cauchy_",
        "log_normal_", "rrelu_",
    ]
)  # fmt: skip
_FILLS = frozenset({"copy_", "fill_", "zero_"})
_COMPARISONS = frozenset(
    [
        "eq", "ne", "lt", "le", "gt", "ge", "not_equal", "less", "less_equal", "greater", "greater_equal",
        "logical_and", "logical_or", "logical_xor", "logical_not",
    ]
)  # fmt: skip
_INPLACE_METHODS = {f"__{i.__name__.strip('_')}__": twin for i, twin in INPLACE_OPERATORS.items()}


def is_metadata_op(node: fx.Node) -> bool:
    """Whether an in-place op only changes how a tensor is seen (``squeeze_``), not its numbers."""
    return op_name(node) in _METADATA_OPS


def functional_target(node: fx.Node) -> Any:
    """The functional op for a mutating call (not setitem, ``out=`` or a module); None when there is none."""
    target, name = node.target, op_name(node)
    if name in _NO_TWIN or name in _RANDOM:
        return None
    if target in INPLACE_OPERATORS:
        return INPLACE_OPERATORS[target]
    if name in _INPLACE_METHODS:
        return _INPLACE_METHODS[name]
    if name in _FILLS or not name.endswith("_"):
        return target
    base = name[:-1]
    if isinstance(target, torch._ops.OpOverload):
        packet = getattr(torch.ops.aten, base, None)
        return None if packet is None else _matching_overload(packet, target)
    if node.op == "call_method":
        return base if hasattr(torch.Tensor, base) else None
    for place in (torch, F, torch.special, torch.linalg):
        twin = getattr(place, base, None)
        if callable(twin):
            return twin
    return None


def is_fill(node: fx.Node) -> bool:
    """Whether a call writes another value over the whole tensor."""
    return op_name(node) in _FILLS


def has_plain_twin(node: fx.Node) -> bool:
    """Whether the functional twin of an in-place call takes the very same arguments, ``inplace`` aside."""
    if is_fill(node) or node.kwargs.get("out") is not None:
        return False
    return isinstance(functional_target(node), str) == (node.op == "call_method")


def replace_call(node: fx.Node) -> fx.Node:
    """Insert the functional twin of an in-place function, method or operator before ``node``.

    Returns:
        The new node (``node`` still stands); its value has the right numbers and shape, maybe a wider dtype.
    """
    graph, name = node.graph, op_name(node)
    args, kwargs = tuple(node.args), dict(node.kwargs)
    with graph.inserting_before(node):
        if name in _FILLS:
            return fill_like(
                graph, args[0], 0 if name == "zero_" else args[1] if len(args) > 1 else kwargs["value"]
            )
        if kwargs.pop("out", None) is not None:
            plain: Any = node.target
            if isinstance(plain, torch._ops.OpOverload):
                plain = _without_out(plain)
            return graph.call_function(plain, args, kwargs)
        target: Any = functional_target(node)
        assert target is not None
        args, kwargs = functional_arguments(node, target)
        if isinstance(target, str):
            return graph.call_method(target, args, kwargs)
        return graph.call_function(target, args, kwargs)


def out_twin_exists(node: fx.Node) -> bool:
    """Whether a call with ``out=`` can be written without."""
    return not isinstance(node.target, torch._ops.OpOverload) or _without_out(node.target) is not None


def _without_out(target: Any) -> Any:
    return _matching_overload(target.overloadpacket, target)


def _matching_overload(packet: Any, target: torch._ops.OpOverload) -> Any:
    """The functional overload of ``packet`` with the operands of ``target``, ``out`` aside, or None."""
    wanted = [str(arg.type) for arg in target._schema.arguments if not arg.is_out]
    names = [target._overloadname, *packet.overloads()]
    for name in [n for n in names if n in packet.overloads()]:
        schema = getattr(packet, name)._schema
        if not schema.is_mutable and [str(arg.type) for arg in schema.arguments] == wanted:
            return getattr(packet, name)
    return None


def fill_like(graph: fx.Graph, target: Any, value: object) -> fx.Node:
    """``target`` with every number replaced by ``value`` (a number, or a node that broadcasts to it)."""
    if not isinstance(value, fx.Node):
        return graph.call_function(aten.full_like.default, (target, cast("float", value)))
    is_whole, new = has_same(value, target, "shape"), value
    if not has_same(value, target, "dtype"):
        new = graph.call_function(aten.type_as.default, (new, target))
    return new if is_whole else graph.call_function(aten.expand_as.default, (new, target))


def has_same(a: fx.Node, b: fx.Node, what: str) -> bool:
    """Whether metadata says that two values agree in ``shape`` or ``dtype``."""
    x, y = a.meta.get("val"), b.meta.get("val")
    if not (isinstance(x, torch.Tensor) and isinstance(y, torch.Tensor)):
        return False
    if what == "dtype":
        return x.dtype == y.dtype
    return len(x.shape) == len(y.shape) and all(
        _is_equal(p, q) for p, q in zip(x.shape, y.shape, strict=True)
    )


def _is_equal(p: Any, q: Any) -> bool:
    return bool(str(p) == str(q))  # symbolic sizes must not be compared: that would add guards


def may_change_dtype(
    node: fx.Node, dtypes: dict[fx.Node, torch.dtype | None], kinds: dict[fx.Node, Kind]
) -> bool:
    """Whether the functional twin could return another dtype than the tensor that was written has."""
    name = op_name(node).strip("_")
    if name in _FILLS or name + "_" in _FILLS:
        return False
    if name in _COMPARISONS or name.removeprefix("i") in _COMPARISONS:
        return True
    tensors = [source for source in node.all_input_nodes if kinds[source] is not Kind.SCALAR]
    known = {dtypes.get(source) for source in tensors}
    if name in (
        "masked_fill",
        "index_put",
        "index_fill",
        "masked_scatter",
        "index_add",
        "index_copy",
        "scatter",
    ):
        return False
    if len(tensors) <= 1:
        is_complex = any(isinstance(a, complex) for a in node.args)
        is_float_scalar = any(isinstance(a, float) for a in node.args) and known == {None}
        return is_complex or (is_float_scalar and node.kwargs.get("out") is not None)
    return len(known) != 1 or None in known


# --- views
# ----------------------------------------------------------------------------------------------------------
# -


def split_getitem(graph: fx.Graph, source: fx.Node, index: Any) -> list[fx.Node]:
    """``source[index]`` of ints, slices, None and Ellipsis, as a chain of select, slice and unsqueeze.

    The nodes are inserted at the graph's insertion point; the last one is the result.
    """
    items = list(index) if isinstance(index, (tuple, list)) else [index]
    chain: list[fx.Node] = []
    if Ellipsis in items:
        split = items.index(Ellipsis)
        items, tail = items[:split], items[split + 1 :]
        n_tail = sum(item is not None for item in tail)
        axis = -n_tail if tail else 0
        for item in tail:
            source, axis = _index_step(graph, source, axis, item, chain, is_from_end=True)
        # From the front, after the tail: a select at the end does not move the axes in front of it.
        head_axis = 0
        for item in items:
            source, head_axis = _index_step(graph, source, head_axis, item, chain)
        return chain
    axis = 0
    for item in items:
        source, axis = _index_step(graph, source, axis, item, chain)
    return chain


def _index_step(
    graph: fx.Graph, source: fx.Node, axis: int, item: Any, chain: list[fx.Node], is_from_end: bool = False
) -> tuple[fx.Node, int]:
    if item is None:
        new = graph.call_function(aten.unsqueeze.default, (source, axis - 1 if is_from_end else axis))
        step = 0 if is_from_end else 1
    elif isinstance(item, slice):
        if item == slice(None):
            return source, axis + 1
        end = item.stop if item.stop is not None else 2**63 - 1
        new = graph.call_function(aten.slice.Tensor, (source, axis, item.start or 0, end, item.step or 1))
        step = 1
    else:
        new = graph.call_function(aten.select.int, (source, axis, item))
        step = 1 if is_from_end else 0
    chain.append(new)
    return new, axis + step


def _is_run(axis: Any, start: Any, length: Any) -> bool:
    """Whether the arguments of a ``narrow`` are literal, and do not count from the end."""
    return all(isinstance(n, int) for n in (axis, start, length)) and start >= 0


def can_scatter(view: fx.Node) -> bool:
    """Whether :func:`scatter_back` knows this view."""
    name = op_name(view)
    if name == "narrow":
        return len(view.args) == 4 and _is_run(*view.args[1:])
    if name in (
        "slice",
        "select",
        "view",
        "view_as",
        "unsqueeze",
        "squeeze",
        "unflatten",
        "transpose",
        "swapaxes",
    ):
        return not any(isinstance(arg, torch.dtype) for arg in view.args) and not view.kwargs
    if name in ("t", "alias", "T", "mT"):  # not detach: gradients of what was written would be cut off
        return view.op != "call_function" or view.target is not getattr
    if name == "permute":
        dims = (
            view.args[1] if len(view.args) == 2 and isinstance(view.args[1], (tuple, list)) else view.args[1:]
        )
        return all(isinstance(d, int) for d in dims)
    if view.target is operator.getitem:
        source = view.args[0]
        return isinstance(source, fx.Node) and op_name(source) not in (
            "split", "split_with_sizes", "chunk", "unbind", "tensor_split",
        )  # fmt: skip
    return False


def scatter_back(graph: fx.Graph, view: fx.Node, parent: fx.Node, new: fx.Node) -> fx.Node:
    """The value of ``parent`` after its view ``view`` became ``new``; inserted at the insertion point."""
    name = op_name(view)
    args: tuple[Any, ...] = view.args[1:]
    if view.target is operator.getitem:
        chain = split_getitem(graph, parent, args[0])
        parents = [parent, *chain[:-1]]
        for step, above in zip(reversed(chain), reversed(parents), strict=True):
            new = scatter_back(graph, step, above, new)
        return new
    if name == "slice":
        return graph.call_function(aten.slice_scatter.default, (parent, new, *args))
    if name == "narrow":
        axis, start, length = args
        run = (axis, start, start + length)
        return graph.call_function(aten.slice_scatter.default, (parent, new, *run))
    if name == "select":
        return graph.call_function(aten.select_scatter.default, (parent, new, *args))
    if name in ("transpose", "swapaxes"):
        return graph.call_function(aten.transpose.int, (new, *args))
    if name in ("t", "T"):
        return graph.call_function(aten.t.default, (new,))
    if name == "mT":
        return graph.call_function(aten.transpose.int, (new, -2, -1))
    if name == "permute":
        dims = list(args[0] if len(args) == 1 and isinstance(args[0], (tuple, list)) else args)
        dims = [d % len(dims) for d in dims]
        return graph.call_function(aten.permute.default, (new, [dims.index(i) for i in range(len(dims))]))
    if name == "alias":
        return new
    return graph.call_function(aten.reshape_as.default, (new, parent))
