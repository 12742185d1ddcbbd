"""A norm of one number yields its shift, whatever the number is (theory: Lemma N11)."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.helpers import check, kill, randomized

X = (torch.randn(3, 5),)


class Beside(nn.Module):
    """back([op(a(x)), b(x)]), where a has two channels."""

    def __init__(self, op: nn.Module | Callable[[Tensor], Tensor], width: int = 2) -> None:
        super().__init__()
        self.a, self.b, self.back = nn.Linear(5, width), nn.Linear(5, 3), nn.Linear(width + 3, 2)
        self.op = op
        randomized(self)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.back(torch.cat([self.op(self.a(x)), self.b(x)], -1))
        return y


LONE: dict[str, nn.Module | Callable[[Tensor], Tensor]] = {
    "groups of one": nn.GroupNorm(2, 2),
    "function": lambda x: F.group_norm(x, 2),
    "one position": lambda x: F.group_norm(x[..., None, None], 2).flatten(1),
    "layer": lambda x: F.layer_norm(x[..., None], (1,))[..., 0],
}


@pytest.mark.parametrize("name", LONE)
def test_it_is_constant(name: str) -> None:
    check(Beside(LONE[name]), X, kept={"a.weight": (), "back.weight": (2, 3)})


def test_a_layer_norm_of_width_one() -> None:
    check(Beside(nn.LayerNorm(1), 1), X, kept={"a.weight": (), "back.weight": (2, 3)})


MORE: dict[str, nn.Module | Callable[[Tensor], Tensor]] = {
    "one group": nn.GroupNorm(1, 2),
    "layer": nn.LayerNorm(2),
    "several positions": lambda x: F.group_norm(torch.stack([x, x**2], -1), 2)[..., 0],
    "rms": lambda x: F.rms_norm(x[..., None], (1,))[..., 0],
}


@pytest.mark.parametrize("name", MORE)
def test_of_several_numbers_it_varies(name: str) -> None:
    """Also where all but one are constants: these have their share in the mean."""
    model = Beside(MORE[name])
    check(model, X, kept={"back.weight": (2, 5)})
    model.a.weight.data[0] = 0
    found = check(model, X, idempotent=False)
    assert "a.weight" in dict(found["symbolic"].small.named_parameters())


def test_the_last_of_several_groups_goes() -> None:
    model = randomized(nn.Sequential(nn.Linear(3, 8), nn.GroupNorm(4, 8), nn.Linear(8, 2)))
    kill(model[0], rows=[6, 7])
    check(model, (torch.randn(2, 3),), kept={"0.weight": (6, 3), "2.weight": (2, 6)})
