"""A torch.fx graph as JSON and back."""

from __future__ import annotations

import builtins
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import fx

from srfx.errors import DamagedFileError, FileError, MissingArchitectureError, UnsavableError
from srfx.files import names
from srfx.files.trees import codegen_data, codegen_of, identifier
from srfx.files.values import Decoder, Encoder, function_of

_TYPES = {"Tensor": torch.Tensor, "bool": bool, "float": float, "int": int, "str": str}
"""Annotations that are kept (of inputs, from the source); others say nothing that runs."""

Functions = Callable[[fx.Graph], Mapping[str, Any]]

_OPS = ("placeholder", "get_attr", "call_function", "call_method", "call_module", "output")


def graph_data(graph: fx.Graph) -> dict[str, Any]:
    """The nodes in order, and the calling convention.

    A function that a file may not name is written as ``{"custom": name}``: it has to come from the original model.

    Raises:
        UnsavableError: an argument has no form in JSON, or a method or attribute may not be named.
    """
    return {"nodes": [_node_data(node) for node in graph.nodes], "convention": codegen_data(graph._codegen)}


def _node_data(node: fx.Node) -> dict[str, Any]:
    encode = Encoder(f"{node.name} ({node.target})", lambda n: n.name)
    data: dict[str, Any] = {"op": node.op, "name": node.name, "target": _target_data(node)}
    if node.args:
        data["args"] = [encode(arg) for arg in node.args]
    if node.kwargs:
        data["kwargs"] = {key: encode(arg) for key, arg in node.kwargs.items()}
    if node.type in _TYPES.values():
        data["type"] = next(name for name, found in _TYPES.items() if found is node.type)
    return data


def _target_data(node: fx.Node) -> Any:
    target = node.target
    if node.op != "call_function":
        if node.op == "call_method" and target not in names.methods():
            raise UnsavableError(f"{node.name} calls the method {target!r}, which a file may not name")
        return target
    if target is builtins.getattr and not (len(node.args) > 1 and node.args[1] in names.ATTRIBUTES):
        raise UnsavableError(f"{node.name} reads the attribute {node.args[1:]}, which a file may not name")
    name = names.function_name(target)
    return name if name is not None else {"custom": custom_name(target)}


def custom_name(target: Any) -> str:
    """How a function that is not in our tables is looked up in the original model."""
    if isinstance(target, (torch._ops.OpOverload, torch._ops.HigherOrderOperator)):
        return str(target)
    return names.class_name(target)


def graph_of(
    data: dict[str, Any],
    custom: Functions | None,
    device: torch.device | None = None,
) -> fx.Graph:
    """The inverse of `graph_data`.

    Args:
        data: what it gave.
        custom: gives the functions of the original model by `custom_name`, for a graph whose inputs have been read;
            called only when one is needed.
        device: replaces devices among the arguments.

    Raises:
        MissingArchitectureError: a function of the original model is needed, and there is none.
        FileError: a name that a file may not use, or a function that the original does not call.
    """
    graph = fx.Graph()
    graph._codegen = codegen_of(data["convention"])
    nodes: dict[str, fx.Node] = {}

    def known(name: str) -> fx.Node:
        if name not in nodes:
            raise DamagedFileError(f"the file is damaged: a node reads {name!r} before it is computed")
        return nodes[name]

    for item in data["nodes"]:
        name, op = item["name"], item["op"]
        if op not in _OPS or identifier(name) in nodes:
            raise DamagedFileError(f"the file is damaged: {name!r} is no new node, or {op!r} no kind of node")
        decode = Decoder(name, known, device)
        args = tuple(decode(arg) for arg in item.get("args", ()))
        kwargs = {identifier(key): decode(arg) for key, arg in item.get("kwargs", {}).items()}
        target = _target(item, None if custom is None else lambda: custom(graph))
        if target is builtins.getattr and not (len(args) == 2 and args[1] in names.ATTRIBUTES):
            raise FileError(f"{name}: a file may not ask for the attribute {args[1:]}")
        node = graph.create_node(op, target, args, kwargs, name)
        node.type = _TYPES.get(item.get("type"))
        if node.name != name:
            node._rename(name)
        nodes[name] = node
    return graph


def _target(item: dict[str, Any], custom: Callable[[], Mapping[str, Any]] | None) -> Any:
    target, op, name = item["target"], item["op"], item["name"]
    if isinstance(target, dict) and op == "call_function":
        return _custom(name, target["custom"], custom)
    if not isinstance(target, str):
        raise DamagedFileError(f"the file is damaged: {name} has the target {target!r}")
    if op == "call_function":
        return function_of(target, name)
    if op == "call_method" and target not in names.methods():
        raise FileError(f"{name}: a file may not name the method {target!r}")
    # Names of inputs, and paths, become part of generated code; fx quotes a path that is no identifier, never a name.
    if op == "placeholder":
        identifier(target.lstrip("*"))
    elif not all(_is_path_part(part) for part in target.lstrip("*").split(".")):
        raise DamagedFileError(f"the file is damaged: {name} has the target {target!r}")
    return target


def _is_path_part(part: str) -> bool:
    return (
        bool(part) and not part.startswith("__") and part.isprintable() and not set(part) & set("\"'\\{}()")
    )


def _custom(name: str, wanted: str, custom: Callable[[], Mapping[str, Any]] | None) -> Any:
    if custom is None:
        raise MissingArchitectureError(
            f"{name} calls {wanted}, a function of the original model: pass it to srfx.load as model"
        )
    found = custom()
    if wanted not in found:
        raise FileError(f"{name} calls {wanted}, which the given model does not: is it the original?")
    return found[wanted]
