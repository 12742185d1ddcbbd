"""Values that no input decides: masks and position tables made from sizes, literals and stored tensors."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from srfx.ir.effects import is_mutating, is_random
from srfx.ir.program import Param, Program

MAX_ELEMENTS = 1 << 24


def evaluate(node: fx.Node, program: Program) -> Tensor | None:
    """The value of a tensor node at the hint sizes, or None when an input's data, or chance, decides it.

    Cost: one evaluation of the subgraph behind the node; nothing larger than 16 M elements is made.
    """
    cache: dict[fx.Node, Any] = {}
    order = _ancestors(node, program)
    if order is None:
        return None
    with torch.no_grad():
        for step in order:
            cache[step] = _run(step, program, cache)
    found = cache[node]
    return found if isinstance(found, Tensor) else None


def has_fixed_sizes(node: fx.Node, axes: tuple[int, ...]) -> bool:
    """Whether export recorded plain numbers for these axes, so that the hint sizes are the only ones."""
    recorded = node.meta.get("val")
    return isinstance(recorded, Tensor) and all(isinstance(recorded.shape[a], int) for a in axes)


def _ancestors(node: fx.Node, program: Program) -> list[fx.Node] | None:
    """Nodes to run, in graph order; None if one reads an input's data or cannot be run."""
    needed: set[fx.Node] = set()
    stack = [node]
    while stack:
        current = stack.pop()
        if current in needed:
            continue
        hint = program.hints.get(current)
        if not isinstance(hint, Tensor):
            if not isinstance(hint, (int, float, bool, tuple, list, torch.Size, torch.dtype, torch.device)):
                return None
            needed.add(current)
            if isinstance(hint, (int, float, bool, torch.Size, torch.dtype, torch.device)):
                continue  # a number: its hint is its value
        elif (
            current.op == "placeholder"
            or hint.numel() > MAX_ELEMENTS
            or current.op == "call_module"
            or is_random(current)
            or is_mutating(current)
        ):
            return None
        needed.add(current)
        stack += current.all_input_nodes
    return [n for n in program.nodes if n in needed]


def _run(node: fx.Node, program: Program, cache: dict[fx.Node, Any]) -> Any:
    value, hint = program.value(node), program.hints.get(node)
    if isinstance(value, Param):
        return value.tensor.detach()
    if not isinstance(hint, (Tensor, list)) and not (
        isinstance(hint, tuple) and not isinstance(hint, torch.Size)
    ):
        return hint
    args: Any = fx.node.map_arg(node.args, lambda n: cache[n])
    kwargs: Any = fx.node.map_arg(node.kwargs, lambda n: cache[n])
    if node.op == "call_method":
        return getattr(args[0], str(node.target))(*args[1:], **kwargs)
    assert callable(node.target)
    return node.target(*args, **kwargs)
