"""split, chunk and unbind: channels are followed into the pieces, unequal parts are listed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.helpers import Sandwich, check, kill, randomized

X = torch.randn(2, 3, 4, 6)


OTHER = (torch.randn(3, 3, 8, 2),)


Op = Callable[..., Any]


class Split(nn.Module):
    """a(first part) + b(second part) of twelve channels; dead 0, 1, 7."""

    def __init__(self, op: Op, sizes: tuple[int, int]) -> None:
        super().__init__()
        self.front = nn.Conv2d(3, sum(sizes), 1)
        self.a, self.b = nn.Conv2d(sizes[0], 4, 1), nn.Conv2d(sizes[1], 4, 1)
        self.op = op
        randomized(self)
        kill(self.front, [0, 1, 7])

    def forward(self, x: Tensor) -> Tensor:
        parts = self.op(self.front(x))
        return self.a(parts[0]) + self.b(parts[1])


SPLITS: dict[str, tuple[Op, tuple[int, int]]] = {
    "chunk": (lambda x: x.chunk(2, 1), (6, 6)),
    "torch.chunk": (lambda x: torch.chunk(x, 2, dim=1), (6, 6)),
    "split by size": (lambda x: x.split(6, 1), (6, 6)),
    "split unequal": (lambda x: torch.split(x, [4, 8], dim=1), (4, 8)),
    "split method": (lambda x: x.split([8, 4], 1), (8, 4)),
    "split keyword": (lambda x: torch.split(x, split_size_or_sections=6, dim=1), (6, 6)),
    "split_with_sizes": (lambda x: torch.split_with_sizes(x, [6, 6], 1), (6, 6)),
    "split_with_sizes method": (lambda x: x.split_with_sizes((7, 5), dim=1), (7, 5)),
    "tensor_split": (lambda x: torch.tensor_split(x, 2, dim=1), (6, 6)),
    "tensor_split method": (lambda x: x.tensor_split(2, 1), (6, 6)),
    "half of a size": (lambda x: x.split(x.size(1) // 2, 1), (6, 6)),
    "slices": (lambda x: (x[:, :5], x[:, 5:]), (5, 7)),
}


@pytest.mark.parametrize("name", SPLITS)
def test_split(name: str) -> None:
    op, (n, m) = SPLITS[name]
    left, right = n - 2 - (n > 7), m - (n <= 7)
    kept = {"front.weight": (9, 3, 1, 1), "a.weight": (4, left, 1, 1), "b.weight": (4, right, 1, 1)}
    check(Split(op, (n, m)), (X,), others=[OTHER], kept=kept)


@pytest.mark.parametrize("name", ["chunk", "split unequal", "slices"])
def test_a_part_that_dies_altogether(name: str) -> None:
    op, sizes = SPLITS[name]
    model = Split(op, sizes)
    kill(model.front, range(sizes[0]))
    check(model, (X,), others=[OTHER])
    kill(model.a, columns=range(sizes[0]))
    check(model, (X,), others=[OTHER])


def test_split_of_another_axis_and_unread_parts() -> None:
    model = randomized(Sandwich(nn.Conv2d(3, 8, 1), lambda x: x.chunk(2, 3)[1], nn.Conv2d(8, 4, 1)))
    kill(model.front, [2, 3])
    check(model, (X,), kept={"front.weight": (6, 3, 1, 1), "back.weight": (4, 6, 1, 1)})


@pytest.mark.parametrize("op", [lambda x: x.unbind(1), lambda x: torch.unbind(x, dim=1)])
def test_unbind(op: Op) -> None:
    """Unbind gives as many results as there are positions, so they stay; those on other axes go."""
    model = randomized(
        Sandwich(
            nn.Conv2d(3, 6, 1),
            lambda x: op(x.view(x.size(0), 2, 3, x.size(2), x.size(3)))[0],
            nn.Conv2d(3, 4, 1),
        )
    )
    check(model, (X,), others=[OTHER])
    kill(model.back, columns=[1])
    check(model, (X,), others=[OTHER])


def test_unpacking_qkv() -> None:
    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.qkv, self.proj = nn.Linear(8, 24), nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            n, t, _ = x.shape
            q, k, v = self.qkv(x).reshape(n, t, 3, 2, 4).permute(2, 0, 3, 1, 4).unbind(0)
            y = torch.softmax(q @ k.transpose(-2, -1) / 2, -1) @ v
            return self.proj(y.transpose(1, 2).reshape(n, t, 8))

    model = randomized(Attention())
    kill(model.qkv, [0, 8, 16, 17], bias=True)
    check(model, (torch.randn(2, 5, 8),), others=[(torch.randn(2, 3, 8),)])
