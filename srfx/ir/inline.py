"""Splice a sub-graph into the graph that calls it."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

from torch import fx

from srfx.ir.attrs import get_attr, set_attr


def inline_graph(
    gm: fx.GraphModule, node: fx.Node, sub: fx.GraphModule, args: Sequence[Any], prefix: str
) -> Any:
    """Insert the nodes of ``sub`` before ``node``, with ``args`` for its placeholders.

    Args:
        gm: the graph module to extend; ``node`` belongs to its graph.
        node: where to insert; it is left alone.
        sub: its graph is copied; attributes its nodes name are set on ``gm`` under ``prefix``.
        args: one value or node per placeholder of ``sub``.
        prefix: path under which the attributes of ``sub`` are reachable from ``gm`` afterwards.

    Returns:
        The (possibly nested) output of the sub-graph, as nodes of ``gm.graph``.
    """
    mapping: dict[fx.Node, Any] = {}
    given = list(args)
    with gm.graph.inserting_before(node):
        for inner in sub.graph.nodes:
            if inner.op == "placeholder":
                mapping[inner] = given.pop(0) if given else inner.args[0]
            elif inner.op == "output":
                return fx.map_arg(inner.args[0], lambda n: mapping[n])
            else:
                copied = gm.graph.node_copy(inner, lambda n: mapping[n])
                if inner.op in ("get_attr", "call_module"):
                    copied.target = f"{prefix}.{inner.target}"
                    set_attr(gm, copied.target, get_attr(sub, str(inner.target)))
                mapping[inner] = copied
    raise AssertionError(f"sub-graph for {node.name} has no output")


def replace_by_outputs(node: fx.Node, outputs: Any) -> None:
    """Make the readers of ``node`` read ``outputs`` instead, past getitems when it is a tuple; erase it."""
    for user in list(node.users):
        if isinstance(outputs, (tuple, list)) and user.target is operator.getitem and user.args[0] is node:
            item = outputs[user.args[1]]  # type: ignore[index]
            if isinstance(item, fx.Node):
                user.replace_all_uses_with(item)
                node.graph.erase_node(user)
    for user in list(node.users):  # whoever reads the value as a whole
        user.args = tuple(_swap(item, node, outputs) for item in user.args)
        user.kwargs = {key: _swap(item, node, outputs) for key, item in user.kwargs.items()}
    node.graph.erase_node(node)


def _swap(value: Any, old: fx.Node, new: Any) -> Any:
    if value is old:
        return new
    if isinstance(value, (tuple, list)):
        return type(value)(_swap(item, old, new) for item in value)
    if isinstance(value, dict):
        return {key: _swap(item, old, new) for key, item in value.items()}
    return value
