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
    shape = list(x.shape)
    shape[dim] = n_channels
    if template is None:
        return torch.index_add(x.new_zeros(shape), dim, index, x)
    wide = template.to(x.dtype).view([-1] + [1] * (-dim - 1)).expand(shape)
    return torch.index_add(wide, dim, index, x)
