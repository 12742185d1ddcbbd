"""Channels that a value does not compute are put beside those that it does, as a function.

One node in a `torch.fx.symbolic_trace`, like the functions of `srfx.nn.functional`; torch.compile and torch.export
see through it.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function


def spread(x: Tensor, dim: int, index: Tensor, n_channels: int, template: Tensor | None = None) -> Tensor:
    """Put the channels of x at positions ``index`` of an axis; the others hold the numbers of ``template``.

    y[.., index[i], ..] = x[.., i, ..],    y[.., c, ..] = template[c] at every other c

    Args:
        x: any tensor.
        dim: the axis of the channels, counted from the right.
        index: distinct positions, int32 or int64.
        n_channels: C, how many channels the result has.
        template: 0 at ``index``; None is 0 everywhere.

    Shapes: x [.., K, ..], index [K], template [C] -> [.., C, ..].

    Returns:
        A new tensor in x's dtype.

    Example:
        >>> x = torch.tensor([[1.0, 2.0]])
        >>> spread(x, -1, torch.tensor([2, 0]), 3, torch.tensor([0.0, 5.0, 0.0]))
        tensor([[2., 5., 1.]])
    """
    tensors = tuple(t for t in (x, index, template) if t is not None)
    if has_torch_function(tensors):
        traced: Tensor = handle_torch_function(spread, tensors, x, dim, index, n_channels, template)
        return traced
    if torch.compiler.is_compiling() and not torch.compiler.is_exporting():
        return _gathered(x, dim, index, n_channels, template)
    shape = list(x.shape)
    shape[dim] = n_channels
    if template is None:
        return torch.index_add(x.new_zeros(shape), dim, index.long(), x)
    wide = template.to(x.dtype).view([-1] + [1] * (-dim - 1)).expand(shape)
    return torch.index_add(wide, dim, index.long(), x)  # ONNX has no scatter by int32


def add_at(x: Tensor, dim: int, index: Tensor, y: Tensor) -> Tensor:
    """Add the channels of y to those of x at positions ``index`` of an axis: ``x + spread(y, dim, index, C)``.

    Args:
        x: the wide summand.
        dim: the axis of the channels, counted from the right.
        index: distinct positions, int32 or int64.
        y: the narrow summand.

    Shapes: x [.., C, ..], index [K], y [.., K, ..] -> [.., C, ..].

    Example:
        >>> add_at(torch.ones(1, 3), -1, torch.tensor([2]), torch.tensor([[5.0]]))
        tensor([[1., 1., 6.]])
    """
    if has_torch_function((x, index, y)):
        traced: Tensor = handle_torch_function(add_at, (x, index, y), x, dim, index, y)
        return traced
    if torch.compiler.is_compiling() and not torch.compiler.is_exporting():
        return x + _gathered(y, dim, index, x.shape[dim], None)
    return torch.index_add(x, dim, index.long(), y)


def _gathered(x: Tensor, dim: int, index: Tensor, n_channels: int, template: Tensor | None) -> Tensor:
    """The same by reading instead of writing, which a compiler fuses with the readers."""
    places, layout = index.long(), [-1] + [1] * (-dim - 1)
    source = places.new_zeros(n_channels).index_copy(
        0, places, torch.arange(places.shape[0], device=x.device)
    )
    is_there = torch.zeros(n_channels, dtype=torch.bool, device=x.device).index_fill(0, places, True)
    others = x.new_zeros(()) if template is None else template.to(x.dtype).view(layout)
    return torch.where(is_there.view(layout), x.index_select(dim, source), others)
