"""Pooling, interpolation and norms with stored statistics."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from srfx.ir.plan import Reason
from tests.helpers import Sandwich, check, kill, randomized

X = torch.randn(2, 3, 6, 8)
OTHER = (torch.randn(3, 3, 8, 10),)
KEEPS: dict[str, Any] = {
    "max": nn.MaxPool2d(2), "max padded": nn.MaxPool2d(3, 2, 1), "max function": lambda x: F.max_pool2d(x, 2),
    "avg": nn.AvgPool2d(2), "avg without padding": nn.AvgPool2d(3, 1, 1, count_include_pad=False),
    "avg ceil": nn.AvgPool2d(4, 3, ceil_mode=True), "adaptive": nn.AdaptiveAvgPool2d((2, 3)),
    "adaptive max": nn.AdaptiveMaxPool2d(2), "adaptive function": lambda x: F.adaptive_avg_pool2d(x, 2),
    "nearest": nn.Upsample(scale_factor=2), "bilinear": nn.Upsample(scale_factor=2, mode="bilinear"),
    "interpolate": lambda x: F.interpolate(x, scale_factor=0.5, mode="bilinear", align_corners=False),
    "bicubic": lambda x: F.interpolate(x, size=(5, 5), mode="bicubic"), "batch norm": nn.BatchNorm2d(8),
    "batch norm without affine": nn.BatchNorm2d(8, affine=False), "dropout": nn.Dropout2d(),
    "instance norm": nn.InstanceNorm2d(8, affine=True), "instance norm plain": nn.InstanceNorm2d(8),
    "mean": lambda x: x.mean((2, 3), keepdim=True), "amax": lambda x: x.amax((2, 3), keepdim=True),
    "lp": nn.LPPool2d(2, 2), "lp of 3": nn.LPPool2d(2, (2, 3), stride=1),
    "mean of dim": lambda x: x.mean(3).mean(2)[:, :, None, None], "max of dim": lambda x: x.max(3)[0].unsqueeze(3),
    "torch.mean": lambda x: torch.mean(x, dim=[-1, -2], keepdim=True), "amin": lambda x: torch.amin(x, -1, True),
}  # fmt: skip


@pytest.mark.parametrize("name", KEEPS)
def test_a_constant_passes(name: str) -> None:
    model = randomized(Sandwich(nn.Conv2d(3, 8, 1), KEEPS[name], nn.Conv2d(8, 4, 1)))
    kill(model.front, [0, 3, 7])
    check(model, (X,), others=[OTHER], kept={"front.weight": (5, 3, 1, 1), "back.weight": (4, 5, 1, 1)})


DISTURBS: dict[str, Any] = {
    "avg padded": nn.AvgPool2d(3, 1, 1),
    "avg divisor": lambda x: F.avg_pool2d(x, 2, divisor_override=3),
    "lp, cut off": nn.LPPool2d(2, 4, ceil_mode=True),
    "sum": lambda x: x.sum((2, 3), keepdim=True),
    "std": lambda x: x.std((2, 3), keepdim=True),
}


@pytest.mark.parametrize("name", DISTURBS)
def test_a_constant_other_than_zero_does_not(name: str) -> None:
    model = randomized(Sandwich(nn.Conv2d(3, 8, 1), DISTURBS[name], nn.Conv2d(8, 4, 1)))
    kill(model.front, [0, 3, 7])
    check(model, (X,), others=[OTHER])
    if name not in ("std", "lp, cut off"):
        kill(model.front, [0, 3, 7], bias=True)
        check(model, (X,), others=[OTHER], kept={"front.weight": (5, 3, 1, 1)})


@pytest.mark.parametrize("n", [1, 3])
def test_other_dimensions(n: int) -> None:
    conv, bn = ((nn.Conv1d, nn.BatchNorm1d), None, (nn.Conv3d, nn.BatchNorm3d))[n - 1]  # type: ignore[misc]
    pool = (nn.MaxPool1d, None, nn.AvgPool3d)[n - 1]
    assert pool is not None
    layers = nn.Sequential(bn(8), nn.ReLU(), pool(2), nn.Upsample(scale_factor=2))
    model = randomized(Sandwich(conv(3, 8, 1), layers, conv(8, 4, 1)))
    kill(model.front, [0, 3, 7])
    check(model, (torch.randn(2, 3, *[4] * n),), kept={"front.weight": (5, 3, *[1] * n)})


def test_batch_norm_with_zero_scales() -> None:
    model = randomized(nn.Sequential(nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 1)))
    kill(model[1], [1, 2])
    check(
        model,
        (X,),
        others=[OTHER],
        kept={"0.weight": (6, 3, 1, 1), "1.weight": (6,), "3.weight": (4, 6, 1, 1)},
    )


def test_batch_norm_in_training_mode_is_a_barrier() -> None:
    model = randomized(nn.Sequential(nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 1)))
    kill(model[0], [1, 2])
    model[1].track_running_stats = False
    model[1].running_mean = model[1].running_var = None
    check(model, (X,), kept={"0.weight": (8, 3, 1, 1)}, reasons=[Reason.TRAINING_MODE])


def test_a_stream_through_batch_norm_with_shift() -> None:
    class Residual(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.bn, self.conv = (
                nn.Conv2d(3, 6, 1),
                nn.BatchNorm2d(6),
                nn.Conv2d(6, 6, 3, padding=1),
            )
            self.fc = nn.Linear(6, 2)

        def forward(self, x: Tensor) -> Tensor:
            y = self.stem(x)
            return self.fc((y + self.conv(F.relu(self.bn(y)))).mean((2, 3)))

    model = randomized(Residual())
    kill(model.stem, [0, 2])
    kill(model.conv, [2, 3])
    with torch.no_grad():
        model.bn.bias.fill_(9.0)  # the constants 0 and 2 pass the ReLU; 0 stays anyway and carries both
    check(model, (X,), others=[OTHER], kept={"fc.weight": (2, 5)})
