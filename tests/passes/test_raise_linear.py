"""raise-linear: addmm and mm of a transposed stored weight become linear, nothing else does."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import srfx
from srfx.ir.capture import capture
from srfx.passes import get_pass
from tests.snapshots import trace

aten = torch.ops.aten
X = torch.randn(3, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def decomposed(model: nn.Module) -> nn.Module:
    with torch.no_grad():
        program = torch.export.export(model, (X,), dynamic_shapes=[{0: torch.export.Dim.DYNAMIC}])
    return program.run_decompositions().module()


def targets(gm: torch.fx.GraphModule) -> list[object]:
    return [n.target for n in gm.graph.nodes if n.op == "call_function"]


@pytest.mark.parametrize("bias", [True, False])
def test_decomposed_linear_is_raised_and_computes_the_same(bias: bool):
    model = nn.Sequential(nn.Linear(6, 5, bias=bias), nn.ReLU(), nn.Linear(5, 2, bias=bias)).double().eval()
    gm = capture(decomposed(model)).graph_module
    result = get_pass("raise-linear")(gm)
    assert len(result.edits) == 2
    assert targets(gm).count(aten.linear.default) == 2
    assert not {aten.addmm.default, aten.mm.default, aten.permute.default, aten.t.default} & set(targets(gm))
    torch.testing.assert_close(gm(X), model(X), rtol=1e-12, atol=0)
    assert not get_pass("raise-linear")(gm).modified


def test_decomposed_network_reaches_the_size_of_the_composite_one():
    model = nn.Sequential(nn.Linear(6, 5), nn.Sigmoid(), nn.Linear(5, 2)).double().eval()
    with torch.no_grad():
        model[0].weight[[0, 3]] = 0
    small = srfx.minimize(decomposed(model))
    assert sum(p.numel() for p in small.parameters()) == 3 * 6 + 3 + 2 * 3 + 2
    torch.testing.assert_close(small(X), model(X), rtol=1e-9, atol=0)


class Scaled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(5, 6, dtype=torch.float64))
        self.bias = nn.Parameter(torch.randn(5, dtype=torch.float64))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.addmm(self.bias, x, self.weight.t(), alpha=2)


def test_scaled_addmm_is_left_alone():
    gm = capture(decomposed(Scaled())).graph_module
    assert not get_pass("raise-linear")(gm).modified


class Computed(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.mm(x, x.t())


def test_product_of_computed_values_is_left_alone():
    gm = capture(decomposed(Computed())).graph_module
    assert not get_pass("raise-linear")(gm).modified


class Product(nn.Module):
    """x @ weight.T + bias, as Falcon spells its linear layers."""

    def __init__(self, spelling: str) -> None:
        super().__init__()
        self.front, self.norm = nn.Linear(6, 7), nn.LayerNorm(7)
        self.weight, self.bias = nn.Parameter(torch.randn(5, 7)), nn.Parameter(torch.randn(5))
        self.spelling = spelling
        with torch.no_grad():
            self.front.weight[:3] = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x, w = self.norm(self.front(x)), self.weight
        if self.spelling == "T":
            return x @ w.T + self.bias
        if self.spelling == "t":
            return torch.mm(x, w.t()) + self.bias
        if self.spelling == "transpose":
            return x.matmul(w.transpose(-1, -2)) + self.bias
        return torch.matmul(x, w.permute(1, 0)) + self.bias


@pytest.mark.parametrize("route", ["symbolic", "export"])
@pytest.mark.parametrize("spelling", ["T", "t", "transpose", "permute"])
def test_product_with_a_transposed_weight_takes_statistics(spelling: str, route: str):
    model = Product(spelling).double().eval()
    gm = trace(model, (X,), route)
    small = srfx.minimize(gm, X)
    assert small.front.weight.shape == (4, 6)
    (weight,) = [p for p in small.parameters() if p.dim() == 2 and p.shape[0] == 5]
    assert weight.shape == (5, 6)  # four channels and two statistics for three
    torch.testing.assert_close(small(X), model(X), rtol=1e-9, atol=1e-12)


def test_product_with_a_plain_weight_is_left_alone():
    class Plain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(6, 5, dtype=torch.float64))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x @ self.weight

    assert not get_pass("raise-linear")(capture(Plain()).graph_module).modified


class Batched(nn.Module):
    """A linear layer, or a product, on a tensor that is not contiguous: decomposed, it is a bmm of a repeated matrix."""

    def __init__(self, has_bias: bool, is_linear: bool) -> None:
        super().__init__()
        self.front, self.back = nn.Conv1d(3, 8, 1), nn.Linear(8, 5, bias=has_bias)
        self.matrix, self.is_linear = nn.Parameter(torch.randn(8, 5)), is_linear

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = torch.sigmoid(self.front(x)).transpose(1, 2)
        return self.back(h) if self.is_linear else torch.bmm(h, self.matrix.expand(h.shape[0], 8, 5))


@pytest.mark.parametrize(("has_bias", "is_linear"), [(True, True), (False, True), (False, False)])
def test_a_product_with_a_repeated_matrix(has_bias: bool, is_linear: bool) -> None:
    model = Batched(has_bias, is_linear).double().eval()
    with torch.no_grad():
        model.front.weight[[1, 4]] = (
            0  # constants: a linear layer absorbs them, a product gets a bias behind it
        )
        model.front.bias[[1, 4]] = 0.5
        (model.back.weight if is_linear else model.matrix.t())[:, 6] = 0
    x = torch.randn(2, 3, 7, dtype=torch.float64)
    sizes = ({0: torch.export.Dim.DYNAMIC, 2: torch.export.Dim.DYNAMIC},)
    program = torch.export.export(model, (x,), dynamic_shapes=sizes).run_decompositions()
    assert any(n.target is aten.bmm.default for n in program.graph.nodes)
    gm = capture(program.module()).graph_module
    assert len(get_pass("raise-linear")(gm).edits) == 1
    assert aten.bmm.default not in targets(gm)
    small = srfx.minimize(program)
    for other in (x, torch.randn(4, 3, 2, dtype=torch.float64)):
        torch.testing.assert_close(small(other), model(other), rtol=1e-9, atol=1e-12)
    assert small.get_parameter("front.weight").shape == (5, 3, 1)


def test_a_product_with_a_matrix_cut_otherwise_is_left_alone() -> None:
    class Cut(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.matrix = nn.Parameter(torch.randn(6, 4, dtype=torch.float64))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.bmm(x, self.matrix.view(2, 3, 4))

    program = torch.export.export(Cut(), (torch.randn(2, 5, 3, dtype=torch.float64),))
    assert not get_pass("raise-linear")(capture(program.module()).graph_module).modified


class Biased(nn.Module):
    """Vectors that are added behind a linear layer; only what adds to each channel its own number is a bias."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, 6))
        self.bias, self.wide = nn.Parameter(torch.randn(3)), nn.Parameter(torch.randn(2, 3))

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        plain = torch.nn.functional.linear
        twice = plain(x, self.weight)
        return (
            plain(x, self.weight).view(-1, 1, 3) + self.bias,
            plain(x, self.weight).view(-1, 3, 1) + self.bias,  # along another axis
            plain(x, self.weight).view(-1, 1, 3) + self.wide,
            (twice + self.bias) * twice,
        )


def test_a_vector_added_behind_a_linear_layer_is_its_bias():
    model = Biased().double().eval()
    traced = trace(model, (X,), "export")
    gm = capture(traced).graph_module
    before = targets(gm).count(aten.add.Tensor)
    assert len(get_pass("raise-linear")(gm).edits) == 1
    assert targets(gm).count(aten.add.Tensor) == before - 1
    for got, wanted in zip(gm(X), model(X), strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-12, atol=1e-14)
