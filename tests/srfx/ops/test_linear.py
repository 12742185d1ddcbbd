"""Linear layers with one weight."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import srfx
from tests.helpers import check, count, kill, masked, randomized, shapes


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


class Product(nn.Module):
    """Three layers; the one in the middle is a product, or a layer without a bias that computes the same."""

    def __init__(self, is_layer: bool = False, ends: bool = False) -> None:
        super().__init__()
        self.front, self.back = nn.Linear(3, 8), nn.Linear(5, 2)
        self.w = nn.Parameter(torch.ones(5, 8) if is_layer else torch.ones(8, 5))
        self.is_layer, self.ends = is_layer, ends
        randomized(self)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.front(x))
        y = nn.functional.linear(y, self.w) if self.is_layer else y @ self.w
        return y if self.ends else self.back(torch.tanh(y))


@pytest.mark.parametrize("ends", [False, True], ids=["inside", "output"])
def test_a_product_gets_a_bias_behind_it(ends: bool) -> None:
    """Three constants that are not 0 go; rows that nobody reads need no number of it."""
    model = Product(ends=ends)
    kill(model.front, [1, 4, 6])
    model.front.bias.data[[1, 4]] = 0.7
    model.front.bias.data[6] = -0.7
    left = 5
    if not ends:
        model.back.weight.data[:, 2] = 0
        left = 4
    found = check(model, (torch.randn(4, 3),), kept={"front.weight": (5, 3), "w": (5, left)})
    small = found["symbolic"].small
    assert shapes(small)["matmul_bias"] == (left,)
    assert small.get_parameter("matmul_bias").requires_grad
    assert count(small) < count(model)


def test_zeros_need_no_bias() -> None:
    model = Product()
    kill(model.front, [1, 4], bias=True)
    small = srfx.minimize(model, torch.randn(4, 3))
    assert shapes(small)["w"] == (6, 5)
    assert "matmul_bias" not in shapes(small)


def test_a_name_that_is_taken() -> None:
    class Named(Product):
        def __init__(self) -> None:
            super().__init__()
            self.matmul_bias = nn.Parameter(torch.ones(2))

        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) + self.matmul_bias

    model = Named()
    kill(model.front, [1])
    model.front.bias.data[1] = 0.7
    check(model, (torch.randn(4, 3),), kept={"w": (8, 5), "matmul_bias": (2,)}, routes=("symbolic",))


@settings(max_examples=8)
@given(st.integers(0, 2**20))
def test_as_small_as_a_layer(seed: int) -> None:
    """Of the same zeros a product keeps what a layer without a bias keeps."""
    torch.manual_seed(seed)
    rows, columns = torch.rand(8) < 0.5, torch.rand(8, 5) < 0.4
    biases, read = torch.rand(8) < 0.3, torch.rand(5) < 0.6
    read[seed % 5] = True
    kept = []
    for is_layer in (False, True):
        model = Product(is_layer)
        with torch.no_grad():
            model.front.weight[rows], model.front.bias[biases] = 0, 0
            model.w[columns.t() if is_layer else columns] = 0
            model.back.weight[:, ~read] = 0
        outcome = check(model, (torch.randn(4, 3),), routes=("symbolic",), idempotent=False)
        found = shapes(outcome["symbolic"].small)
        kept.append((found.get("front.weight"), found.get("back.weight")))
    assert kept[0] == kept[1]
