"""The properties of `srfx.testing.check` can fail, and tell what is no example from what is wrong."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

from srfx.testing.check import Case, Skip, same_function
from tests.helpers import randomized


class Largest(nn.Module):
    def __init__(self, is_tied: bool) -> None:
        super().__init__()
        self.fc, self.is_tied = randomized(nn.Linear(3, 4)), is_tied

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = self.fc(x)
        return y, (y * 0 + 0.1 if self.is_tied else y).argmax(1)


class Shifted(nn.Module):
    """The same, but for an integer."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Any:
        y, i = self.inner(x)
        return y, i + 1


def case(is_tied: bool) -> Case:
    return Case(Largest(is_tied).double().eval(), lambda n: (torch.randn(n, 3, dtype=torch.float64),))


def test_a_wrong_integer_is_noticed() -> None:
    found = case(False)
    found.inputs = lambda n: (torch.ones(n, 3, dtype=torch.float64),)
    same_function(found)
    found.small = fx.symbolic_trace(Shifted(found.small))
    with pytest.raises(AssertionError, match="output 1: relative error inf"):
        same_function(found)


def test_an_integer_that_hangs_on_rounding_is_no_example() -> None:
    found = case(True)
    found.inputs = lambda n: (torch.ones(n, 3, dtype=torch.float64),)
    found.small = fx.symbolic_trace(Shifted(found.small))
    with pytest.raises(Skip, match="hangs on rounding"):
        same_function(found)


class Amplified(nn.Module):
    """What a norm leaves of a constant image is rounding, which an RMS norm without any eps blows up."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(1, 2, 3, padding=1), nn.InstanceNorm2d(2)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.conv(x))
        return y * (y.square().mean(1, keepdim=True) + 1e-32).rsqrt()


class Doubled(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return 2 * self.inner(x)


@pytest.mark.parametrize("is_dead", [True, False])
def test_a_float_that_hangs_on_rounding_is_no_example(is_dead: bool) -> None:
    model = Amplified().double().eval()
    with torch.no_grad():
        model.conv.weight *= not is_dead
    found = Case(model, lambda n: (torch.randn(n, 1, 6, 6, dtype=torch.float64),))
    found.small = fx.symbolic_trace(Doubled(model))
    with pytest.raises(
        Skip if is_dead else AssertionError, match="hangs on rounding" if is_dead else "error 1.0e"
    ):
        same_function(found)


def test_another_shape_is_never_rounding() -> None:
    model = Amplified().double().eval()
    with torch.no_grad():
        model.conv.weight.zero_()
    found = Case(model, lambda n: (torch.randn(n, 1, 6, 6, dtype=torch.float64),))
    found.small = fx.symbolic_trace(nn.Sequential(model, nn.Flatten()))
    with pytest.raises(AssertionError, match="output 0: torch"):
        same_function(found)
