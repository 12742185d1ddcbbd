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
