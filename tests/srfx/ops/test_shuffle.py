"""Quarter turns of a plane, with channels in it and beside it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

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
