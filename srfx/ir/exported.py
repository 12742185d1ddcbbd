"""Turn the graph of ``torch.export`` into a plain one: no guards, no asserts, no wrapped sub-graphs."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx
from torch.export._unlift import GuardsFn

from srfx.ir.attrs import get_attr
from srfx.ir.inline import inline_graph, replace_by_outputs

_GRAD_MODE = torch.ops.higher_order.wrap_with_set_grad_enabled
_CHECKS = frozenset(
    getattr(torch.ops.aten, name)
    for name in (
        "_assert_tensor_metadata",
        "_assert_scalar",
        "_assert_async",
        "sym_constrain_range",
        "sym_constrain_range_for_size",
        "_functional_assert_scalar",
        "_functional_assert_async",
        "_functional_sym_constrain_range",
        "_functional_sym_constrain_range_for_size",
    )
    if hasattr(torch.ops.aten, name)
)


def is_check(node: fx.Node) -> bool:
    """Whether an ATen node only asserts something about its operands (metadata, ranges of sizes)."""
    return node.op == "call_function" and getattr(node.target, "overloadpacket", None) in _CHECKS


def strip_export(gm: fx.GraphModule) -> None:
    """Erase guards and assertions and inline ``torch.no_grad`` regions of an exported graph, in place.

    The guards only state what the export was specialised to: shapes of inputs, which srfx never changes.  An
    output of a no-grad region that could carry a gradient gets a ``detach``.
    """
    for node in list(gm.graph.nodes):
        if node.op == "call_module" and isinstance(get_attr(gm, str(node.target)), GuardsFn):
            gm.graph.erase_node(node)
        elif node.target is _GRAD_MODE:
            _inline_grad_mode(gm, node)
    for node in reversed(gm.graph.nodes):
        if is_check(node) and not node.users:
            gm.graph.erase_node(node)


def _inline_grad_mode(gm: fx.GraphModule, node: fx.Node) -> None:
    enabled, region, *operands = node.args
    if not isinstance(region, fx.Node) or region.op != "get_attr":
        return
    sub = get_attr(gm, str(region.target))
    if not isinstance(sub, fx.GraphModule):
        return
    strip_export(sub)
    outputs = inline_graph(gm, node, sub, operands, prefix=str(region.target) + "_body")
    if not enabled and any(_may_carry_gradient(gm, operand) for operand in operands):
        with gm.graph.inserting_before(node):
            outputs = fx.map_arg(outputs, lambda n: _detached(gm, n))
    replace_by_outputs(node, outputs)
    if not region.users:
        gm.graph.erase_node(region)


def _may_carry_gradient(gm: fx.GraphModule, operand: Any) -> bool:
    if not isinstance(operand, fx.Node):
        return False
    if operand.op == "get_attr":
        return bool(getattr(get_attr(gm, str(operand.target)), "requires_grad", False))
    return _is_float(operand)


def _is_float(node: fx.Node) -> bool:
    value = node.meta.get("val")
    return not isinstance(value, (int, float, torch.SymInt)) and (
        not isinstance(value, torch.Tensor) or value.is_floating_point() or value.is_complex()
    )


def _detached(gm: fx.GraphModule, node: fx.Node) -> fx.Node:
    if not _is_float(node):
        return node
    new = gm.graph.call_function(torch.ops.aten.detach.default, (node,))
    new.meta = dict(node.meta)
    return new
