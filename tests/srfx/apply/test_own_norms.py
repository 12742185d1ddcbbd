"""Norm classes of model libraries, which call a function: what takes their place writes what the small model's norms write."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import srfx
from tests.helpers import kill, randomized, relative_error, trace

IMAGES = torch.randn(2, 3, 8, 8)


class OwnNorm(nn.Module):
    """A norm class as model libraries have them: a call of a function, over the last axis or over axis 1 of pictures."""

    def __init__(self, kind: str, is_first: bool, n: int) -> None:
        super().__init__()
        self.kind, self.is_first, self.normalized_shape = kind, is_first, (n,)
        self.weight = nn.Parameter(torch.ones(n))
        self.bias = nn.Parameter(torch.zeros(n)) if kind == "layer" else None

    def forward(self, x: Tensor) -> Tensor:
        x = x.permute(0, 2, 3, 1) if self.is_first else x
        x = self.normalise(x)
        return x.permute(0, 3, 1, 2) if self.is_first else x

    def normalise(self, x: Tensor) -> Tensor:
        if self.kind == "rms":
            return F.rms_norm(x, self.normalized_shape, self.weight, 1e-6)
        return F.layer_norm(x, self.normalized_shape, self.weight, self.bias, 1e-6)


class Stream(nn.Module):
    """The norms' readers have no use for channels that the residual stream keeps."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.stem, self.first = nn.Conv2d(3, 24, 1), OwnNorm(kind, True, 24)
        self.mix = nn.Conv2d(24, 40, 1)
        self.back = nn.Conv2d(40, 24, 1)
        self.last = OwnNorm(kind, False, 24)
        self.up, self.down, self.out = nn.Linear(24, 40), nn.Linear(40, 24), nn.Linear(24, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = (x + self.back(self.mix(self.first(x)).relu())).permute(0, 2, 3, 1)
        return self.out(x + self.down(self.up(self.last(x)).relu()))


@pytest.mark.parametrize("kind", ["layer", "rms"])
@pytest.mark.parametrize("route", ["symbolic", "export"])
def test_norms_that_write_only_what_is_read(kind: str, route: str) -> None:
    net = randomized(Stream(kind))
    kill(net.mix, columns=range(8))
    kill(net.up, columns=range(4, 16))
    for layer in (net.stem, net.back, net.down):
        kill(layer, rows=[20])
    small = srfx.minimize(trace(net, (IMAGES,), route), IMAGES)
    wanted, parameters = net(IMAGES), dict(net.named_parameters())
    srfx.apply_(net, small)
    assert relative_error(wanted, net(IMAGES)) < 1e-6
    for norm, reader, n_read in ((net.first, net.mix, 15), (net.last, net.up, 11)):
        assert norm.weight.shape == norm.outputs.shape == (n_read,)
        assert norm.n_kept == 23
        assert reader.weight.shape[1] == n_read + len(norm.emits)
    assert all(p is parameters[n] for n, p in net.named_parameters() if n in parameters)
    x = torch.randn(3, 3, 6, 10)
    net.train()(x).sum().backward()
    small.train()(x).sum().backward()
    for name in ("first.weight", "last.weight", "stem.weight"):
        assert relative_error(small.get_parameter(name).grad, net.get_parameter(name).grad) < 1e-5
    again = srfx.apply_(Stream(kind).eval(), small)
    assert relative_error(small.eval()(x), again(x)) < 1e-6


@pytest.mark.parametrize("route", ["symbolic", "export"])
def test_an_rms_norm_of_fewer_channels_stays_one(route: str) -> None:
    """Channels that are zero leave nothing to compensate but the scale, over axis 1 too."""
    net = randomized(Stream("rms"))
    for layer in (net.stem, net.back, net.down):
        kill(layer, rows=[20, 3], bias=True)
    small = srfx.minimize(trace(net, (IMAGES,), route), IMAGES)
    wanted = net(IMAGES)
    srfx.apply_(net, small)
    assert relative_error(wanted, net(IMAGES)) < 1e-6
    for norm, reader in ((net.first, net.mix), (net.last, net.up)):
        assert isinstance(norm, nn.RMSNorm)
        assert norm.weight.shape == norm.normalized_shape == (22,)
        assert reader.weight.shape[1] == 22
    net.train()(torch.randn(3, 3, 6, 10)).sum().backward()
