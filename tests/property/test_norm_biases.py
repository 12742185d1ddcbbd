"""Readers of a norm with and without bias: what is removed never costs more numbers than it saves (theory: Lemma N6)."""

from __future__ import annotations

import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from tests.helpers import check, randomized


class Readers(nn.Module):
    """A stream of which some channels are constants, a norm, and linear layers that read it."""

    def __init__(self, width: int, norm: nn.Module, biases: list[bool], n_rows: int) -> None:
        super().__init__()
        self.stem, self.norm = nn.Linear(3, width), norm
        self.readers = nn.ModuleList(nn.Linear(width, n_rows, bias=b) for b in biases)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.stem(x))
        return torch.cat([torch.tanh(reader(y)) for reader in self.readers], -1)


@st.composite
def networks(draw: st.DrawFn) -> nn.Module:
    """Widths from 2, up to three channels constant: 0, or any number; some columns of readers zero."""
    width, seed = draw(st.integers(2, 9)), draw(st.integers(0, 2**16))
    kind = draw(st.sampled_from((nn.LayerNorm, nn.LayerNorm, nn.RMSNorm)))
    norm = kind(width, elementwise_affine=draw(st.sampled_from((True, True, False))))
    net = Readers(
        width,
        norm,
        draw(st.sampled_from(([False], [False, False], [False] * 3, [True, False], [True]))),
        draw(st.integers(8, 12)),
    )
    net = randomized(net, seed).double()
    n_dead, zero_bias = min(width - 1, draw(st.sampled_from((1, 1, 2, 3)))), draw(st.booleans())
    with torch.no_grad():
        net.stem.weight[:n_dead] = 0
        if zero_bias:
            net.stem.bias[:n_dead] = 0
        for reader in net.readers:
            reader.weight[:, draw(st.lists(st.integers(0, width - 1), max_size=1))] = 0
    return net


@settings(max_examples=20, deadline=None, suppress_health_check=list(HealthCheck))
@given(networks())
def test_never_more_parameters(net: nn.Module) -> None:
    check(net, (torch.randn(4, 3, generator=torch.Generator().manual_seed(0)),))
