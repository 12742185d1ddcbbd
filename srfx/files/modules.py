"""A tree of modules as JSON and back.

Modules of torch.nn and srfx.nn are written as pickle would write them, class and state, but with plain data for the
state; ``__setstate__`` takes it in, so that what torch mends in old pickles it mends here.  Other modules, and forward
hooks, are code: they come from the original model, found by path, and get the tensors of the file.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn

from srfx.errors import DamagedFileError, FileError, MissingArchitectureError
from srfx.files import names
from srfx.files.graphs import Functions, graph_data, graph_of
from srfx.files.tensors import TensorReader, TensorWriter
from srfx.files.trees import identifier
from srfx.files.values import Decoder, Encoder
from srfx.ir.clone import clone_structure, copy_call_hooks

_INTERNAL = frozenset(nn.Module().__dict__)
_GRAPH = "torch.fx.GraphModule"
_DERIVED = {nn.RNNBase: ("_flat_weights", "_flat_weight_refs")}
"""Attributes that hold tensors again, and are made anew."""


def tensors(root: nn.Module) -> Iterator[Tensor]:
    """Every tensor that `ModuleWriter` will ask for."""
    for module in root.modules():
        for store in (module._parameters, module._buffers, _attributes(module)):
            yield from (t for t in store.values() if isinstance(t, Tensor))


def _attributes(module: nn.Module) -> dict[str, Any]:
    derived = [name for cls, found in _DERIVED.items() if isinstance(module, cls) for name in found]
    return {
        key: value for key, value in module.__dict__.items() if key not in _INTERNAL and key not in derived
    }


class ModuleWriter:
    """Writes modules; each object once."""

    def __init__(self, tensors: TensorWriter) -> None:
        self.tensors = tensors
        self.paths: dict[nn.Module, str] = {}

    def __call__(self, module: nn.Module, path: str = "") -> dict[str, Any]:
        """Class, settings, tensors and children.

        Raises:
            UnsavableError: a setting has no form in JSON.
        """
        if module in self.paths:
            return {"same": self.paths[module]}
        self.paths[module] = path
        is_graph = isinstance(module, fx.GraphModule)
        known = (
            is_graph
            or names.classes().get(names.class_name(type(module))) is type(module)
            or type(module) is nn.Module
        )
        data: dict[str, Any] = {"class": _GRAPH if is_graph else names.class_name(type(module))}
        data["training"] = module.training
        attributes = _attributes(module)
        found: dict[str, Mapping[str, Tensor | None]] = {
            "parameters": module._parameters,
            "buffers": module._buffers,
            "tensors": {k: v for k, v in attributes.items() if isinstance(v, Tensor)},
        }
        for kind, store in found.items():
            if store:
                data[kind] = {name: self._tensor(tensor, path, name) for name, tensor in store.items()}
        if module._non_persistent_buffers_set:
            data["transient"] = sorted(module._non_persistent_buffers_set)
        if module._modules:
            data["children"] = {
                name: None if child is None else self(child, f"{path}.{name}" if path else name)
                for name, child in module._modules.items()
            }
        if is_graph:
            assert isinstance(module, fx.GraphModule)
            data |= {"name": type(module).__name__, "graph": graph_data(module.graph)}
        elif not known:
            data["custom"] = True
        else:
            encode = Encoder(f"the module {path or '(root)'} ({type(module).__name__})")
            data["state"] = {k: encode(v) for k, v in attributes.items() if not isinstance(v, Tensor)}
        if _has_hooks(module):
            data["hooks"] = True
        return data

    def _tensor(self, tensor: Tensor | None, path: str, name: str) -> str | None:
        return None if tensor is None else self.tensors.key(tensor, f"{path}.{name}" if path else name)


class ModuleReader:
    """Reads what `ModuleWriter` wrote.

    Args:
        tensors: gives the tensor of a key.
        original: the user's model, for what is code; None when there is none.
        functions: the functions that its graph calls, by name.
        device: replaces devices in graphs and settings.
    """

    def __init__(
        self,
        tensors: TensorReader,
        original: nn.Module | None,
        functions: Functions | None,
        device: torch.device | None,
    ) -> None:
        self.tensors = tensors
        self.original = original
        self.functions = functions
        self.device = device
        self.made: dict[str, nn.Module] = {}

    def __call__(self, data: dict[str, Any], path: str = "") -> nn.Module:
        """The module.

        Raises:
            MissingArchitectureError: it is of a class of its own, or has hooks, and no original was given.
            FileError: the original does not fit, or a class is unknown.
            DamagedFileError: the data make no sense.
        """
        if "same" in data:
            return self.made[data["same"]]
        state = self._state(data, path)
        if data["class"] == _GRAPH:
            new: nn.Module = self._graph(data, state)
        elif data.get("custom"):
            new = self._custom(data, path, state)
        else:
            new = self._known(data, path, state)
        self.made[path] = new
        if data.get("hooks"):
            copy_call_hooks(self._counterpart(path, "has forward hooks"), new)
        return new

    def _state(self, data: dict[str, Any], path: str) -> dict[str, Any]:
        children: dict[str, nn.Module | None] = {}
        for name, child in data.get("children", {}).items():
            children[_name(name)] = None if child is None else self(child, f"{path}.{name}" if path else name)
        return {
            "training": bool(data["training"]),
            "_parameters": self._store(data, "parameters"),
            "_buffers": self._store(data, "buffers"),
            "_non_persistent_buffers_set": set(data.get("transient", ())),
            "_modules": children,
            **self._store(data, "tensors"),
        }

    def _store(self, data: dict[str, Any], kind: str) -> dict[str, Tensor | None]:
        found = {
            _name(n): None if key is None else self.tensors(key) for n, key in data.get(kind, {}).items()
        }
        for name, tensor in found.items():
            if tensor is not None and isinstance(tensor, nn.Parameter) is not (kind == "parameters"):
                raise DamagedFileError(f"the file is damaged: {name} is listed among the {kind}")
        return found

    def _known(self, data: dict[str, Any], path: str, state: dict[str, Any]) -> nn.Module:
        name = data["class"]
        cls = nn.Module if name == names.class_name(nn.Module) else names.classes().get(name)
        if cls is None:
            raise FileError(
                f"the module {path}: a file may not name the class {name}, or this torch does not have it"
            )
        decode = Decoder(f"the module {path}", device=self.device)
        settings = {_name(key): decode(value) for key, value in data["state"].items()}
        if _INTERNAL & settings.keys():
            raise DamagedFileError(f"the file is damaged: {path} sets {sorted(_INTERNAL & settings.keys())}")
        new = cls.__new__(cls)
        nn.Module.__init__(new)
        if isinstance(new, nn.RNNBase):
            settings["_flat_weights"] = []  # __setstate__ looks at it
        new.__setstate__({**new.__dict__, **state, **settings})
        if isinstance(new, nn.RNNBase):
            new._init_flat_weights()
        return new

    def _graph(self, data: dict[str, Any], state: dict[str, Any]) -> fx.GraphModule:
        holder = nn.Module()
        holder.__dict__.update(state)
        graph = graph_of(data["graph"], self.functions, self.device)
        new = fx.GraphModule(holder, graph, identifier(data["name"]))
        for key in (
            "_parameters",
            "_buffers",
            "_modules",
            "_non_persistent_buffers_set",
        ):  # in the order they had
            new.__dict__[key] = state[key]
        new.training = state["training"]
        return new

    def _custom(self, data: dict[str, Any], path: str, state: dict[str, Any]) -> nn.Module:
        source = self._counterpart(path, f"is a {data['class']}, whose code is not in the file")
        if names.class_name(type(source)) != data["class"]:
            raise FileError(
                f"{path} is a {data['class']} in the file, in model a {names.class_name(type(source))}"
            )
        new = clone_structure(source)
        for key, value in state.items():
            new.__dict__[key] = value
        return new

    def _counterpart(self, path: str, why: str) -> nn.Module:
        if self.original is None:
            raise MissingArchitectureError(
                f"{path or 'the model'} {why}: pass the original to srfx.load as model"
            )
        try:
            return self.original.get_submodule(path)
        except AttributeError as error:
            raise FileError(
                f"the given model has no module {path!r}, which {why}: is it the original?"
            ) from error


def _name(name: Any) -> str:
    if not (isinstance(name, str) and name and not name.startswith("__") and "." not in name):
        raise DamagedFileError(f"the file is damaged: {name!r} is no name of an attribute")
    return name


def _has_hooks(module: nn.Module) -> bool:
    return bool(module._forward_hooks or module._forward_pre_hooks or module._backward_hooks)
