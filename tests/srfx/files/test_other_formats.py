"""Minimized models go where other models go: torch.export, ONNX, TorchScript traces, torch.compile."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

import srfx
from tests.helpers import masked, randomized, relative_error, trace


class Convolutions(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16)
        self.deep = nn.Sequential(nn.Conv2d(16, 16, 3, padding=1, groups=4), nn.SiLU(), nn.Conv2d(16, 16, 1))
        self.head = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm(self.stem(x)))
        return self.head((x + self.deep(x)).mean((2, 3)))


class Tokens(nn.Module):
    """A stream with layer norms, whose compensated forms emit statistics."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(6, 16)
        self.norms = nn.ModuleList(nn.LayerNorm(16) for _ in range(2))
        self.attend = nn.MultiheadAttention(16, 4, batch_first=True)
        self.mlp = nn.Sequential(nn.Linear(16, 24), nn.GELU(), nn.Linear(24, 16))
        self.head = nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        y = self.norms[0](x)
        x = x + self.attend(y, y, y, need_weights=False)[0]
        return self.head(x + self.mlp(self.norms[1](x)))


def _small(name: str, route: str) -> tuple[fx.GraphModule, Tensor]:
    net, x = (Convolutions(), torch.randn(2, 3, 8, 8)) if name == "conv" else (Tokens(), torch.randn(2, 5, 6))
    net = masked(randomized(net), rows=0.5)
    if name == "tokens":
        with torch.no_grad():  # channels that nobody writes: the norms lose them
            for layer in (net.embed, net.attend.out_proj, net.mlp[2]):
                layer.weight[::4] = 0
                layer.bias[::4] = 0.25
    small = srfx.minimize(trace(net, (x,), route), x)
    assert sum(p.numel() for p in small.parameters()) < 0.9 * sum(p.numel() for p in net.parameters())
    return small, x


@pytest.fixture(params=["conv-symbolic", "conv-export", "tokens-symbolic", "tokens-export"])
def case(request: pytest.FixtureRequest) -> tuple[fx.GraphModule, Tensor, Tensor]:
    """A small model, an input, and one of another batch size."""
    small, x = _small(*request.param.split("-"))
    return small, x, torch.cat([x, x.flip(-1), x])


def _program(small: fx.GraphModule, x: Tensor) -> torch.export.ExportedProgram:
    return torch.export.export(small, (x,), dynamic_shapes=({0: torch.export.Dim("batch")},))


def test_torch_export_there_and_back(case: tuple[Any, ...], tmp_path: Path) -> None:
    small, x, larger = case
    torch.export.save(_program(small, x), tmp_path / "small.pt2")
    back = torch.export.load(tmp_path / "small.pt2").module()
    for batch in (x, larger):
        assert relative_error(small(batch), back(batch)) <= 1e-6
    again = srfx.minimize(back)
    count = [sum(p.numel() for p in m.parameters()) for m in (small, again)]
    assert count[1] <= count[0]


def test_jit_trace(case: tuple[Any, ...], tmp_path: Path) -> None:
    small, x, larger = case
    torch.jit.save(torch.jit.trace(small, x), tmp_path / "small.pt")
    back = torch.jit.load(tmp_path / "small.pt")
    # sizes in exported graphs are no tensors, so that a trace fixes the batch size, also of the original
    for batch in (x,) if "aten" in small.code else (x, larger):
        assert relative_error(small(batch), back(batch)) <= 1e-6


@pytest.mark.slow
def test_onnx(case: tuple[Any, ...], tmp_path: Path) -> None:
    import onnxruntime

    small, x, larger = case
    path = str(tmp_path / "small.onnx")
    batch_axis = {0: torch.export.Dim("batch")}
    torch.onnx.export(small, (x,), path, dynamo=True, dynamic_shapes=(batch_axis,), verbose=False)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    (given,) = session.get_inputs()
    for batch in (x, larger):
        (found,) = session.run(None, {given.name: batch.numpy()})
        assert relative_error(small(batch), torch.from_numpy(found)) <= 1e-5


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("mode", ["default", "max-autotune"])
def test_compile(case: tuple[Any, ...], mode: str) -> None:
    small, x, larger = case
    torch._dynamo.reset()
    fast = torch.compile(small, mode=mode, fullgraph=True)
    with torch.no_grad():
        for batch in (x, larger):
            assert relative_error(small(batch), fast(batch)) <= 1e-5
    fast(x).sum().backward()
    assert all(p.grad is not None for p in small.parameters() if p.requires_grad)
