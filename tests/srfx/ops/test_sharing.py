"""Layers with several sites: constants that all sites see alike go into the one bias (theory: L7)."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from srfx.ir.plan import Reason
from tests.helpers import check, kill, randomized

X, Y = torch.randn(2, 6), torch.randn(2, 6)


class Twins(nn.Module):
    """An encoder run on two inputs; the second layer's operand differs at the second site where ``apart``."""

    def __init__(self, apart: bool = False, bias: bool = True) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 8), nn.Linear(8, 5, bias=bias)
        self.apart = apart

    def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        a, b = torch.sigmoid(self.first(x)), self.first(y)
        return self.second(a), self.second(b if self.apart else torch.sigmoid(b)).relu()


@pytest.mark.parametrize("bias", [True, False])
def test_all_sites_absorb_a_constant_that_they_share(bias: bool) -> None:
    model = randomized(Twins(bias=bias))
    kill(model.first, [1, 4, 5])
    shapes = {"first.weight": (5, 6), "second.weight": (5, 5), "second.bias": (5,)}
    check(model, (X, Y), kept=shapes)


def test_constants_that_differ_from_site_to_site_stay() -> None:
    model = randomized(Twins(apart=True))
    kill(model.first, [1, 4, 5])
    kill(model.first, [2], bias=True)  # sigmoid(0) at one site, 0 at the other
    check(model, (X, Y), kept={"first.weight": (8, 6), "second.weight": (5, 8)})


def test_a_site_whose_constants_differ_from_position_to_position_absorbs_none() -> None:
    """A projection of tokens and of a stored table of positions (DeBERTa): the table is no one constant."""

    class Table(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(6, 8), nn.Linear(8, 5)
            self.table = nn.Parameter(torch.ones(3, 8))

        def forward(self, x: Tensor) -> Tensor:
            keys = self.second(self.table)
            scores: Tensor = self.second(torch.sigmoid(self.first(x))) @ keys.t()
            return scores

    model = randomized(Table())
    kill(model.first, [1, 4, 5])
    check(model, (X,), routes=["symbolic"], kept={"first.weight": (8, 6), "second.weight": (5, 8)})
    # an exported projection of a table is one stored tensor, and no site any more
    check(model, (X,), routes=["export"], kept={"first.weight": (5, 6), "second.weight": (5, 5)})


def test_a_column_that_one_site_alone_has_no_use_for_stays() -> None:
    """Rows of the second layer that are read at one site only: the weight is made for both."""

    class Parts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second, self.third = nn.Linear(6, 8), nn.Linear(8, 5), nn.Linear(2, 3)

        def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
            a, b = torch.sigmoid(self.first(x)), torch.sigmoid(self.first(y))
            return self.third(self.second(a)[:, :2]), self.third(self.second(b)[:, 1:3])

    model = randomized(Parts())
    kill(model.first, [1, 4])
    check(model, (X, Y), kept={"first.weight": (6, 6), "second.weight": (3, 6), "second.bias": (3,)})


def test_a_border_takes_no_constant_but_zero() -> None:
    class Head(nn.Module):
        """One head on two levels of a pyramid."""

        def __init__(self) -> None:
            super().__init__()
            self.stem, self.near, self.far = (
                nn.Conv2d(3, 8, 1),
                nn.Conv2d(8, 6, 3, padding=1),
                nn.Conv2d(6, 4, 3),
            )

        def forward(self, x: Tensor) -> tuple[Tensor, ...]:
            levels = self.stem(x), torch.nn.functional.avg_pool2d(self.stem(x), 2)
            return tuple(self.far(torch.sigmoid(self.near(torch.relu(level)))) for level in levels)

    model = randomized(Head())
    kill(model.stem, [2, 5])
    with torch.no_grad():
        model.stem.bias[[2, 5]] = torch.tensor([-1.0, 1.0]).to(model.stem.bias)
    kill(model.near, [0, 3])
    picture = torch.randn(2, 3, 12, 12)
    kept = {"stem.weight": (7, 3, 1, 1), "near.weight": (4, 7, 3, 3), "far.weight": (4, 4, 3, 3)}
    check(model, (picture,), kept=kept)


def test_a_convolution_without_bias_gets_one_for_all_its_sites() -> None:
    class Siamese(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Sequential(
                nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.SiLU(), nn.Conv2d(8, 4, 3, bias=False)
            )

        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return self.body(x).amax((2, 3)) - self.body(y).amax((2, 3))

    model = randomized(Siamese())
    kill(model.body[0], [1, 6])
    kept = {"body.0.weight": (6, 3, 3, 3), "body.3.weight": (4, 6, 3, 3), "body.3.bias": (4,)}
    check(model, (torch.randn(2, 3, 8, 8), torch.randn(2, 3, 9, 7)), kept=kept)


def test_a_weight_that_something_else_reads_takes_zeros_only() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(6, 8), nn.Linear(8, 5)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return self.second(torch.sigmoid(self.first(x))), self.second.weight.sum(1)

    model = randomized(Tied())
    kill(model.first, [1, 4])
    check(model, (X,), kept={"first.weight": (8, 6), "second.weight": (5, 8)})


@settings(max_examples=20)
@given(st.integers(0, 2**16), st.integers(2, 4), st.sampled_from(["sigmoid", "relu", "cos"]))
def test_any_number_of_sites(seed: int, n_sites: int, name: str) -> None:
    """A tower applied to slices of the input: every dead row of both layers goes."""

    class Tower(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.out = nn.Linear(3, 7), nn.Linear(7, 6), nn.Linear(6 * n_sites, 2)

        def forward(self, x: Tensor) -> Tensor:
            act = getattr(torch, name)
            parts = [act(self.b(act(self.a(x[:, 3 * i : 3 * i + 3])))) for i in range(n_sites)]
            return self.out(torch.cat(parts, 1))

    torch.manual_seed(seed)
    model = randomized(Tower())
    dead = [torch.randperm(7)[: 1 + seed % 5].tolist(), torch.randperm(6)[: 1 + seed % 4].tolist()]
    kill(model.a, dead[0])
    kill(model.b, dead[1])
    left = 7 - len(dead[0]), 6 - len(dead[1])
    kept = {"a.weight": (left[0], 3), "b.weight": (left[1], left[0]), "out.weight": (2, left[1] * n_sites)}
    check(model, (torch.randn(2, 3 * n_sites),), kept=kept)


def test_the_report_names_the_sites_that_disagree() -> None:
    from srfx.testing import probe

    model = randomized(Twins(apart=True)).double()
    kill(model.first, [1])
    found = probe(model, (X.double(), Y.double()))
    assert found.reasons == {Reason.SHARED_WEIGHT.name: 1}
