"""Files of ``torch.export.save`` (``.pt2``) in and out, with the same dynamic sizes."""

from __future__ import annotations

import contextlib
import logging
import os
import zipfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx
from torch.export import Dim, ExportedProgram, ShapesCollection
from torch.utils import _pytree as pytree
from torch.utils._sympy.numbers import int_oo

from srfx.errors import OP_FAILURES, DamagedFileError, FileError, UnsavableError
from srfx.files.atomic import replacing
from srfx.ir.generate import Spec, generate
from srfx.record.attach import record_of
from srfx.record.record import TensorSpec
from srfx.verify import call_arguments


class FreeSize(NamedTuple):
    """A size that is not fixed; equal names are equal sizes."""

    name: str
    lower: int
    upper: int | None


def read_program(path: str | os.PathLike[str]) -> ExportedProgram:
    """The exported program of a ``.pt2`` file.

    PyTorch unpickles parts of such a file: read only files from people you trust.

    Raises:
        FileNotFoundError: there is no such file.
        FileError: no file of ``torch.export.save``.
        DamagedFileError: one that is damaged, or of another PyTorch.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}")
    if not zipfile.is_zipfile(path):
        raise FileError(f"{path} is no file of torch.export.save, or is damaged: it is no zip archive")
    try:
        with _without_log():
            return torch.export.load(path)
    except (*OP_FAILURES, zipfile.BadZipFile) as error:
        text = str(error).strip().splitlines()
        raise DamagedFileError(
            f"{path} cannot be read as an exported program ({type(error).__name__}: {text[0] if text else ''}); "
            f"was it written by torch.export.save of another PyTorch than {torch.__version__}?"
        ) from error


@contextlib.contextmanager
def _without_log() -> Iterator[None]:
    log = logging.getLogger("torch.export")
    was, log.disabled = log.disabled, True
    try:
        yield
    finally:
        log.disabled = was


def dynamic_axes(program: ExportedProgram) -> list[dict[int, FreeSize]]:
    """For each input tensor (each leaf, in order) the axes whose size is free.

    Example:
        >>> axis = {0: Dim("batch", max=64)}
        >>> found = dynamic_axes(torch.export.export(torch.nn.ReLU(), (torch.ones(2, 3),), dynamic_shapes=(axis,)))
        >>> found[0][0].upper
        64
    """
    values: dict[str, Any] = {n.name: n.meta.get("val") for n in program.graph.find_nodes(op="placeholder")}
    found = []
    for name in program.graph_signature.user_inputs:
        value = values.get(name) if isinstance(name, str) else None
        axes: dict[int, FreeSize] = {}
        sizes: Sequence[Any] = value.shape if isinstance(value, Tensor) else ()
        for axis, size in enumerate(sizes):
            if isinstance(size, torch.SymInt) and not size.node.expr.is_number:  # a number: torch fixed it
                limits = program.range_constraints.get(size.node.expr)
                lower, upper = (0, int_oo) if limits is None else (limits.lower, limits.upper)
                axes[axis] = FreeSize(
                    str(size.node.expr), int(lower), None if upper == int_oo else int(upper)
                )
        found.append(axes)
    return found


def export_again(small: fx.GraphModule, axes: list[dict[int, FreeSize]] | None) -> ExportedProgram:
    """Export a minimized model.

    Args:
        small: a result of `srfx.minimize`, which remembers the shapes of its inputs.
        axes: the sizes that shall be free, as `dynamic_axes` of the original gives them; None frees the leading axis
            of every input.

    Raises:
        UnsavableError: it has no record, torch.export cannot export it, or fixes a size that was free.
    """
    record = record_of(small)
    if record is None:
        raise UnsavableError("the model carries no record that tells the shapes of its inputs")
    specs = pytree.tree_map_only(TensorSpec, _spec_with_batch if axes is None else _spec, record.inputs)
    args, kwargs = call_arguments(small, generate(small, specs, torch.Generator().manual_seed(0)))
    leaves = pytree.tree_leaves((args, kwargs))
    if axes is None:
        batch = FreeSize("batch", 0, None)
        axes = [{0: batch} if isinstance(t, Tensor) and t.dim() else {} for t in leaves]
    try:
        program = _export(small, args, kwargs, leaves, axes, _named)
    except UnsavableError:  # sizes that depend on one another: torch.export finds out how
        program = _export(small, args, kwargs, leaves, axes, _automatic)
    fixed = [
        i for i, (a, b) in enumerate(zip(axes, dynamic_axes(program), strict=True)) if a.keys() != b.keys()
    ]
    if fixed:
        raise UnsavableError(
            f"torch.export fixed sizes of inputs {fixed} that were free: save as .srfx instead"
        )
    return program


def write_program(program: ExportedProgram, path: str | os.PathLike[str]) -> None:
    """``torch.export.save``, at once or not at all."""
    with replacing(path) as file:
        torch.export.save(program, file)


def _export(
    small: fx.GraphModule,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    leaves: list[Any],
    axes: list[dict[int, FreeSize]],
    dim: Callable[[FreeSize], Any],
) -> ExportedProgram:
    shapes: Any = ShapesCollection()
    for tensor, free in zip(leaves, axes, strict=True):
        if free:
            shapes[tensor] = {axis: dim(size) for axis, size in free.items()}
    try:
        with torch.no_grad():
            return torch.export.export(
                small, args, kwargs, dynamic_shapes=shapes if any(axes) else None, strict=False
            )
    except (*OP_FAILURES, torch._dynamo.exc.TorchDynamoException) as error:
        text = str(error).strip().splitlines()
        raise UnsavableError(
            f"torch.export cannot export the minimized model: {text[0] if text else error}"
        ) from error


def _named(size: FreeSize) -> Any:
    if not size.name.isidentifier():
        return _automatic(size)
    limits = {} if size.upper is None else {"max": size.upper}
    return Dim(size.name, min=size.lower, **limits)


def _automatic(size: FreeSize) -> Any:
    return Dim.AUTO if size.upper is None else Dim.AUTO(max=size.upper)


def _spec(found: TensorSpec) -> Spec:
    return Spec(found.shape, found.dtype, found.device)


def _spec_with_batch(found: TensorSpec) -> Spec:
    """torch.export takes a size of 1 for one that is always 1."""
    return Spec((max(2, found.shape[0]), *found.shape[1:]) if found.shape else (), found.dtype, found.device)
