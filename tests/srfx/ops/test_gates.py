"""Gated linear units, over channels and over an axis without them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tests.helpers import Sandwich, check, kill, randomized

X = torch.randn(2, 3, 4, 6)


OTHER = (torch.randn(3, 3, 8, 2),)


Op = Callable[..., Any]


@pytest.mark.parametrize("op", [nn.GLU(1), lambda x: F.glu(x, 1), lambda x: F.glu(x, dim=-3)])
def test_glu(op: Op) -> None:
    model = randomized(Sandwich(nn.Conv2d(3, 8, 1), op, nn.Conv2d(4, 4, 1)))
    kill(model.front, [0, 4])  # both halves of channel 0: constant
    kill(model.front, [1], bias=True)  # 0 times a gate
    kill(model.front, [6])  # a constant gate: stays with its value
    check(model, (X,), others=[OTHER], kept={"front.weight": (4, 3, 1, 1), "back.weight": (4, 2, 1, 1)})


def test_glu_over_an_untracked_axis() -> None:
    model = randomized(Sandwich(nn.Conv2d(3, 8, 1), lambda x: F.glu(x, 2), nn.Conv2d(8, 4, 1)))
    kill(model.front, [0, 4])
    check(model, (X,), others=[OTHER], kept={"front.weight": (6, 3, 1, 1)})
