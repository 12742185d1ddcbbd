"""Pixel and channel shuffles, and quarter turns, with channels in the plane and beside it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from srfx.ir.plan import Reason
from tests.helpers import Sandwich, check, kill, randomized


@pytest.mark.parametrize("k", [-1, 0, 1, 2, 3, 5])
def test_quarter_turns_of_pictures(k: int) -> None:
    model = randomized(Sandwich(nn.Conv2d(3, 8, 1), lambda x: torch.rot90(x, k, (2, 3)), nn.Conv2d(8, 4, 1)))
    kill(model.front, [1, 5])
    kept = {"front.weight": (6, 3, 1, 1), "back.weight": (4, 6, 1, 1)}
    check(model, (torch.randn(2, 3, 4, 6),), others=[(torch.randn(2, 3, 5, 3),)], kept=kept)


@pytest.mark.parametrize("k", [1, 2, 3])
@pytest.mark.parametrize("dims", [(0, 1), (-1, 0)])
def test_quarter_turns_with_the_channels(k: int, dims: tuple[int, int]) -> None:
    def turned(x: Tensor) -> Tensor:
        y = torch.rot90(x, k, dims)
        return y if k == 2 else y.t()

    model = randomized(Sandwich(nn.Linear(3, 8), turned, nn.Linear(8, 4)))
    kill(model.front, [1, 6])
    check(model, (torch.randn(5, 3),), kept={"front.weight": (6, 3), "back.weight": (4, 6)})


X = torch.randn(2, 3, 4, 6)


OTHER = (torch.randn(3, 3, 8, 2),)


Op = Callable[..., Any]


@pytest.mark.parametrize(
    "op", [nn.PixelShuffle(2), lambda x: F.pixel_shuffle(x, 2), lambda x: torch.pixel_shuffle(x, 2)]
)
def test_pixel_shuffle(op: Op) -> None:
    """Twelve channels make three; one goes when all four of its parts do, a part alone does not."""
    model = randomized(Sandwich(nn.Conv2d(3, 12, 1), op, nn.Conv2d(3, 4, 1)))
    kill(model.front, [4, 5, 6, 7], bias=True)
    kill(model.front, [0], bias=True)
    check(model, (X,), others=[OTHER], kept={"front.weight": (8, 3, 1, 1), "back.weight": (4, 2, 1, 1)})


@pytest.mark.parametrize("op", [nn.PixelUnshuffle(2), lambda x: F.pixel_unshuffle(x, 2)])
def test_pixel_unshuffle(op: Op) -> None:
    model = randomized(Sandwich(nn.Conv2d(3, 3, 1), op, nn.Conv2d(12, 4, 1)))
    kill(model.front, [1])
    check(model, (X,), others=[OTHER], kept={"front.weight": (2, 3, 1, 1), "back.weight": (4, 8, 1, 1)})


SHUFFLES: dict[str, Op] = {
    "module": nn.ChannelShuffle(2),
    "function": lambda x: F.channel_shuffle(x, 2),
}


@pytest.mark.parametrize("name", SHUFFLES)
def test_channel_shuffle(name: str) -> None:
    model = randomized(Sandwich(nn.Conv2d(3, 8, 1), SHUFFLES[name], nn.Conv2d(8, 4, 1)))
    kill(model.front, [0, 3, 6])
    check(model, (X,), others=[OTHER], kept={"front.weight": (5, 3, 1, 1), "back.weight": (4, 5, 1, 1)})


@pytest.mark.parametrize("shuffle", [nn.PixelUnshuffle(2), nn.PixelShuffle(2)])
@pytest.mark.parametrize("dead", [range(48), range(0, 48, 2), [0, 1, 2, 3]])
def test_pixels_that_a_layer_writes(shuffle: nn.Module, dead: Any) -> None:
    """Each pixel has rows of its own, so that pixels have labels; those that change places with channels stay."""

    class Pixels(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.front, self.back = (
                nn.Linear(5, 48),
                nn.Conv2d(12 if shuffle.__class__ is nn.PixelUnshuffle else 1, 4, 1),
            )
            self.shuffle = shuffle
            randomized(self)

        def forward(self, x: Tensor) -> Tensor:
            y = self.front(x)
            y = y.view(-1, 3, 4, 4) if isinstance(self.shuffle, nn.PixelUnshuffle) else y.view(-1, 4, 4, 3)
            return self.back(self.shuffle(y)).mean((2, 3))

    model = Pixels()
    kill(model.front, rows=dead, bias=True)
    check(model, (torch.randn(2, 5),), idempotent=False)


def test_a_dead_channel_of_pixels_that_a_layer_writes_stays_and_the_report_says_why() -> None:
    class Pixels(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.front, self.shuffle, self.back = nn.Linear(5, 48), nn.PixelUnshuffle(2), nn.Conv2d(12, 4, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.back(self.shuffle(self.front(x).view(-1, 3, 4, 4))).mean((2, 3))

    model = randomized(Pixels())
    kill(model.front, rows=range(16), bias=True)
    kept = {"front.weight": (48, 5), "back.weight": (4, 12, 1, 1)}
    check(model, (torch.randn(2, 5),), kept=kept, reasons=[Reason.CHANNEL_MIXING])
