"""Channels are selected from a value, or put beside others that it does not compute, as functions.

Each is one node in a `torch.fx.symbolic_trace`, like the functions of `srfx.nn.functional`; torch.compile and
torch.export see through them.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function


def select(x: Tensor, dim: int, index: Tensor) -> Tensor:
    """Channels ``index`` of an axis: ``x.index_select(dim, index)``.

    torch.index_select is several times faster along the last axis of a matrix than along that of a larger tensor.

    Args:
        x: any tensor.
        dim: the axis of the channels, counted from the right.
        index: positions, int32 or int64.

    Shapes: x [.., C, ..], index [K] -> [.., K, ..].

    Example:
        >>> select(torch.tensor([[[1.0, 2.0, 3.0]]]), -1, torch.tensor([2, 0]))
        tensor([[[3., 1.]]])
    """
    if has_torch_function((x, index)):
        traced: Tensor = handle_torch_function(select, (x, index), x, dim, index)
        return traced
    if dim != -1 or x.dim() < 3 or torch.compiler.is_compiling():
        return x.index_select(dim, index)
    return x.flatten(0, -2).index_select(1, index).view(*x.shape[:-1], index.shape[0])


def spread(
    x: Tensor, dim: int, index: Tensor | int, n_channels: int, template: Tensor | None = None
) -> Tensor:
    """Put the channels of x at positions ``index`` of an axis; the others hold the numbers of ``template``.

    y[.., index[i], ..] = x[.., i, ..],    y[.., c, ..] = template[c] at every other c

    Args:
        x: any tensor.
        dim: the axis of the channels, counted from the right.
        index: distinct positions, int32 or int64; or a number, the first of positions that follow one another.
            No position at all: x lends its other sizes only, and is one channel wide.
        n_channels: C, how many channels the result has.
        template: 0 at ``index``; None is 0 everywhere.

    Shapes: x [.., K, ..], index [K], template [C] -> [.., C, ..].

    Returns:
        A new tensor in x's dtype.

    Example:
        >>> x = torch.tensor([[1.0, 2.0]])
        >>> spread(x, -1, torch.tensor([2, 0]), 3, torch.tensor([0.0, 5.0, 0.0]))
        tensor([[2., 5., 1.]])
        >>> spread(x, -1, 1, 4)
        tensor([[0., 1., 2., 0.]])
    """
    tensors = tuple(t for t in (x, index, template) if t is not None and not isinstance(t, int))
    if has_torch_function(tensors):
        traced: Tensor = handle_torch_function(spread, tensors, x, dim, index, n_channels, template)
        return traced
    others = None if template is None else template.to(x.dtype).view([-1] + [1] * (-dim - 1))
    shape = list(x.shape)
    shape[dim] = n_channels
    if not isinstance(index, int) and index.numel() == 0:
        return x.new_zeros(shape) if others is None else others.expand(shape).clone()
    if torch.compiler.is_compiling():
        if isinstance(index, int):
            padded = _padded(x, dim, index, n_channels)
            return padded if others is None else padded + others
        if not torch.compiler.is_exporting():
            return _gathered(x, dim, index, n_channels, template)
    if torch.compiler.is_exporting():
        assert isinstance(index, Tensor)
        wide = x.new_zeros(shape) if others is None else others.expand(shape)
        return torch.index_add(wide, dim, index.long(), x)  # ONNX has no scatter by int32
    wide = x.new_zeros(shape) if others is None else x.new_empty(shape).copy_(others)
    if isinstance(index, int):
        wide.narrow(dim, index, x.shape[dim]).copy_(x)
        return wide
    return wide.index_add_(dim, index.long(), x)


def add_at(x: Tensor, dim: int, index: Tensor | int, y: Tensor) -> Tensor:
    """Add the channels of y to those of x at positions ``index`` of an axis: ``x + spread(y, dim, index, C)``.

    Args:
        x: the wide summand.
        dim: the axis of the channels, counted from the right.
        index: distinct positions, int32 or int64; or a number, the first of positions that follow one another.
        y: the narrow summand.

    Shapes: x [.., C, ..], index [K], y [.., K, ..] -> [.., C, ..].

    Example:
        >>> add_at(torch.ones(1, 3), -1, torch.tensor([2]), torch.tensor([[5.0]]))
        tensor([[1., 1., 6.]])
        >>> add_at(torch.ones(1, 3), -1, 1, torch.tensor([[5.0, 6.0]]))
        tensor([[1., 6., 7.]])
    """
    tensors = tuple(t for t in (x, index, y) if not isinstance(t, int))
    if has_torch_function(tensors):
        traced: Tensor = handle_torch_function(add_at, tensors, x, dim, index, y)
        return traced
    if isinstance(index, int):
        return x + _padded(y, dim, index, x.shape[dim])
    if torch.compiler.is_compiling() and not torch.compiler.is_exporting():
        return x + _gathered(y, dim, index, x.shape[dim], None)
    return torch.index_add(x, dim, index.long(), y)


def _padded(x: Tensor, dim: int, start: int, n_channels: int) -> Tensor:
    behind = n_channels - start - x.shape[dim]
    return F.pad(x, [0, 0] * (-dim - 1) + [start, behind])


def _gathered(x: Tensor, dim: int, index: Tensor, n_channels: int, template: Tensor | None) -> Tensor:
    """The same by reading instead of writing, which a compiler fuses with the readers."""
    places, layout = index.long(), [-1] + [1] * (-dim - 1)
    source = places.new_zeros(n_channels).index_copy(
        0, places, torch.arange(places.shape[0], device=x.device)
    )
    is_there = torch.zeros(n_channels, dtype=torch.bool, device=x.device).index_fill(0, places, True)
    others = x.new_zeros(()) if template is None else template.to(x.dtype).view(layout)
    return torch.where(is_there.view(layout), x.index_select(dim, source), others)
