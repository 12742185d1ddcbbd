"""What an op without a rule does to the channels that touch it."""

from __future__ import annotations

import torch
from torch import nn

from srfx.ir.plan import Reason
from tests.helpers import Sandwich, check, kill, randomized

X = torch.randn(2, 3, 4, 6)


def test_an_unknown_op_is_a_barrier_with_a_name() -> None:
    model = randomized(Sandwich(nn.Conv2d(3, 8, 1), lambda x: torch.renorm(x, 2, 1, 1.0), nn.Conv2d(8, 4, 1)))
    kill(model.front, [0, 4])
    found = check(model, (X,), kept={"front.weight": (8, 3, 1, 1)}, reasons=[Reason.UNKNOWN_OP])
    assert any("renorm" in r.detail for r in found["symbolic"].refusals)
