"""`load`: a minimized model out of a file of `srfx.save`."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import torch
from torch import fx, nn
from torch.export import ExportedProgram

from srfx.errors import DamagedFileError, FileError, PlanError
from srfx.files.container import Fetch, read
from srfx.files.modules import ModuleReader
from srfx.files.original import Original
from srfx.files.records import record_of_data
from srfx.files.tensors import TensorReader
from srfx.ir.short_paths import shorten_paths
from srfx.ir.surroundings import on_cpu, plain_torch
from srfx.record.attach import attach

# What reading data of another form than expected raises.
_MISREADINGS = (
    AttributeError,
    IndexError,
    KeyError,
    OverflowError,
    RecursionError,
    RuntimeError,
    SyntaxError,
    TypeError,
    ValueError,
)

Source = nn.Module | ExportedProgram | Callable[[], nn.Module]


def load(
    path: str | os.PathLike[str], model: Source | None = None, *, device: str | torch.device | None = None
) -> fx.GraphModule:
    """Read a minimized model from a file of `srfx.save`.

    Loading runs no code from the file and imports nothing.  The file can name operations of PyTorch that compute, and
    layers of torch.nn and srfx.nn, and nothing else.

    Args:
        path: the file.
        model: the original architecture, a module or a function that makes one (its weights do not matter; they are
            in the file).  Needed only when the model calls functions, has modules or hooks that are not PyTorch's:
            these are taken from it.  When it is given, it has to fit the plan.
        device: where to put the model; None is where it was when it was saved.

    Returns:
        The GraphModule that was saved: the same graph, weights, names, ties and flags, the same report and plan.

    Raises:
        FileNotFoundError: there is no such file.
        DamagedFileError: the file was cut short or changed.
        NewerFileError: a newer srfx wrote it.
        MissingArchitectureError: pass ``model``.
        FileError: no file of `srfx.save`; ``model`` is not the original; or the file names what it may not.

    Example: see `srfx.save`.
    """
    document, fetch = read(path)
    place = None if device is None else torch.device(device)
    try:
        with torch.no_grad(), plain_torch(), on_cpu():
            return _build(document, fetch, model, place)
    except FileError as error:
        if os.fspath(path) in str(error):  # of the container, which knows its name
            raise
        raise type(error)(f"{os.fspath(path)}: {error}") from error
    except PlanError as error:
        raise DamagedFileError(f"{os.fspath(path)} is damaged: {error}") from error
    except _MISREADINGS as error:
        raise DamagedFileError(f"{os.fspath(path)} is damaged: {type(error).__name__}: {error}") from error


def _build(
    document: dict[str, Any], fetch: Fetch, model: Source | None, device: torch.device | None
) -> fx.GraphModule:
    record = None if document["record"] is None else record_of_data(document["record"], device)
    original = None if model is None else Original(model, record)
    functions = None if original is None else original.functions
    tensors = TensorReader(document["tensors"], fetch, device)
    modules = ModuleReader(tensors, None if original is None else original.module, functions, device)
    gm = modules(document["module"])
    if not isinstance(gm, fx.GraphModule):
        raise DamagedFileError("the file is damaged: its root is no graph")
    gm.graph.lint()
    shorten_paths(gm)
    if original is not None:
        original.check(gm)
    if record is not None:
        attach(gm, record)
    return gm
