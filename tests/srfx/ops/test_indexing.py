"""Indexing: slices, numbers, constant positions, and positions that depend on the input."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from srfx.ir.plan import Reason
from tests.helpers import check, kill, randomized

X = torch.randn(2, 3, 4, 6)


OTHER = (torch.randn(3, 3, 8, 2),)


Op = Callable[[Any], Any]


class Rows(nn.Module):
    """back(op(front(x))) where ``op`` picks ``n`` of eight channels."""

    def __init__(self, op: Op, n: int) -> None:
        super().__init__()
        self.front, self.back = nn.Conv2d(3, 8, 1), nn.Conv2d(n, 4, 1)
        self.op = op
        randomized(self)

    def forward(self, x: Tensor) -> Tensor:
        return self.back(self.op(self.front(x)))


INDEX = torch.tensor([6, 1, 1, 3])


PICKS: dict[str, tuple[Op, list[int]]] = {
    "slice": (lambda x: x[:, 2:6], [2, 3, 4, 5]),
    "slice from the end": (lambda x: x[:, -5:-1], [3, 4, 5, 6]),
    "stride": (lambda x: x[:, ::2], [0, 2, 4, 6]),
    "stride and offset": (lambda x: x[:, 1::3], [1, 4, 7]),
    "half": (lambda x: x[:, : x.size(1) // 2], [0, 1, 2, 3]),
    "other half": (lambda x: x[:, x.shape[1] // 2 :], [4, 5, 6, 7]),
    "narrow": (lambda x: x.narrow(1, 3, 4), [3, 4, 5, 6]),
    "torch.narrow": (lambda x: torch.narrow(x, 1, 0, 4), [0, 1, 2, 3]),
    "flip": (lambda x: x.flip(1)[:, :3], [7, 6, 5]),
    "roll": (lambda x: x.roll(3, 1)[:, :4], [5, 6, 7, 0]),
    "pair of slices": (lambda x: torch.cat([x[:, :2], x[:, 5:]], 1), [0, 1, 5, 6, 7]),
    "select": (lambda x: x[:, 5].unsqueeze(1), [5]),
    "select method": (lambda x: x.select(1, -3).unsqueeze(1), [5]),
    "select two": (lambda x: torch.stack([x[:, 5], torch.select(x, 1, 2)], 1), [5, 2]),
    "step in the last axes": (lambda x: x[:, 2:6, ::2, :], [2, 3, 4, 5]),
}


@pytest.mark.parametrize("name", PICKS)
@pytest.mark.parametrize("dead", [[], [2, 5], [0, 3, 4], [1, 6, 7]])
def test_picks(name: str, dead: list[int]) -> None:
    """Channels nobody picks go; constants among the picked ones are folded."""
    op, picked = PICKS[name]
    model = Rows(op, len(picked))
    kill(model.front, dead)
    kept = [c for c in dict.fromkeys(picked) if c not in dead]
    if (name == "select two" and len(kept) < 2) or not kept:  # a selected position has to be there
        check(model, (X,), others=[OTHER])
        return
    check(model, (X,), others=[OTHER], kept={"front.weight": (len(kept), 3, 1, 1)})


class Buffered(nn.Module):
    def __init__(self, spelling: str) -> None:
        super().__init__()
        self.front, self.back = nn.Conv2d(3, 8, 1), nn.Conv2d(4, 4, 1)
        self.register_buffer("index", INDEX)
        self.spelling = spelling
        randomized(self)

    def forward(self, x: Tensor) -> Tensor:
        y = self.front(x)
        picked = {
            "function": lambda: torch.index_select(y, 1, self.index),
            "method": lambda: y.index_select(1, self.index),
            "getitem": lambda: y[:, self.index],
        }[self.spelling]()
        return self.back(picked)


@pytest.mark.parametrize("spelling", ["function", "method", "getitem"])
def test_constant_index(spelling: str) -> None:
    """Positions 6, 1, 1, 3: five of the channels are read by nobody."""
    model = Buffered(spelling)
    check(model, (X,), others=[OTHER], kept={"front.weight": (3, 3, 1, 1), "back.weight": (4, 4, 1, 1)})
    kill(model.front, [1])
    check(model, (X,), others=[OTHER], kept={"front.weight": (2, 3, 1, 1), "back.weight": (4, 2, 1, 1)})


def test_index_that_depends_on_the_input_keeps_the_axis() -> None:
    class Chosen(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.front, self.back = nn.Linear(3, 6), nn.Linear(1, 2)

        def forward(self, x: Tensor, index: Tensor) -> Tensor:
            return self.back(torch.index_select(self.front(x), 1, index).mean(1, keepdim=True))

    model = randomized(Chosen())
    kill(model.front, [0, 1])
    inputs = (torch.randn(4, 3), torch.tensor([3, 1]))
    check(model, inputs, kept={"front.weight": (6, 3)}, reasons=[Reason.DATA_DEPENDENT], routes=["symbolic"])
