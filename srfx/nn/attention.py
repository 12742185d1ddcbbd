"""Attention as a module, so that its dropout follows the training flag."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn


class DropoutAttention(nn.Module):
    """``scaled_dot_product_attention`` that drops weights in training only, as nn.MultiheadAttention does.

    Args:
        dropout_p: probability with which a weight is dropped in training.
        is_causal: whether a query sees only keys up to its own position.
        scale: factor of the scores; None is 1 / sqrt(head size).

    Shapes: query [.., Tq, D], key [.., Tk, D], value [.., Tk, Dv], attn_mask broadcasts to [.., Tq, Tk].

    Example:
        >>> import torch
        >>> q = torch.randn(2, 3, 4)
        >>> torch.equal(DropoutAttention(0.5).eval()(q, q, q), F.scaled_dot_product_attention(q, q, q))
        True
    """

    def __init__(self, dropout_p: float, is_causal: bool = False, scale: float | None = None) -> None:
        super().__init__()
        self.dropout_p = dropout_p
        self.is_causal = is_causal
        self.scale = scale

    def forward(self, query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None) -> Tensor:
        """The attention of the queries to the keys' values."""
        p = self.dropout_p if self.training else 0.0
        return F.scaled_dot_product_attention(
            query, key, value, attn_mask, dropout_p=p, is_causal=self.is_causal, scale=self.scale
        )

    def extra_repr(self) -> str:
        """The options."""
        scale = "" if self.scale is None else f", scale={self.scale}"
        return f"dropout_p={self.dropout_p}, is_causal={self.is_causal}{scale}"
