"""Gathering and indexing by computed positions, by several tensors of them, and by copies of stored ones (theory: Lemma T1)."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import srfx
from srfx.ir.plan import Reason
from tests.helpers import Sandwich, check, kill, randomized, relative_error

X = (torch.randn(2, 3, 5, 6),)


def _sandwich(op: object, back: int = 8) -> nn.Module:
    model = randomized(Sandwich(nn.Conv2d(3, 8, 1), op, nn.Conv2d(back, 4, 1)))  # type: ignore[arg-type]
    kill(model.front, [1, 5])
    return model


def _grid(x: Tensor) -> Tensor:
    rows, columns = torch.tensor([0, 2, 2, 4]), torch.tensor([5, 1, 0])
    return x[:, :, rows[:, None], columns]


def test_positions_of_two_axes_leave_the_channels_alone() -> None:
    check(_sandwich(_grid), X, kept={"front.weight": (6, 3, 1, 1)})


def test_positions_that_are_computed() -> None:
    def picked(x: Tensor) -> Tensor:
        at = x.mean(1).flatten(1).argsort(1)[0, :4] % 5
        return x[:, :, at.view(2, 2), at.view(2, 2)]

    check(_sandwich(picked), X, kept={"front.weight": (6, 3, 1, 1)})


def test_one_of_the_axes_has_the_channels() -> None:
    def diagonal(x: Tensor) -> Tensor:
        at = torch.arange(5)
        return x[:, at, at][:, :, None]

    model = _sandwich(diagonal, back=5)
    check(model, X, kept={"front.weight": (8, 3, 1, 1)}, reasons=[Reason.DATA_DEPENDENT])


@pytest.mark.parametrize("mode", ["nearest", "nearest-exact"])
def test_decomposed_interpolation(mode: str) -> None:
    """run_decompositions makes one look-up by a grid of positions of it."""
    model = _sandwich(lambda x: F.interpolate(x, scale_factor=2, mode=mode)).double()
    x = X[0].double()
    small = srfx.minimize(torch.export.export(model, (x,)).run_decompositions().module(), (x,))
    assert tuple(small.front.weight.shape) == (6, 3, 1, 1)
    assert relative_error(model(x), small(x)) < 1e-12


def test_positions_that_an_export_clones() -> None:
    def some(x: Tensor) -> Tensor:
        return torch.index_select(x, 1, torch.tensor([7, 1, 0, 5, 2]))

    model, x = _sandwich(some, back=5).double(), X[0].double()
    for traced in (torch.export.export(model, (x,)), torch.export.export(model, (x,)).run_decompositions()):
        small = srfx.minimize(traced.module(), (x,))
        assert tuple(small.front.weight.shape) == (3, 3, 1, 1)
        assert relative_error(model(x), small(x)) < 1e-12


def test_an_index_with_gaps_is_refused_by_name() -> None:
    def gap(x: Tensor) -> Tensor:
        at = torch.arange(3)
        return x[at % 2, :, at].reshape(1, 8, 3, 6)

    check(_sandwich(gap), X, kept={"front.weight": (8, 3, 1, 1)}, reasons=[Reason.UNRECOGNISED_CALL])


V, C, T = 13, 10, 5
IDS = torch.randint(0, V, (2, T))


def test_gather_along_tokens_keeps_channels_apart() -> None:
    class Gathered(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.front, self.back = nn.Linear(4, C), nn.Linear(C, 3)
            randomized(self)

        def forward(self, x: Tensor, ids: Tensor) -> Tensor:
            y = self.front(x)
            return self.back(torch.gather(y, 1, ids.unsqueeze(-1).expand_as(y)))

    model = Gathered()
    kill(model.front, rows=[0, 1])
    kill(model.back, columns=[2])
    # a constant is a constant wherever it is gathered; the index is as wide as the channels
    check(model, (torch.randn(2, T, 4), torch.randint(0, T, (2, T))))


SPREADS: dict[str, Any] = {
    "expand": lambda ids, y: ids.unsqueeze(-1).expand(-1, -1, C),
    "expand_as": lambda ids, y: ids.unsqueeze(-1).expand_as(y),
    "repeat": lambda ids, y: ids.unsqueeze(-1).repeat(1, 1, C),
    "tile": lambda ids, y: ids.unsqueeze(-1).tile(1, 1, C),
    "literal": lambda ids, y: torch.arange(T - 1, -1, -1).view(1, T, 1).expand(y.size(0), T, C),
}


@pytest.mark.parametrize("name", SPREADS)
@pytest.mark.parametrize("gather", [torch.gather, lambda y, dim, ids: torch.take_along_dim(y, ids, dim)])
def test_gather_by_an_index_that_is_repeated(name: str, gather: Any) -> None:
    """Tokens put in another order (masked autoencoders): one index for all channels, which go as ever."""

    class Gathered(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.front, self.back = nn.Linear(4, C), nn.Linear(C, 3)
            randomized(self)

        def forward(self, x: Tensor, ids: Tensor) -> Tensor:
            y = self.front(x)
            return self.back(gather(y, 1, SPREADS[name](ids, y)))

    model = Gathered()
    kill(model.front, rows=[0, 1])
    kill(model.back, columns=[2])
    inputs = (torch.randn(2, T, 4), torch.randint(0, T, (2, T)))
    routes = ["export"] if name == "literal" else ["symbolic", "export"]  # a proxy cannot size a tensor
    check(model, inputs, kept={"front.weight": (C - 3, 4), "back.weight": (3, C - 3)}, routes=routes)


def test_gather_along_channels_keeps_them() -> None:
    class Gathered(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.front, self.back = nn.Linear(4, C), nn.Linear(T, 3)
            randomized(self)

        def forward(self, x: Tensor, ids: Tensor) -> Tensor:
            return self.back(torch.gather(self.front(x), -1, ids))

    model = Gathered()
    kill(model.front, rows=[0, 1])
    check(model, (torch.randn(2, 4), torch.randint(0, C, (2, T))), kept={"front.weight": (C, 4)})


def test_table_with_channels_beside_the_looked_up_axis() -> None:
    class Table(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.back = nn.Parameter(torch.randn(6, V, C)), nn.Linear(C, 3)

        def forward(self, ids: Tensor) -> Tensor:
            return self.back(self.table[:, ids].sum(0))

    model = Table()
    kill(model.back, columns=[0, 5, 6])
    check(model, (IDS,))


def test_norm_and_attention_scores_read_at_computed_positions() -> None:
    """Indexing by a tensor that is no constant is no movement: whoever follows values past it has to ask first."""

    class Picked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.front, self.norm, self.back = nn.Linear(4, C), nn.LayerNorm(C), nn.Linear(C, 3)
            randomized(self)

        def forward(self, x: Tensor, ids: Tensor) -> Tensor:
            y = self.norm(self.front(x))
            scores = (y @ y.transpose(-2, -1))[:, ids.clamp(0, T - 1)]
            return self.back(y[:, ids.clamp(0, T - 1)]).flatten(1).sum(1) + scores.softmax(-1).flatten(1).sum(
                1
            )

    model = Picked()
    kill(model.front, rows=[0, 1])
    kill(model.back, columns=[2])
    check(model, (torch.randn(2, T, 4), torch.randint(0, T, (2,))), kept={"back.weight": (3, C)})
