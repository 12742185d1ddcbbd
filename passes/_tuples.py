"""Results that are tuples, also within tuples: who reads them whole, and what takes their place."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx


def hand_over(graph: fx.Graph, node: fx.Node, outputs: Any) -> None:
    """Readers of ``node`` read ``outputs``: a node, the pieces of a state (list of nodes), or a list of such."""
    joined: dict[int, fx.Node] = {}

    def whole(value: Any) -> Any:
        if isinstance(value, fx.Node):
            return value
        if all(isinstance(v, fx.Node) for v in value):
            if id(value) not in joined:
                with graph.inserting_before(node):
                    joined[id(value)] = graph.call_function(torch.cat, (list(value), 0))
            return joined[id(value)]
        return tuple(whole(v) for v in value)

    def settle(reader: fx.Node, value: Any) -> None:
        """``reader`` computes ``value``: give its readers what they take of it, then drop it."""
        for user in list(reader.users):
            if user.op == "call_function" and user.target is operator.getitem and user.args[0] is reader:
                index = user.args[1]
                if not _is_state(value) and not isinstance(value, fx.Node) and isinstance(index, int):
                    settle(user, value[index])
                    continue
            piece = _entry(user, reader) if _is_state(value) else None
            if piece is not None:
                at, entry = piece
                user.args = (value[at], *entry)
                continue
            replacement = whole(value)
            user.args = _swapped(user.args, reader, replacement)
            user.kwargs = _swapped(user.kwargs, reader, replacement)
        graph.erase_node(reader)

    settle(node, [outputs[0], *outputs[1:]])


def takes_element(user: fx.Node, node: fx.Node) -> bool:
    is_getitem = user.op == "call_function" and user.target is operator.getitem and user.args[0] is node
    return is_getitem and isinstance(user.args[1], int)


def whole_readers(node: fx.Node, hint: Any) -> list[tuple[fx.Node, Any]]:
    """This node and its elements, as far as they are tuples that somebody reads as a whole, with their hints."""
    if not isinstance(hint, (tuple, list)):
        return []
    found = [(node, hint)] if not all(takes_element(user, node) for user in node.users) else []
    for user in node.users:
        if takes_element(user, node):
            found += whole_readers(user, hint[user.args[1]])  # type: ignore[index]
    return found


def spell_out(node: fx.Node, hint: Any) -> None:
    """Whoever reads a tuple result as a whole reads the tuple of its elements."""

    def elements(value: fx.Node, hint: Any) -> Any:
        if not isinstance(hint, (tuple, list)):
            return value
        parts = [node.graph.call_function(operator.getitem, (value, i)) for i in range(len(hint))]
        return tuple(elements(part, h) for part, h in zip(parts, hint, strict=True))

    for value, inner in whole_readers(node, hint):
        readers = [user for user in value.users if not takes_element(user, value)]
        with node.graph.inserting_before(value.next):
            whole = elements(value, inner)
        for user in readers:
            user.args, user.kwargs = _swapped(user.args, value, whole), _swapped(user.kwargs, value, whole)


def _is_state(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(v, fx.Node) for v in value)


def _entry(user: fx.Node, states: fx.Node) -> tuple[int, tuple[Any, ...]] | None:
    """Which entry of the states a call takes, and the arguments that take the only entry of that piece."""
    if not user.args or user.args[0] is not states or user.kwargs:
        return None
    rest = user.args[1:]
    if user.target is operator.getitem:
        index = rest[0]
        if isinstance(index, int):
            return index, (0,)
        if (
            isinstance(index, tuple)
            and index
            and isinstance(index[0], int)
            and not isinstance(index[0], bool)
        ):
            return index[0], ((0, *index[1:]),)
        return None
    is_select = user.target in (torch.select, torch.ops.aten.select.int) or (
        user.op == "call_method" and user.target == "select"
    )
    if is_select and len(rest) == 2 and rest[0] == 0 and isinstance(rest[1], int):
        return rest[1], (0, 0)
    return None


def _swapped(value: Any, old: fx.Node, new: Any) -> Any:
    if value is old:
        return new
    if isinstance(value, (tuple, list)):
        return type(value)(_swapped(item, old, new) for item in value)
    if isinstance(value, dict):
        return {key: _swapped(item, old, new) for key, item in value.items()}
    if isinstance(value, slice):
        return slice(*(_swapped(v, old, new) for v in (value.start, value.stop, value.step)))
    return value
