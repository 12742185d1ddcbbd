"""PReLU: slopes along the channels, and one slope for all."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.helpers import Sandwich, check, kill, randomized

X = torch.randn(2, 3, 5, 6)


OTHER = (torch.randn(3, 3, 7, 4),)


def sandwich(op: Callable[[Any], Any], *, bias: bool = False) -> nn.Module:
    """Three of eight channels are constant in front of ``op``."""
    model = randomized(Sandwich(nn.Conv2d(3, 8, 1), op, nn.Conv2d(8, 4, 1)))
    kill(model.front, [0, 3, 7], bias=bias)
    return model


KEPT = {"front.weight": (5, 3, 1, 1), "front.bias": (5,), "back.weight": (4, 5, 1, 1), "back.bias": (4,)}


@pytest.mark.parametrize("n", [1, 8])
@pytest.mark.parametrize("spelling", ["module", "function", "torch"])
def test_prelu(n: int, spelling: str) -> None:
    class Functional(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.rand(n))

        def forward(self, x: Tensor) -> Tensor:
            return (F.prelu if spelling == "function" else torch.prelu)(x, self.weight)

    model = sandwich(nn.PReLU(n) if spelling == "module" else Functional())
    check(model, (X,), others=[OTHER], kept={**KEPT, "op.weight": (1 if n == 1 else 5,)})


def test_prelu_of_a_matrix_and_of_a_single_channel_value() -> None:
    model = randomized(nn.Sequential(nn.Linear(5, 8), nn.PReLU(8), nn.Linear(8, 3)))
    check(kill(model[0], [2, 5]) and model, (torch.randn(4, 5),), kept={"0.weight": (6, 5), "1.weight": (6,)})
    single = randomized(nn.Sequential(nn.Conv1d(2, 1, 3), nn.PReLU(1), nn.Conv1d(1, 2, 1)))
    check(single, (torch.randn(2, 2, 9),), kept={"1.weight": (1,)})
