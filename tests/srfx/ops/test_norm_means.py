"""Means and pools between a norm and its readers hand the norm's statistics on (theory: Lemma N10)."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from srfx.ir.plan import Reason
from tests.helpers import check, kill, randomized

C, H, DEAD = 12, 6, [1, 4, 7]
Map = Callable[[Tensor], Tensor]


class Pooled(nn.Module):
    """A stem, a layer norm over the channels of a picture, what averages it, and a head."""

    def __init__(self, norm: type[nn.Module], pool: Map, is_last: bool) -> None:
        super().__init__()
        self.stem, self.norm, self.head = nn.Conv2d(3, C, 1), norm(C), nn.Linear(C, 5)
        self.pool, self.is_last = pool, is_last
        randomized(self)
        kill(self.stem, rows=DEAD)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.stem(x).permute(0, 2, 3, 1))
        y = self.pool(y if self.is_last else y.permute(0, 3, 1, 2))
        y = y if self.is_last else y.flatten(2).transpose(1, 2)
        z: Tensor = self.head(y)
        return z


X = torch.randn(2, 3, H, H)
LAST: dict[str, tuple[Map, int]] = {
    "mean over positions": (lambda y: y.mean((1, 2)), 2),
    "one mean after the other": (lambda y: y.mean(1).mean(1, keepdim=True), 2),
    "mean of tokens": (lambda y: y.flatten(1, 2).mean(1), 2),
    "sum of tokens": (lambda y: y.flatten(1, 2).sum(1), 3),
    "padded, then mean": (lambda y: F.pad(y, (0, 0, 1, 0)).mean(2), 3),
}
FIRST: dict[str, tuple[Map, int]] = {
    "average pool": (lambda y: F.avg_pool2d(y, 2), 2),
    "average pool, padding not counted": (lambda y: F.avg_pool2d(y, 3, 2, 1, count_include_pad=False), 2),
    "average pool, padding counted": (lambda y: F.avg_pool2d(y, 3, 2, 1), 3),
    "average pool, divisor": (lambda y: F.avg_pool2d(y, 2, divisor_override=3), 3),
    "adaptive": (lambda y: F.adaptive_avg_pool2d(y, 3), 2),
    "adaptive to one": (nn.AdaptiveAvgPool2d(1), 2),
}


@pytest.mark.parametrize(("is_last", "name"), [*((True, n) for n in LAST), *((False, n) for n in FIRST)])
def test_constants_go(is_last: bool, name: str) -> None:
    """Two statistics, and ones where the constant part does not arrive as one number."""
    pool, n = (LAST if is_last else FIRST)[name]
    kept = {"stem.weight": (C - 3, 3, 1, 1), "head.weight": (5, C - 3 + n)}
    check(Pooled(nn.LayerNorm, pool, is_last), (X,), kept=kept)


def test_rms_norm_has_one_statistic_and_no_ones() -> None:
    kept = {"stem.weight": (C - 3, 3, 1, 1), "head.weight": (5, C - 3 + 1)}
    check(Pooled(nn.RMSNorm, LAST["sum of tokens"][0], True), (X,), kept=kept)


NOT_LINEAR: list[tuple[bool, Map]] = [
    (False, lambda y: F.max_pool2d(y, 2)),
    (False, lambda y: F.lp_pool2d(y, 2, 2)),
    (True, lambda y: y.amax(1)),
]


@pytest.mark.parametrize(("is_last", "pool"), NOT_LINEAR)
def test_what_is_not_linear_keeps_them(is_last: bool, pool: Map) -> None:
    model = Pooled(nn.LayerNorm, pool, is_last)
    check(model, (X,), kept={"stem.weight": (C, 3, 1, 1)}, reasons=[Reason.NOT_LINEAR_IN_NORM])


def test_a_mean_over_the_channels_keeps_them() -> None:
    class OverChannels(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.norm, self.head = nn.Linear(6, C), nn.LayerNorm(C), nn.Linear(C, 5)

        def forward(self, x: Tensor) -> Tensor:
            y = self.norm(self.stem(x))
            z: Tensor = self.head(y) + y.mean(-1, keepdim=True)
            return z

    model = randomized(OverChannels())
    kill(model.stem, rows=DEAD)
    x = torch.randn(2, 6)
    check(model, (x,), kept={"stem.weight": (C, 6)}, reasons=[Reason.NOT_LINEAR_IN_NORM])
