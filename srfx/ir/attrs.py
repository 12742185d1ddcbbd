"""Reading and writing attributes of a module tree by dotted path."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx, nn


def split_path(path: str) -> tuple[str, str]:
    """``"a.b.weight"`` -> ``("a.b", "weight")``."""
    parent, _, name = path.rpartition(".")
    return parent, name


def get_attr(root: nn.Module, path: str) -> Any:
    """The object that a ``get_attr`` or ``call_module`` node with this target reads.

    Raises:
        AttributeError: when a part of the path does not exist.
    """
    value: Any = root
    for name in path.split("."):
        value = getattr(value, name)
    return value


def set_attr(root: nn.Module, path: str, value: Any) -> None:
    """Set it, making empty modules on the way; whatever was there under this name goes.

    Parameters and modules are registered as such, other tensors as buffers.
    """
    parent_path, name = split_path(path)
    parent: Any = root
    for part in parent_path.split(".") if parent_path else []:
        if not hasattr(parent, part):
            parent.add_module(part, nn.Module())
        parent = getattr(parent, part)
    for place in (parent._parameters, parent._buffers, parent._modules, parent.__dict__):
        place.pop(name, None)
    if isinstance(value, torch.Tensor) and not isinstance(value, nn.Parameter):
        parent.register_buffer(name, value)
    else:
        setattr(parent, name, value)


def free_path(root: nn.Module, wanted: str) -> str:
    """``wanted``, or the first of ``wanted_1``, ``wanted_2`` ... that no attribute of the tree has."""
    candidate, n_tried = wanted, 0
    while _exists(root, candidate):
        n_tried += 1
        candidate = f"{wanted}_{n_tried}"
    return candidate


def _exists(root: nn.Module, path: str) -> bool:
    value: Any = root
    for name in path.split("."):
        if not hasattr(value, name):
            return False
        value = getattr(value, name)
    return True


def drop_unused_attributes(gm: fx.GraphModule) -> None:
    """Remove what no node reads: dead ``get_attr`` nodes first, then parameters, buffers and modules.

    A dead alias of a tied weight would otherwise keep the old tensor alive after the live one was replaced.
    """
    for node in reversed(gm.graph.nodes):
        if node.op == "get_attr" and not node.users:
            gm.graph.erase_node(node)
    used = {str(node.target) for node in gm.graph.nodes if node.op in ("get_attr", "call_module")}
    called = {get_attr(gm, str(node.target)) for node in gm.graph.nodes if node.op == "call_module"}
    _prune_tree(gm, "", used, called)


def _prune_tree(module: nn.Module, prefix: str, used: set[str], called: set[nn.Module]) -> None:
    wanted = {target[len(prefix) :].split(".")[0] for target in used if target.startswith(prefix)}
    for store in (module._parameters, module._buffers):
        for name in [name for name in store if name not in wanted]:
            del store[name]
    for name in [k for k, v in module.__dict__.items() if isinstance(v, torch.Tensor) and k not in wanted]:
        del module.__dict__[name]
    for name, child in list(module._modules.items()):
        if name not in wanted or child is None:
            del module._modules[name]
        elif prefix + name not in used and child not in called:
            _prune_tree(child, f"{prefix}{name}.", used, called)
