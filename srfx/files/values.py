"""Python values as JSON and back: what stands among the arguments of a graph and the settings of a module.

JSON's own values stand for themselves, lists too; everything else is ``{"kind": ...}`` with one key, so that nothing
is mistaken for something else.  Reading gives data only: names are looked up in `srfx.files.names`.
"""

from __future__ import annotations

import math
from collections import OrderedDict, defaultdict, deque
from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from srfx.errors import FileError, UnsavableError
from srfx.files import names
from srfx.nn import RemovedConstants
from srfx.record.record import TensorSpec

_TORCH_NAMES = (torch.dtype, torch.memory_format, torch.layout)
_FACTORIES = {"dict": dict, "float": float, "int": int, "list": list, "set": set, "str": str, "tuple": tuple}
_SEQUENCES: dict[str, Callable[[Any], Any]] = {
    "tuple": tuple,
    "size": torch.Size,
    "set": set,
    "frozenset": frozenset,
    "deque": deque,
}


def kind_name(cls: type) -> str:
    """How a class is written: a builtin by its name alone."""
    return cls.__name__ if cls.__module__ == "builtins" else names.class_name(cls)


class Encoder:
    """Turns values into JSON.

    Args:
        where: what is being written, for error messages.
        node: what to write for a node of a graph; None when none can occur.
    """

    def __init__(self, where: str, node: Callable[[fx.Node], str] | None = None) -> None:
        self.where = where
        self.node = node

    def __call__(self, value: Any) -> Any:
        """The value as JSON.

        Raises:
            UnsavableError: there is no form for it.
        """
        if value is None or type(value) in (bool, int, str):
            return value
        if type(value) is float:
            return value if math.isfinite(value) else {"float": repr(value)}
        if isinstance(value, list):
            return [self(item) for item in value]
        if isinstance(value, fx.Node) and self.node is not None:
            return {"node": self.node(value)}
        return self._tagged(value)

    def _tagged(self, value: Any) -> dict[str, Any]:
        kind = type(value)
        if isinstance(value, TensorSpec):
            return {"tensor": [list(value.shape), self(value.dtype), value.device]}
        if isinstance(value, RemovedConstants):
            return {"removed": [value.n_values, self(value.mean), self(value.m2)]}
        if kind is torch.Size or kind is tuple or isinstance(value, (set, frozenset, deque)):
            name = "size" if kind is torch.Size else kind.__name__
            items = sorted(value, key=repr) if isinstance(value, (set, frozenset)) else value
            return {name: [self(item) for item in items]}
        if isinstance(value, tuple) and hasattr(value, "_fields"):
            return {"named": [names.class_name(kind), *(self(item) for item in value)]}
        if isinstance(value, (OrderedDict, defaultdict, dict)):
            return self._mapping(value)
        if isinstance(value, (slice, range)):
            return {kind.__name__: [self(part) for part in (value.start, value.stop, value.step)]}
        if isinstance(value, complex):
            return {"complex": [self(value.real), self(value.imag)]}
        if isinstance(value, _TORCH_NAMES):
            return {"torch": str(value).removeprefix("torch.")}
        if isinstance(value, torch.device):
            return {"device": str(value)}
        if value is Ellipsis:
            return {"ellipsis": True}
        if isinstance(value, type) and (
            _FACTORIES.get(kind_name(value)) is value or hasattr(value, "_fields")
        ):
            return {"class": kind_name(value)}
        function = names.function_name(value) if callable(value) else None
        if function is not None:
            return {"function": function}
        raise UnsavableError(
            f"{self.where} holds {value!r} of class {names.class_name(kind)}, which has no form in JSON"
        )

    def _mapping(self, value: dict[Any, Any]) -> dict[str, Any]:
        items = [[self(key), self(item)] for key, item in value.items()]
        if isinstance(value, defaultdict):
            return {"defaultdict": [self(value.default_factory), *items]}
        return {"ordered" if isinstance(value, OrderedDict) else "dict": items}


class Decoder:
    """Turns JSON of `Encoder` into values.

    Args:
        where: what is being read, for error messages.
        node: the node of a name.
        device: where to put what the file says is on some device; None keeps the file's.
    """

    def __init__(
        self, where: str, node: Callable[[str], fx.Node] | None = None, device: torch.device | None = None
    ) -> None:
        self.where = where
        self.node = node
        self.device = device

    def __call__(self, data: Any) -> Any:
        """The value.

        Raises:
            FileError: no form that `Encoder` writes, or a name that a file may not use.
        """
        if isinstance(data, list):
            return [self(item) for item in data]
        if not isinstance(data, dict):
            return data
        if len(data) != 1:
            raise FileError(f"{self.where}: expected one key, got {sorted(data)}")
        ((kind, item),) = data.items()
        read = getattr(self, f"_read_{kind}", None)
        if kind in _SEQUENCES:
            return _SEQUENCES[kind]([self(part) for part in item])
        if read is None:
            raise FileError(f"{self.where}: a value of kind {kind!r} is unknown here")
        return read(item)

    def _read_float(self, text: str) -> float:
        return float(text)

    def _read_complex(self, parts: list[Any]) -> complex:
        return complex(self(parts[0]), self(parts[1]))

    def _read_node(self, name: str) -> fx.Node:
        if self.node is None:
            raise FileError(f"{self.where}: a node has no place here")
        return self.node(name)

    def _read_tensor(self, parts: list[Any]) -> TensorSpec:
        device = parts[2] if self.device is None else str(self.device)
        return TensorSpec(tuple(parts[0]), self(parts[1]), device)

    def _read_removed(self, parts: list[Any]) -> RemovedConstants:
        return RemovedConstants(parts[0], self(parts[1]), self(parts[2]))

    def _read_named(self, parts: list[Any]) -> Any:
        cls = names.container_class(parts[0])
        if cls is None:
            raise FileError(f"{self.where}: the class {parts[0]} is unknown here: import its module first")
        return cls(*(self(part) for part in parts[1:]))

    def _read_dict(self, items: list[Any]) -> dict[Any, Any]:
        return {self(key): self(item) for key, item in items}

    def _read_ordered(self, items: list[Any]) -> OrderedDict[Any, Any]:
        return OrderedDict((self(key), self(item)) for key, item in items)

    def _read_defaultdict(self, items: list[Any]) -> defaultdict[Any, Any]:
        return defaultdict(self(items[0]), {self(key): self(item) for key, item in items[1:]})

    def _read_slice(self, parts: list[Any]) -> slice:
        return slice(*(self(part) for part in parts))

    def _read_range(self, parts: list[Any]) -> range:
        return range(*(self(part) for part in parts))

    def _read_torch(self, name: str) -> Any:
        found = getattr(torch, name, None) if name.isidentifier() else None
        if not isinstance(found, _TORCH_NAMES):
            raise FileError(f"{self.where}: this torch has no dtype, layout or memory format {name!r}")
        return found

    def _read_device(self, name: str) -> torch.device:
        return torch.device(name) if self.device is None else self.device

    def _read_ellipsis(self, _: Any) -> Any:
        return Ellipsis

    def _read_class(self, name: str) -> Any:
        found = _FACTORIES.get(name) or names.container_class(name)
        if found is None:
            raise FileError(f"{self.where}: the class {name} is unknown here: import its module first")
        return found

    def _read_function(self, name: str) -> Any:
        return function_of(name, self.where)


def function_of(name: str, where: str) -> Any:
    """The function or ATen overload of a name.

    Raises:
        FileError: none that a file may name.
    """
    found = names.overload(name) if "::" in name else names.functions().get(name)
    if found is None:
        raise FileError(f"{where}: a file may not name the function {name!r}, or this torch does not have it")
    return found
