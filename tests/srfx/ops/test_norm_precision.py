"""Half precision: a minimized network with norms is as close to the float64 truth as the masked original."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

from srfx.minimize import minimize
from tests.helpers import assert_equivalent, count, masked, randomized


def rms(t: Tensor) -> float:
    return float(t.double().pow(2).mean().sqrt())


def hold_precision(model: nn.Module, x: Tensor, dtype: torch.dtype, factor: float = 2.0) -> None:
    """Minimize in ``dtype``, and in float32 and then cast: both stay within the factor of the original's error."""
    low = copy.deepcopy(model).to(dtype)
    x = x.to(dtype)
    with torch.no_grad():
        truth = copy.deepcopy(low).double()(x.double())
        before = rms(low(x) - truth)
        single = minimize(fx.symbolic_trace(copy.deepcopy(low).float()), (x.float(),)).to(dtype)
        direct = minimize(fx.symbolic_trace(low), (x,))
        for small in (direct, single):
            assert count(small) < count(model)
            after = rms(small(x) - truth)
            assert after <= factor * before + 1e-7, f"{after:.2e} from the truth, {before:.2e} before"


class Stack(nn.Module):
    """A pre-norm stream of 32 channels."""

    def __init__(self, norm: Any) -> None:
        super().__init__()
        self.stem = nn.Linear(16, 32)
        self.norms = nn.ModuleList(norm(32) for _ in range(4))
        self.ups, self.downs = (
            nn.ModuleList(nn.Linear(a, b) for _ in range(4)) for a, b in ((32, 48), (48, 32))
        )
        self.last, self.head = norm(32), nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for norm, up, down in zip(self.norms, self.ups, self.downs, strict=True):
            x = x + down(torch.nn.functional.gelu(up(norm(x))))
        y: Tensor = self.head(self.last(x))
        return y

    def ruin(self, offset: float) -> Stack:
        """A third of the stream is constant, near ``offset``."""
        dead = list(range(0, 32, 3))
        with torch.no_grad():
            self.stem.weight[dead] = 0
            self.stem.bias[dead] = offset + torch.randn(len(dead))
            for down in self.downs:
                down.weight[dead] = 0
                down.bias[dead] = 0.1 * torch.randn(len(dead))
        return self


@pytest.mark.parametrize("offset", [0.0, 10.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("norm", [nn.LayerNorm, nn.RMSNorm])
def test_streams(norm: Any, dtype: torch.dtype, offset: float) -> None:
    model = Stack(norm)
    randomized(model, 3)
    hold_precision(model.ruin(offset), torch.randn(64, 16), dtype)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_torchvision_convnext(dtype: torch.dtype) -> None:
    convnext = pytest.importorskip("torchvision.models.convnext")
    sizes = [(16, 24, 2), (24, 32, 2), (32, 48, 2), (48, None, 1)]
    model = convnext.ConvNeXt([convnext.CNBlockConfig(*s) for s in sizes], num_classes=10)
    randomized(model, 1)
    dead_streams(model)
    hold_precision(masked(model, 2, rows=0.2, columns=0.1), torch.randn(8, 3, 64, 64), dtype)


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["convnext_atto", "convnext_atto_ols", "convnextv2_atto", "convnext_atto_rms"]
)
def test_timm_convnexts(name: str) -> None:
    """Exact in float64, by both routes, and as close to the truth in half precision."""
    timm = pytest.importorskip("timm")
    model = timm.create_model(name, num_classes=10, depths=(1, 1, 2, 1), dims=(8, 12, 16, 24))
    randomized(model, 1)
    with torch.no_grad():
        for stage in model.stages:
            for block in stage.blocks:
                block.mlp.fc2.weight[[1, 3, 5]] = 0
            for layer in stage.downsample if isinstance(stage.downsample, nn.Sequential) else ():
                if isinstance(layer, nn.Conv2d):
                    layer.weight[[1, 3, 5]] = 0
    masked(model, 2, rows=0.2, columns=0.1)
    x = torch.randn(2, 3, 64, 64)
    double = copy.deepcopy(model).double()
    for traced in (fx.symbolic_trace(double), torch.export.export(double, (x.double(),)).module()):
        small = minimize(traced, (x.double(),))
        assert_equivalent(double, small, (x.double(),), rtol=1e-9, float32=None)
        assert count(small) < count(model)
    hold_precision(model, torch.randn(8, 3, 64, 64), torch.bfloat16)


def dead_streams(model: nn.Module) -> None:
    """Channels 1, 3 and 5 of every stream of a torchvision ConvNeXt are constants, zero and other."""
    with torch.no_grad():
        for i, part in enumerate(model.features):
            if i % 2 == 0:  # a stem or downsampling: its convolution begins a stream
                layer = next(m for m in part.modules() if isinstance(m, nn.Conv2d))
                layer.weight[[1, 3, 5]] = 0
                if i == 0:
                    part[1].weight[[1, 3, 5]] = 0
                continue
            for block in part:
                block.block[5].weight[[1, 3, 5]] = 0
                block.layer_scale[4] = 0
