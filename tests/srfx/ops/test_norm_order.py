"""The statistics that a norm emits stand behind its channels: whoever reads them has to know that order."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from srfx.ir.plan import Reason
from tests.helpers import check, kill, randomized


@pytest.mark.parametrize("dead", [[1], [1, 2]])
def test_as_many_columns_as_before_in_another_order(dead: list[int]) -> None:
    """Two channels go, two statistics come: the reader's weight keeps its shape and yet has to be reordered."""
    layers = [nn.Linear(3, 6), nn.LayerNorm(6), nn.Linear(6, 6), nn.LayerNorm(6), nn.Linear(6, 5)]
    model = randomized(nn.Sequential(*layers))
    kill(model[0], dead)
    kill(model[2], [0])
    check(model, (torch.randn(4, 3),), kept={"0.weight": (6 - len(dead), 3)})


PARTS: dict[str, Callable[[Tensor], Tensor]] = {
    "slice": lambda y: y[:, 2:5],
    "flip": lambda y: y.flip(1)[:, :3],
    "select": lambda y: torch.stack([y[:, 2], y[:, 4], y[:, 7]], 1),
    "index": lambda y: y[:, [7, 0, 4]],
    "roll": lambda y: y.roll(2, 1)[:, 3:6],
    "split": lambda y: y.split([5, 3], 1)[1],
    "first of split": lambda y: torch.split(y, [3, 5], 1)[0],
    "chunk": lambda y: y.chunk(2, 1)[1][:, :3],
    "cat": lambda y: torch.cat([y, y], 1)[:, 4:7],
    "pad": lambda y: F.pad(y, (1, 0))[:, 3:6],
}


@pytest.mark.parametrize("name", PARTS)
def test_a_second_reader_takes_some_of_the_channels(name: str) -> None:
    class Parts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.norm, self.b, self.c = (
                nn.Linear(3, 8),
                nn.LayerNorm(8),
                nn.Linear(8, 4),
                nn.Linear(3, 4),
            )

        def forward(self, x: Tensor) -> Tensor:
            y = self.norm(self.a(x))
            return self.b(y) + self.c(PARTS[name](y))

    for dead in ([0, 1], [2, 3], [6, 7, 1], [1]):
        model = randomized(Parts())
        kill(model.a, dead)
        check(model, (torch.randn(4, 3),), routes=["symbolic"])


TUPLES: dict[str, Callable[[Tensor], Tensor]] = {
    "chunk": lambda y: y.chunk(2, 1)[1],
    "split": lambda y: torch.split(y, [4, 4], 1)[1],
    "unbind": lambda y: torch.stack(y.unbind(1)[4:], 1),
    "sort": lambda y: y.sort(1)[0][:, 4:],
}


@pytest.mark.parametrize("name", TUPLES)
def test_a_second_reader_returns_a_tuple(name: str) -> None:
    """It takes no statistic in a place of a channel, though it reads nothing of that channel: the norm is closed."""

    class Parts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.norm, self.b, self.c = (
                nn.Linear(3, 8),
                nn.LayerNorm(8),
                nn.Linear(8, 4),
                nn.Linear(4, 4),
            )

        def forward(self, x: Tensor) -> Tensor:
            y = self.norm(self.a(x))
            return self.b(y) + self.c(TUPLES[name](y))

    model = randomized(Parts())
    kill(model.a, [1, 4, 7])
    kill(model.c, columns=[0])
    check(model, (torch.randn(4, 3),), kept={"a.weight": (8, 3)}, reasons=[Reason.NOT_LINEAR_IN_NORM])


class WholeSlice(nn.Module):
    """A slice of all channels of a norm, whose readers take every other channel."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Linear(5, 12), nn.LayerNorm(12)
        self.a, self.b = nn.Linear(12, 40), nn.Linear(12, 40)

    def forward(self, x: Tensor) -> Tensor:
        z = self.stem(x)
        y: Tensor = self.a(self.norm(z).narrow(1, 0, 12)).relu() + self.b(z)
        return y


def test_a_slice_of_all_channels_keeps_their_order() -> None:
    """Ragged reads may put the channels in another order, which is that of the slice too."""
    model = randomized(WholeSlice())
    kill(model.a, columns=range(0, 12, 2))
    kill(model.b, columns=range(1, 12, 3))
    check(model, (torch.randn(4, 5),))
    for outcome in check(model, (torch.randn(4, 5),), ragged=True).values():
        assert not any(n.target is torch.index_select for n in outcome.small.graph.nodes)
