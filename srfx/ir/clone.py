"""Copies of module trees and graphs that share the tensors: own structure, no second copy of the weights."""

from __future__ import annotations

import copy
import functools
import types
from collections import OrderedDict, defaultdict
from collections.abc import Callable
from typing import Any

import torch
from torch import fx, nn

TensorMap = Callable[[torch.Tensor], torch.Tensor]

_TREE_STATE = frozenset({"_parameters", "_buffers", "_modules", "_non_persistent_buffers_set", "training"})
_CALL_HOOKS = (
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_backward_hooks",
    "_backward_pre_hooks",
)
_DICTS = (dict, OrderedDict)
_CONTAINERS = (defaultdict, list, set)
_PLAIN = frozenset({bool, int, float, str, type(None), type, types.FunctionType, types.BuiltinFunctionType})


def clone_structure(module: nn.Module, tensor_map: TensorMap | None = None) -> nn.Module:
    """Clone a module tree; parameters, buffers and all other leaves are shared with the original.

    Every module of the tree becomes a new object with dictionaries of its own, so attributes may be set,
    parameters replaced and hooks removed on the clone without the original noticing.  Aliasing is kept: a
    module reachable under two names stays one object, and tied parameters stay one tensor.  Methods and
    modules stored as attributes point into the clone.  fx.GraphModules inside the tree get a cloned graph.

    ``copy.deepcopy`` would not do: it doubles the memory and raises on the non-leaf ``weight`` that
    torch.nn.utils.prune leaves behind after a forward pass with grad mode on.

    Args:
        module: any module; TorchScript modules inside it stay shared (they have no Python structure).
        tensor_map: replaces each parameter and buffer (called once per tensor object); None shares them.

    Returns:
        The clone, of the same class (fx.GraphModule for every kind of graph module).
    """
    return _Cloner(tensor_map).module(module)


def copy_call_hooks(source: nn.Module, target: nn.Module) -> None:
    """Give ``target`` the forward and backward hooks of ``source``, in dictionaries of its own."""
    for key in _CALL_HOOKS:
        hooks = source.__dict__[key]
        # torch.export puts hooks of its own (checks, unpicklable lambdas) on the modules it returns
        kept = {k: v for k, v in hooks.items() if not _is_from_export(v)}
        target.__dict__[key] = type(hooks)(kept)
    target.__dict__["_is_full_backward_hook"] = source.__dict__["_is_full_backward_hook"]


def _is_from_export(hook: object) -> bool:
    return str(getattr(hook, "__module__", "")).startswith("torch.export.")


def clone_graph(graph: fx.Graph) -> fx.Graph:
    """Copy a graph: same node names and types, ``meta`` copied shallowly, same pytree code generator."""
    new = fx.Graph()
    mapping: dict[fx.Node, fx.Node] = {}
    for node in graph.nodes:
        copied = new.node_copy(node, lambda n: mapping[n])
        if copied.name != node.name:  # a name that fx itself would not have chosen
            copied._rename(node.name)
        mapping[node] = copied
    new._codegen = copy.copy(graph._codegen)
    return new


class _Cloner:
    """One cloning run: remembers what became of each module and tensor."""

    def __init__(self, tensor_map: TensorMap | None) -> None:
        self.tensor_map = tensor_map
        self.modules: dict[nn.Module, nn.Module] = {}
        self.tensors: dict[int, torch.Tensor] = {}
        self.kept: list[torch.Tensor] = []  # so that no id in `tensors` is given to a new tensor

    def module(self, module: nn.Module) -> nn.Module:
        if module in self.modules:
            return self.modules[module]
        if isinstance(module, torch.jit.ScriptModule):
            return module
        if isinstance(module, fx.GraphModule):
            return self.graph_module(module)
        new = module.__class__.__new__(module.__class__)
        self.modules[module] = new
        new.__dict__ = self.attributes(module)
        return new

    def graph_module(self, module: fx.GraphModule) -> fx.GraphModule:
        holder = nn.Module()  # every GraphModule has a class of its own; only a new one can hold new code
        for key, value in module.__dict__.items():
            if key in _TREE_STATE or isinstance(value, torch.Tensor):
                holder.__dict__[key] = self.value(value)
        new = fx.GraphModule(holder, clone_graph(module.graph), module.__class__.__name__)
        self.modules[module] = new
        new.meta = dict(getattr(module, "meta", {}))
        new.training = module.training
        copy_call_hooks(module, new)
        for name, child in new.named_modules():
            if (
                name and type(child) is nn.Module
            ):  # made by GraphModule for a dotted path: flags as in the source
                child.training = _training_of(module, name)
        return new

    def attributes(self, module: nn.Module) -> dict[str, Any]:
        return {key: self.value(value) for key, value in module.__dict__.items()}

    def value(self, value: Any) -> Any:
        """What an attribute becomes: containers are copied, modules and bound methods lead into the clone."""
        kind = type(value)
        if kind in _PLAIN:
            return value
        if kind in _DICTS:
            return kind((key, self.value(item)) for key, item in value.items())
        if isinstance(value, nn.Module):
            return self.module(value)
        if isinstance(value, torch.Tensor):
            return self.tensor(value)
        if kind in _CONTAINERS:
            new = copy.copy(value)
            if isinstance(new, dict):
                for key, item in value.items():
                    new[key] = self.value(item)
            elif isinstance(new, list):
                new[:] = [self.value(item) for item in value]
            return new
        if kind is tuple:
            return tuple(self.value(item) for item in value)
        if isinstance(value, types.MethodType) and isinstance(value.__self__, nn.Module):
            return types.MethodType(value.__func__, self.module(value.__self__))
        if kind is functools.partial:
            args = [self.value(item) for item in value.args]
            return functools.partial(self.value(value.func), *args, **self.value(dict(value.keywords)))
        return value

    def tensor(self, tensor: torch.Tensor) -> torch.Tensor:
        if self.tensor_map is None:
            return tensor
        if id(tensor) not in self.tensors:
            self.tensors[id(tensor)] = self.tensor_map(tensor)
            self.kept.append(tensor)
        return self.tensors[id(tensor)]


def _training_of(root: nn.Module, path: str) -> bool:
    module: Any = root
    for name in path.split("."):
        module = getattr(module, name, None)
    return bool(getattr(module, "training", True))
