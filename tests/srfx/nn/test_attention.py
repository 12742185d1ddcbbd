from __future__ import annotations

import copy
import pickle

import torch
import torch.nn.functional as F
from torch import fx

from srfx.nn import DropoutAttention


def operands(*lanes: int):
    q, k, v = (torch.randn(2, 3, n, d) for n, d in zip((4, 5, 5), lanes, strict=True))
    return q, k, v


def test_in_eval_mode_it_is_the_function():
    q, k, v = operands(6, 6, 7)
    mask = torch.rand(4, 5) > 0.3
    mask[:, 0] = True
    layer = DropoutAttention(0.5, scale=0.3).eval()
    assert torch.equal(layer(q, k, v, mask), F.scaled_dot_product_attention(q, k, v, mask, scale=0.3))
    causal = DropoutAttention(0.5, is_causal=True).eval()
    assert torch.equal(causal(q, k, v), F.scaled_dot_product_attention(q, k, v, is_causal=True))


def test_in_training_it_drops_and_keeps_the_mean():
    q, k, v = operands(6, 6, 7)
    layer = DropoutAttention(0.5).train()
    torch.manual_seed(0)
    drawn = torch.stack([layer(q, k, v) for _ in range(2000)])
    assert drawn.std(0).mean() > 0.1
    assert (drawn.mean(0) - F.scaled_dot_product_attention(q, k, v)).abs().max() < 0.2


def test_it_copies_pickles_and_exports():
    q, k, v = operands(6, 6, 6)
    layer = DropoutAttention(0.1).eval()
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), fx.symbolic_trace(layer)):
        assert torch.equal(other(q, k, v), layer(q, k, v))
    exported = torch.export.export(layer, (q, k, v)).module()
    assert torch.equal(exported(q, k, v), layer(q, k, v))
    assert repr(layer) == "DropoutAttention(dropout_p=0.1, is_causal=False)"
