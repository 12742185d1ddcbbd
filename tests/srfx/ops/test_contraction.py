"""Contractions: what goes, what is folded, in every spelling, and with several sites."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from srfx.ir.plan import Reason
from srfx.minimize import minimize
from tests.helpers import check, kill, masked, randomized, relative_error

X = torch.randn(2, 3, 6, 7)
OTHER = (torch.randn(3, 3, 9, 8),)


def chain(*layers: nn.Module) -> nn.Sequential:
    model = randomized(nn.Sequential(*layers))
    assert isinstance(model, nn.Sequential)
    return model


def test_rows_whose_sum_is_zero_are_not_dead() -> None:
    model = chain(nn.Conv2d(3, 6, 1), nn.ReLU(), nn.Conv2d(6, 4, 1))
    with torch.no_grad():
        model[0].weight[2] = torch.tensor([0.5, -1.0, 0.5]).view(3, 1, 1)
    check(model, (X,), kept={"0.weight": (6, 3, 1, 1)})


def test_a_row_that_is_constant_only_after_folding() -> None:
    model = chain(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3))
    kill(model[0], [0, 1])
    with torch.no_grad():
        model[2].weight[3, 2:] = 0  # reads dead channels alone
    check(model, (torch.randn(5, 4),), kept={"0.weight": (4, 4), "2.weight": (4, 4), "4.weight": (3, 4)})


def test_dead_rows_of_the_output_layer_are_restored() -> None:
    model = chain(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 5))
    kill(model[2], [1, 4])
    found = check(model, (torch.randn(5, 4),), kept={"2.weight": (3, 6)})
    assert found["symbolic"].small(torch.randn(2, 4).double()).shape == (2, 5)


def test_features_nobody_reads_stay_at_the_interface() -> None:
    model = chain(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 5))
    kill(model[0], columns=[0, 2])
    check(model, (torch.randn(5, 4),), kept={"0.weight": (6, 4)})


@pytest.mark.parametrize("layers", [["0"], ["2"], ["4"], ["0", "2", "4"]])
def test_a_whole_layer_dead(layers: list[str]) -> None:
    model = chain(
        nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 5, 3, padding=1), nn.ReLU(), nn.Conv2d(5, 2, 1)
    )
    check(masked(model, whole=layers, rows=0, columns=0, zeros=0), (X,), others=[OTHER])


class Functional(nn.Module):
    def __init__(self, op: Callable[..., Tensor], shape: tuple[int, ...], back: nn.Module) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(shape)), nn.Parameter(torch.ones(shape[0]))
        self.back, self.op = back, op
        randomized(self)

    def forward(self, x: Tensor) -> Tensor:
        return self.back(torch.relu(self.op(x, self.weight, self.bias)))


def test_functional_spellings() -> None:
    model = Functional(lambda x, w, b: F.conv2d(x, w, b, padding=1), (8, 3, 3, 3), nn.Conv2d(8, 4, 1))
    kill(model, [0, 3])
    check(
        model, (X,), others=[OTHER], kept={"weight": (6, 3, 3, 3), "bias": (6,), "back.weight": (4, 6, 1, 1)}
    )
    linear = {
        "linear": F.linear,
        "matmul": lambda x, w, b: x @ w.t() + b,
        "mm": lambda x, w, b: torch.mm(x, w.T).add(b),
        "addmm": lambda x, w, b: torch.addmm(b, x, w.t()),
    }
    for name, op in linear.items():
        model = Functional(op, (8, 3), nn.Linear(8, 4))
        kill(model, [0, 3])
        check(model, (torch.randn(4, 3),), kept={"back.weight": (4, 6)} if name == "linear" else None)


class Ends(nn.Module):
    """Two inputs of which one may be None, a dict of outputs, a feature map among them."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.head = nn.Conv2d(3, 6, 3, padding=1), nn.Conv2d(3, 6, 1), nn.Linear(6, 4)

    def forward(self, x: Tensor, y: Tensor, mask: Tensor | None = None) -> dict[str, object]:
        z = F.relu(self.a(x)) + self.b(y)
        if mask is not None:
            z = z * mask
        return {"map": z, "logits": self.head(z.mean((2, 3))), "pair": (z.amax((2, 3)), None)}


def test_several_inputs_and_outputs() -> None:
    model = randomized(Ends())
    kill(model.a, [0, 1])
    kill(model.b, [1, 2])
    check(model, (X, X + 1), kept={"a.weight": (5, 3, 3, 3), "head.weight": (4, 5)}, routes=["export"])


def test_a_weight_that_is_not_finite_is_a_barrier() -> None:
    model = chain(nn.Linear(4, 6), nn.Linear(6, 3))
    kill(model[0], [1])
    with torch.no_grad():
        model[1].weight[0, 0] = float("inf")
    check(model, (torch.randn(5, 4),), kept={"0.weight": (6, 4)}, reasons=[Reason.NON_FINITE])


def test_constants_that_stay_make_no_bias() -> None:
    """Found by fuzzing (seed 20171): a layer without a bias got one for constants whose channels did not leave."""

    class Residual(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.front = nn.Linear(3, 4, bias=False)
            self.norm, self.up, self.down = (
                nn.LayerNorm(4),
                nn.Linear(4, 8, bias=False),
                nn.Linear(8, 4, bias=False),
            )

        def forward(self, x: Tensor) -> Tensor:
            y = self.front(x) + 0.25
            out: Tensor = y + self.down(F.relu(self.up(self.norm(y))))
            return out

    model = randomized(Residual()).double().eval()
    with torch.no_grad():
        model.norm.weight[[0, 2]] = 0
        model.front.weight[0] = 0
    x = torch.randn(3, 5, 3, dtype=torch.float64)
    small = minimize(model, x)
    assert relative_error(model(x), small(x)) < 1e-9
    assert small.get_submodule("up").bias is None
    assert sum(p.numel() for p in small.parameters()) <= sum(p.numel() for p in model.parameters())
