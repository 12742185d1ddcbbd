"""Distances and angles between vectors of channels: what adds nothing goes (theory: Lemma R4)."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from srfx.ir.plan import Reason
from tests.helpers import check, kill, randomized

X = (torch.randn(4, 5),)
Op = Callable[[Tensor, Tensor], Tensor]


class Pair(nn.Module):
    """op(a(x), b(x)) of eight channels; 0, 1 and 2 are dead in a, 1, 2 and 3 in b, with constants.

    Channel 1 is 0 in both, channel 2 is 0.5 in both, channel 0 is constant in a only and channel 3 in b only.
    """

    def __init__(self, op: Op) -> None:
        super().__init__()
        self.a, self.b, self.op = nn.Linear(5, 8), nn.Linear(5, 8), op
        randomized(self)
        kill(self.a, [0, 1, 2])
        kill(self.b, [1, 2, 3])
        with torch.no_grad():
            for layer in (self.a, self.b):
                layer.bias[1], layer.bias[2] = 0, 0.5

    def forward(self, x: Tensor) -> Tensor:
        return self.op(self.a(x), self.b(x))


COSINES: dict[str, Op] = {
    "function": lambda a, b: F.cosine_similarity(a, b, 1),
    "default": lambda a, b: F.cosine_similarity(a, b),
    "negative": lambda a, b: torch.cosine_similarity(a, b, dim=-1),
    "broadcast": lambda a, b: F.cosine_similarity(a[:, None], b, dim=2),
    "middle": lambda a, b: F.cosine_similarity(a[:, :, None], b[:, :, None] * a[:, None, :1].abs(), dim=1),
}


@pytest.mark.parametrize("name", list(COSINES))
def test_angles_lose_what_is_zero_in_both(name: str) -> None:
    check(Pair(COSINES[name]), X, kept={"a.weight": (7, 5), "b.weight": (7, 5)})


class Module(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.pair, self.cosine = Pair(lambda a, b: torch.stack([a, b])), nn.CosineSimilarity(dim=-1)

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.pair(x).unbind(0)
        return self.cosine(a, b)


def test_the_module_of_angles() -> None:
    check(Module(), X, kept={"pair.a.weight": (7, 5), "pair.b.weight": (7, 5)})


@pytest.mark.parametrize("p", [2.0, 1.0, 0.0, float("inf")])
def test_distances_lose_what_is_one_constant_in_both(p: float) -> None:
    check(Pair(lambda a, b: torch.cdist(a, b, p)), X, kept={"a.weight": (6, 5), "b.weight": (6, 5)})


def test_a_channel_that_another_reader_keeps_still_counts() -> None:
    class Kept(Pair):
        def forward(self, x: Tensor) -> Tensor:
            a, b = self.a(x), self.b(x)
            return torch.cdist(a, b) + a.softmax(1).sum() + F.cosine_similarity(a, b)

    check(Kept(lambda a, b: a), X, kept={"a.weight": (8, 5), "b.weight": (8, 5)})


def test_vectors_of_different_width_stay() -> None:
    class One(Pair):
        def forward(self, x: Tensor) -> Tensor:
            return F.cosine_similarity(self.a(x), self.b(x)[:, 4:5])

    check(One(lambda a, b: a), X, kept={"a.weight": (8, 5)})


def test_a_distance_with_an_eps_inside_is_a_barrier() -> None:
    check(
        Pair(lambda a, b: F.pairwise_distance(a, b)),
        X,
        kept={"a.weight": (8, 5)},
        reasons=[Reason.UNKNOWN_OP],
    )
