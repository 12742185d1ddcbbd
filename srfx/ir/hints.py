"""Example values of a graph's inputs, from its metadata or from the user's arguments."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import fx
from torch._subclasses.fake_tensor import (
    FakeTensorMode,
)
from torch.utils import _pytree as pytree

from srfx.errors import CaptureError


def _from_metadata(placeholders: Sequence[fx.Node]) -> list[Any] | None:
    """Hints from ``meta["val"]`` of exported graphs; None when a required placeholder has none."""
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    hints: list[Any] = []
    for node in placeholders:
        if "val" in node.meta:
            hints.append(pytree.tree_map(lambda leaf: _concrete(leaf, mode), node.meta["val"]))
        elif node.args:
            hints.append(node.args[0])
        else:
            return None
    return hints


def _concrete(leaf: Any, mode: FakeTensorMode) -> Any:
    if isinstance(leaf, torch.Tensor):
        sizes = [concrete_int(size) for size in leaf.shape]
        with mode:
            return torch.empty(sizes, dtype=leaf.dtype, device=leaf.device)
    if isinstance(leaf, torch.SymInt):
        return concrete_int(leaf)
    if isinstance(leaf, (torch.SymFloat, torch.SymBool)):
        return leaf.node.hint
    return leaf


def concrete_int(size: int | torch.SymInt) -> int:
    """A plain int; a symbolic size becomes the one it had when the graph was exported, at least 2."""
    if not isinstance(size, torch.SymInt):
        return int(size)
    known = size.node.maybe_as_int()
    if known is not None:
        return int(known)
    hint = size.node.hint
    return max(2, int(hint)) if isinstance(hint, int) else 2


def _bind(
    gm: fx.GraphModule, placeholders: Sequence[fx.Node], args: list[Any], kwargs: dict[str, Any]
) -> list[Any]:
    info = getattr(gm.graph._codegen, "pytree_info", None)
    if info is not None:
        return _bind_exported(info, placeholders, args, kwargs)
    hints: list[Any] = []
    for node in placeholders:
        name = str(node.target)
        if name.startswith("**"):
            hints.append({key: kwargs.pop(key) for key in list(kwargs)})
        elif name.startswith("*"):
            hints.append(tuple(args))
            args = []
        elif args:
            hints.append(args.pop(0))
        elif name in kwargs:
            hints.append(kwargs.pop(name))
        elif node.args:
            hints.append(node.args[0])
        else:
            raise CaptureError(f"example_inputs give no value for input {name!r}")
    if args or kwargs:
        extra = ", ".join(kwargs) or f"{len(args)} positional"
        raise CaptureError(
            f"example_inputs hold more than the graph takes ({len(placeholders)} inputs): {extra}"
        )
    return hints


def _bind_exported(
    info: Any, placeholders: Sequence[fx.Node], args: list[Any], kwargs: dict[str, Any]
) -> list[Any]:
    spec = info.in_spec
    is_pair = spec.type is tuple and spec.num_children == 2 and spec.child(1).type is dict
    if is_pair:
        n_args, names = spec.child(0).num_children, list(spec.child(1).context)
        for name in info.orig_args[len(args) : n_args]:  # positional at export, given by keyword now
            key = name.split(":")[0].strip()
            if key in kwargs:
                args.append(kwargs.pop(key))
        for name in names:  # keyword at export, given by position now
            if name not in kwargs and len(args) > n_args:
                kwargs[name] = args.pop(n_args)
        tree: Any = (tuple(args), {name: kwargs[name] for name in names if name in kwargs})
    else:
        tree = tuple(args)
    leaves, given = pytree.tree_flatten(tree)
    if len(leaves) != len(placeholders):
        raise CaptureError(
            f"example_inputs do not match the exported signature: expected {spec}, got {given}"
        )
    return leaves
