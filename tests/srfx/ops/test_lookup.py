"""Indexing by several tensors of positions, and by copies of stored ones (theory: Lemma T1)."""

from __future__ import annotations

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
