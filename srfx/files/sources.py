"""Models from wherever a user keeps them: a file, or a function in a Python module."""

from __future__ import annotations

import importlib
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_model
from torch import Tensor, nn

from srfx.errors import FileError
from srfx.files.exported import FreeSize, dynamic_axes, read_program
from srfx.files.load import load


@dataclass(frozen=True)
class ReadModel:
    """A model and how it was given.

    Attributes:
        model: the module.
        args: example inputs.
        kwargs: example inputs by keyword.
        axes: for an exported program, the free sizes of its inputs; else None.
    """

    model: nn.Module
    args: tuple[Any, ...] | None = None
    kwargs: dict[str, Any] | None = None
    axes: list[dict[int, FreeSize]] | None = None


def read_model(source: str, weights: str | None = None, inputs: list[str] | None = None) -> ReadModel:
    """Read ``file.pt2``, ``file.srfx`` or ``package.module:factory``.

    Args:
        source: which; the module is looked for in the current folder too, and is run.
        weights: for a factory, the state dict: safetensors, or a file of torch.save (read with ``weights_only``).
        inputs: shapes of the inputs, see `parse_input`.

    Raises:
        FileNotFoundError: no such file.
        FileError: it cannot be read, or gives no model.
    """
    args, kwargs = parse_inputs(inputs or [])
    if ":" in source and not Path(source).exists():
        model = _make(source)
        if weights is not None:
            _load_weights(model, Path(weights))
        return ReadModel(model.eval(), args, kwargs)
    if weights is not None:
        raise FileError(f"--weights belong to package.module:factory; {source} has weights of its own")
    if source.endswith(".pt2"):
        program = read_program(source)
        return ReadModel(program.module(), args, kwargs, dynamic_axes(program))
    if source.endswith(".srfx"):
        return ReadModel(load(source), args, kwargs)
    raise FileError(f"{source!r} is none of file.pt2, file.srfx, package.module:factory")


def parse_inputs(texts: list[str]) -> tuple[tuple[Any, ...] | None, dict[str, Any] | None]:
    """Example inputs from texts like ``1x3x224x224``, ``2x16:int64`` and ``mask=2x16:bool``.

    Example:
        >>> args, kwargs = parse_inputs(["2x3", "ids=2x5:int64"])
        >>> args[0].shape, kwargs["ids"].dtype
        (torch.Size([2, 3]), torch.int64)
    """
    args, kwargs = [], {}
    for text in texts:
        name, _, rest = text.rpartition("=")
        if name:
            kwargs[name] = _zeros(rest)
        else:
            args.append(_zeros(rest))
    return tuple(args) or None, kwargs or None


def _zeros(text: str) -> Tensor:
    sizes, _, name = text.partition(":")
    dtype = getattr(torch, name or "float32", None)
    parts = [part for part in sizes.split("x") if part]
    if not isinstance(dtype, torch.dtype) or not all(part.isdecimal() for part in parts):
        raise FileError(f"{text!r} is no shape: write 2x3x32x32, or 2x16:int64, or ids=2x16:int64")
    return torch.zeros([int(part) for part in parts], dtype=dtype)


def _make(source: str) -> nn.Module:
    module_name, _, path = source.partition(":")
    here = os.getcwd()
    if here not in sys.path:
        sys.path.insert(0, here)
    try:
        found: Any = importlib.import_module(module_name)
        for part in path.split("."):
            found = getattr(found, part)
    except ModuleNotFoundError as error:
        if error.name is None or not module_name.startswith(error.name):
            raise
        raise FileError(f"there is no module {module_name!r} here or among the installed ones") from error
    except AttributeError as error:
        raise FileError(f"the module {module_name!r} has no {path!r}") from error
    model = found if isinstance(found, nn.Module) else found()
    if not isinstance(model, nn.Module):
        raise FileError(f"{source} gives a {type(model).__name__}, not an nn.Module")
    return model


def _load_weights(model: nn.Module, path: Path) -> None:
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}")
    try:
        if path.suffix == ".safetensors":
            load_model(model, path)  # knows tied weights
        else:
            model.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
    except UnpicklingError as error:
        raise FileError(
            f"{path} is no state dict: write it with safetensors, or with torch.save(model.state_dict(), ...)"
        ) from error
    except (SafetensorError, RuntimeError, ValueError) as error:
        lines = [line.strip() for line in str(error).strip().splitlines()]
        raise FileError(f"the weights in {path} do not fit the model: {' '.join(lines)[:500]}") from error
