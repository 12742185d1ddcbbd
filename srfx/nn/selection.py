"""Channels that a value does not compute are put beside those that it does, as a function.

One node in a `torch.fx.symbolic_trace`, like the functions of `srfx.nn.functional`; torch.compile and torch.export
see through it.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function


def spread(x: Tensor, dim: int, index: Tensor, template: Tensor) -> Tensor:
    """Put the channels of x at positions ``index`` of an axis; the others hold the numbers of ``template``.

    y[.., index[i], ..] = x[.., i, ..],    y[.., c, ..] = template[c] at every other c

    Args:
        x: any tensor.
        dim: the axis of the channels, counted from the right.
        index: distinct positions, int32 or int64.
        template: 0 at ``index``.

    Shapes: x [.., K, ..], index [K], template [C] -> [.., C, ..].

    Returns:
        A new tensor in x's dtype.

    Example:
        >>> x = torch.tensor([[1.0, 2.0]])
        >>> spread(x, -1, torch.tensor([2, 0]), torch.tensor([0.0, 5.0, 0.0]))
        tensor([[2., 5., 1.]])
    """
    if has_torch_function((x, index, template)):
        traced: Tensor = handle_torch_function(spread, (x, index, template), x, dim, index, template)
        return traced
    shape = list(x.shape)
    shape[dim] = template.shape[0]
    wide = template.to(x.dtype).view([-1] + [1] * (-dim - 1)).expand(shape)
    return torch.index_add(wide, dim, index, x)
