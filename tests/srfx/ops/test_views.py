"""Views: flattening of pictures, and heads that stay rectangular."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.helpers import Sandwich, check, kill, randomized

X = torch.randn(2, 3, 4, 6)


OTHER = (torch.randn(3, 3, 8, 2),)


Op = Callable[[Any], Any]


def same(op: Op) -> tuple[nn.Module, dict[str, tuple[int, ...]]]:
    """``op`` gives back a map of eight channels; three of them are constant in front of it."""
    model = randomized(Sandwich(nn.Conv2d(3, 8, 1), op, nn.Conv2d(8, 4, 1)))
    kill(model.front, [0, 3, 7])
    return model, {"front.weight": (5, 3, 1, 1), "back.weight": (4, 5, 1, 1)}


class Classifier(nn.Module):
    """features -> pool -> flatten -> linear, each channel standing for h * w columns."""

    def __init__(self, flatten: Op | nn.Module, pool: int = 2, batch_norm: bool = False) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6) if batch_norm else nn.ReLU()
        )
        self.pool = nn.AdaptiveAvgPool2d(pool)
        self.fc = nn.Linear(6 * pool * pool, 5)
        if isinstance(flatten, nn.Module):
            self.flatten: Any = flatten
        else:
            object.__setattr__(self, "flatten", flatten)
        randomized(self)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.flatten(self.pool(self.features(x))))


FLATTENS: dict[str, Op | nn.Module] = {
    "module": nn.Flatten(),
    "torch": lambda x: torch.flatten(x, 1),
    "method": lambda x: x.flatten(1),
    "view": lambda x: x.view(x.size(0), -1),
    "reshape": lambda x: x.reshape(x.shape[0], -1),
    "literal": lambda x: x.view(-1, 24),
    "sizes": lambda x: x.view(x.size(0), x.size(1) * x.size(2) * x.size(3)),
    "twice": lambda x: x.flatten(2).flatten(1),
    "channels last": lambda x: x.permute(0, 2, 3, 1).flatten(1),
}


@pytest.mark.parametrize("name", FLATTENS)
def test_flatten_after_pooling(name: str) -> None:
    model = Classifier(FLATTENS[name])
    kill(model.features[0], [1, 4])
    kept = {"features.0.weight": (4, 3, 3, 3), "fc.weight": (5, 16)}
    check(model, (X,), others=[(torch.randn(2, 3, 7, 9),)], kept=kept)


def test_flatten_keeps_a_channel_of_which_one_position_is_read() -> None:
    model = Classifier(nn.Flatten())
    kill(model.fc, columns=[4, 5, 6])  # position 3 of channel 1 is read still
    check(model, (X,), kept={"fc.weight": (5, 24)})
    kill(model.fc, columns=[7])
    check(model, (X,), kept={"features.0.weight": (5, 3, 3, 3), "fc.weight": (5, 20)})


def test_flatten_without_pooling_keeps_the_picture_size() -> None:
    model = randomized(
        nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 20, 3))
    )
    kill(model[0], [2])
    check(model, (torch.randn(2, 1, 4, 5),), kept={"0.weight": (3, 1, 3, 3), "3.weight": (3, 60)})


def heads(x: Tensor) -> Tensor:
    """[N, T, 12] as three heads of four; attention with itself."""
    n, t = x.shape[0], x.shape[1]
    q = x.view(n, t, 3, 4).transpose(1, 2)
    return (torch.softmax(q @ q.transpose(-2, -1), -1) @ q).transpose(1, 2).reshape(n, t, 12)


@pytest.mark.parametrize("dead", [[4, 5, 6, 7], [0, 5, 10], [0, 1, 5], [0, 4, 5, 6, 7, 11]])
def test_heads_stay_rectangular(dead: list[int]) -> None:
    model = randomized(Sandwich(nn.Linear(3, 12), heads, nn.Linear(12, 2)))
    kill(model.front, dead, bias=True)
    check(model, (torch.randn(2, 5, 3),), others=[(torch.randn(2, 7, 3),)])


def test_a_view_of_a_block_revives_to_equal_counts() -> None:
    """Eight channels as two rows of four; dead 0 and 3 in one row, 7 in the other: 3 lanes stay in each."""
    model, _ = same(lambda x: x.view(-1, 2, 4, x.size(2), x.size(3)).transpose(1, 2).sum(1))
    model.back = randomized(nn.Conv2d(2, 4, 1))
    check(model, (X,), others=[OTHER])


@pytest.mark.parametrize(("dead", "n_kept"), [([0, 1, 2, 3, 4, 5], 1), ([1, 2, 4, 5], 2), ([0, 3], 4)])
def test_a_view_of_copies_has_as_many_rows_as_its_lanes_ask_for(dead: list[int], n_kept: int) -> None:
    """Six channels, twice, as four rows of three: rows 0 and 2 are one row, and a lane of it keeps both."""

    def twice(x: Tensor) -> Tensor:
        n, _, h, w = x.shape
        return torch.cat([x, x], 1).view(n, 4, 3, h, w).transpose(1, 2).reshape(n, -1, h, w)

    model = randomized(Sandwich(nn.Conv2d(3, 6, 1, bias=False), twice, nn.Identity()))
    kill(model.front, dead)
    check(model, (X,), others=[OTHER], kept={"front.weight": (n_kept, 3, 1, 1)})


def test_what_only_lends_its_batch_keeps_a_channel() -> None:
    """A norm whose result is read by nothing but ``shape[0]`` still runs, and so it has a width."""

    class Lent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.cell, self.norm = nn.RNNCell(3, 6), nn.LayerNorm(6)
            self.token, self.back = nn.Parameter(torch.randn(1, 6)), nn.Linear(6, 2)

        def forward(self, x: Tensor) -> Tensor:
            y = self.norm(self.cell(x))
            return self.back(self.token.repeat(y.shape[0], 1))

    model = randomized(Lent())
    check(model, (torch.randn(2, 3),), others=[(torch.randn(5, 3),)], idempotent=False)


class Leaning(nn.Module):
    """A view of a sum that is laid out by tokens, as its first operand is, which is constant."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(3, 4), nn.Linear(3, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x).transpose(0, 1) + self.b(x.transpose(0, 1))
        return self.c(y.transpose(0, 1).view(-1, 4))


def test_a_view_does_not_lean_on_strides_that_are_gone() -> None:
    model = randomized(Leaning())
    kill(model.a, rows=range(4))
    kill(model.b, rows=[1])
    kept = {"a.weight": (), "b.weight": (3, 3), "c.weight": (2, 3)}
    check(model, (torch.randn(2, 5, 3),), kept=kept, others=[(torch.randn(4, 5, 3),)])
