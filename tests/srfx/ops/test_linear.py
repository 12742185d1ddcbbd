"""Linear layers with one weight."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tests.helpers import check, masked, randomized


def test_tied_linear_layers() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c, self.d = (
                nn.Linear(4, 6),
                nn.Linear(6, 6),
                nn.Linear(6, 6),
                nn.Linear(6, 2),
            )
            self.c.weight = self.b.weight

        def forward(self, x: Tensor) -> Tensor:
            return self.d(torch.relu(self.c(torch.relu(self.b(torch.sigmoid(self.a(x)))))))

    for seed in range(4):
        found = check(masked(randomized(Tied(), seed), seed), (torch.randn(5, 4),))
        small = found["symbolic"].small
        names = dict(small.named_parameters(remove_duplicate=False))
        if "b.weight" in names and "c.weight" in names:
            assert names["b.weight"] is names["c.weight"]
