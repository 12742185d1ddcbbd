"""Mixtures of experts: a channel that is dead in every expert goes, experts stay."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.helpers import check, kill, randomized

pytest.importorskip("transformers.integrations.moe")  # registers the op that exported mixtures hold

C, E, INNER, K = 12, 3, 10, 2
X = torch.randn(4, C)


class Mixture(nn.Module):
    """Router, tokens sorted by expert, products with one matrix of several, as transformers exports it."""

    def __init__(self) -> None:
        super().__init__()
        self.front, self.router = nn.Linear(7, C), nn.Linear(C, E)
        self.up, self.down = (
            nn.Parameter(torch.randn(E, 2 * INNER, C)),
            nn.Parameter(torch.randn(E, C, INNER)),
        )
        self.head = nn.Linear(C, 5)
        randomized(self)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.front(x))
        weights, chosen = torch.topk(self.router(x).softmax(-1), K)
        experts, order = torch.sort(chosen.flatten())
        token = order // K
        offsets = torch.histc(experts.to(x.dtype), E, 0, E - 1).cumsum(0).to(torch.int32)
        grouped = torch.ops.transformers.grouped_mm_fallback
        gate, up = grouped(x[token], self.up.transpose(-2, -1), offsets).chunk(2, -1)
        y = grouped(F.silu(gate) * up, self.down.transpose(-2, -1), offsets)
        y = y * weights.flatten()[order].unsqueeze(-1)
        return self.head(y[torch.argsort(order)].view(x.shape[0], K, C).sum(1))


@torch.no_grad()
def test_channels_that_are_dead_in_every_expert_go() -> None:
    model = Mixture()
    kill(model.front, [1, 4], bias=True)
    model.up[:, [0, 3]] = 0  # gates
    model.up[:, INNER + 5] = 0  # what a gate multiplies
    model.down[:, :, 7] = 0
    model.down[1, :, 8] = 0  # dead in one expert only
    kept = {"up": (E, 2 * (INNER - 4), C - 2), "down": (E, C, INNER - 4), "front.weight": (C - 2, 7)}
    check(model, (torch.randn(4, 7),), kept=kept, routes=["export"])


@torch.no_grad()
def test_constants_other_than_zero_stay() -> None:
    model = Mixture()
    kill(model.front, [1, 4])
    model.front.bias[[1, 4]] = 0.5  # no expert has a bias
    kept = {"up": (E, 2 * INNER, C), "front.weight": (C, 7)}
    check(model, (torch.randn(4, 7),), kept=kept, routes=["export"])


@torch.no_grad()
def test_experts_stay() -> None:
    model = Mixture()
    model.up[1] = 0
    model.down[1] = 0
    found = check(model, (torch.randn(4, 7),), routes=["export"])["export"]
    assert found.small.get_parameter("up").shape[0] == E
