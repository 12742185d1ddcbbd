"""Which functions, methods and classes a file may name.

A file is data from anywhere.  Loading one looks names up in the tables here and never imports a module or reads an
attribute that the file chooses, so that no file can name ``os.system`` or ``torch.load``.
"""

from __future__ import annotations

import builtins
import functools
import math
import operator
import sys
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.overrides import get_overridable_functions
from torch.utils import _pytree as pytree

import srfx.nn
import srfx.ops  # registers the rules
from srfx.ops.registry import known_targets

_NAMESPACES: tuple[ModuleType, ...] = (F, torch.functional, torch.linalg, torch.fft, torch.special, torch)
_TORCH = (
    "arange as_tensor empty empty_strided eye full linspace logspace ones rand randint randn randperm scalar_tensor",
    "tensor tril_indices triu_indices zeros is_tensor _assert _check _softmax _log_softmax",
    "sym_float sym_int sym_ite sym_max sym_min sym_not sym_sqrt sym_sum",
)
"""Functions of torch that take no tensor, so that torch.overrides does not list them."""

_METHODS = "alias count get index items keys new_empty new_full new_ones new_tensor new_zeros stride unflatten values"
_BUILTINS = "abs bool divmod float getattr int isinstance len max min pow round slice sum"
_NOT_OPERATORS = {"attrgetter", "call", "itemgetter", "methodcaller"}

_PLAIN = "shape dtype device layout ndim itemsize nbytes requires_grad"
_VIEWS = "T mT H mH real imag"
_PLACES = "is_cpu is_cuda is_meta is_mps is_sparse is_xpu"
ATTRIBUTES = frozenset(f"{_PLAIN} {_VIEWS} {_PLACES}".split())
"""What ``getattr`` in a graph may ask of a value."""


@functools.cache
def functions() -> dict[str, Callable[..., Any]]:
    """Every function that a graph may call, by name."""
    table: dict[str, Callable[..., Any]] = {}
    overridable = {id(f) for found in get_overridable_functions().values() for f in found}
    for space in _NAMESPACES:
        for name, found in vars(space).items():
            is_own = (
                space is F and getattr(found, "__module__", "") == F.__name__ and not isinstance(found, type)
            )
            if callable(found) and not name.startswith("__") and (id(found) in overridable or is_own):
                table[f"{space.__name__}.{name}"] = found
    for space in (torch, F):  # relu_ and the like, which torch.overrides does not list
        twins = [n for n in vars(space) if n.endswith("_") and f"{space.__name__}.{n[:-1]}" in table]
        table |= {f"{space.__name__}.{n}": getattr(space, n) for n in twins}
    for name in methods():
        if hasattr(torch.Tensor, name):
            table[f"torch.Tensor.{name}"] = getattr(torch.Tensor, name)
    for name in " ".join(_TORCH).split():
        if hasattr(torch, name):
            table[f"torch.{name}"] = getattr(torch, name)
    table |= {f"builtins.{name}": getattr(builtins, name) for name in _BUILTINS.split()}
    table |= _public(math) | _public(operator)
    for name in _NOT_OPERATORS:
        table.pop(f"operator.{name}", None)
    for target in known_targets():  # functions of ours that appear in results
        if str(getattr(target, "__module__", "")).startswith("srfx.nn.") and not isinstance(target, type):
            table[class_name(target)] = target
    return table


def _public(space: ModuleType) -> dict[str, Callable[..., Any]]:
    return {
        f"{space.__name__}.{n}": f for n, f in vars(space).items() if callable(f) and not n.startswith("_")
    }


@functools.cache
def _function_names() -> dict[int, str]:
    names: dict[int, str] = {}
    for name, found in functions().items():
        names.setdefault(id(found), name)
    return names


def function_name(function: Any) -> str | None:
    """The name under which `functions` or `overload` has it, None when neither does."""
    if isinstance(function, torch._ops.OpOverload):
        name = f"{function.namespace}::{function._opname}.{function._overloadname}"
        return name if overload(name) is function else None
    return _function_names().get(id(function))


def overload(name: str) -> Any:
    """The overload of an op of ATen or prims, from ``aten::add.Tensor``; None when there is none a file may name.

    Ops that read or write files (``aten::save``, ``aten::from_file``) are none of these.
    """
    space, _, rest = name.partition("::")
    op_name, _, overload_name = rest.partition(".")
    if space not in ("aten", "prims") or not op_name.isidentifier():
        return None
    packet = getattr(getattr(torch.ops, space), op_name, None)
    if not isinstance(packet, torch._ops.OpOverloadPacket) or overload_name not in packet.overloads():
        return None
    found = getattr(packet, overload_name)
    is_file_access = any(a.name in ("filename", "f") for a in found._schema.arguments)
    return None if is_file_access else found


@functools.cache
def methods() -> frozenset[str]:
    """Every method that a graph may call: those of tensors, sizes and numbers that compute."""
    overridable = {id(f) for f in get_overridable_functions()[torch.Tensor]}
    named = {n for n in dir(torch.Tensor) if id(getattr(torch.Tensor, n, None)) in overridable}
    arithmetic = {n for n in named if n.startswith("__") and n in vars(operator)}
    reflected = {n for n in named if n.startswith("__r") and f"__{n[3:]}" in arithmetic}
    plain = {n for n in named if not n.startswith("_")}
    return frozenset(plain | arithmetic | reflected | set(_METHODS.split()))


@functools.cache
def classes() -> dict[str, type[nn.Module]]:
    """The module classes of torch.nn and srfx.nn, by module and name."""
    table: dict[str, type[nn.Module]] = {}
    for found in (*_loaded("torch.nn.modules"), srfx.nn):
        for item in vars(found).values():
            is_module = isinstance(item, type) and issubclass(item, nn.Module)
            if is_module and item.__module__.startswith(("torch.nn.modules.", "srfx.nn.")):
                table[class_name(item)] = item
    return table


def _loaded(prefix: str) -> Iterator[ModuleType]:
    for name, found in list(sys.modules.items()):
        if name == prefix or name.startswith(f"{prefix}."):
            yield found


def class_name(cls: Any) -> str:
    """``package.module.Class``; also of functions."""
    return f"{getattr(cls, '__module__', None)}.{getattr(cls, '__qualname__', repr(cls))}"


def container_class(name: str) -> Any:
    """A class of nested inputs and outputs: one that is registered with pytree, or a named tuple.

    Only classes of modules that are imported already are found.
    """
    for cls in pytree.SUPPORTED_NODES:
        if class_name(cls) == name:
            return cls
    module, _, last = name.rpartition(".")
    found = getattr(sys.modules.get(module), last, None) if last.isidentifier() else None
    if isinstance(found, type) and issubclass(found, tuple) and hasattr(found, "_fields"):
        return found
    if module == "torch.return_types" and isinstance(found, type) and issubclass(found, tuple):
        return found
    return None
