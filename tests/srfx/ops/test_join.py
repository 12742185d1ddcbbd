"""cat, stack and padding."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.helpers import Sandwich, check, kill, masked, randomized

X = torch.randn(2, 3, 4, 6)
OTHER = (torch.randn(3, 3, 8, 2),)
Op = Callable[..., Any]


class Branches(nn.Module):
    """back(join(a(x), b(x))) with six channels each; dead 0, 1 in a and 1, 2, 3 in b."""

    def __init__(self, join: Op, back: nn.Module) -> None:
        super().__init__()
        self.a, self.b, self.back = nn.Conv2d(3, 6, 1), nn.Conv2d(3, 6, 1), back
        self.join = join
        randomized(self)
        kill(self.a, [0, 1])
        kill(self.b, [1, 2, 3])

    def forward(self, x: Tensor) -> Tensor:
        return self.back(self.join(self.a(x), self.b(x)))


CATS: dict[str, Op] = {
    "torch": lambda a, b: torch.cat([a, b], 1),
    "tuple": lambda a, b: torch.cat((a, b), dim=1),
    "negative": lambda a, b: torch.cat([a, b], dim=-3),
    "concat": lambda a, b: torch.concat([a, b], dim=1),
    "concatenate": lambda a, b: torch.concatenate([a, b], axis=1),
    "keyword": lambda a, b: torch.cat(tensors=[a, b], dim=1),
}


@pytest.mark.parametrize("name", CATS)
def test_cat(name: str) -> None:
    kept = {"a.weight": (4, 3, 1, 1), "b.weight": (3, 3, 1, 1), "back.weight": (4, 7, 1, 1)}
    check(Branches(CATS[name], nn.Conv2d(12, 4, 1)), (X,), others=[OTHER], kept=kept)


def test_cat_of_one_value_twice_and_of_a_dead_branch() -> None:
    model = Branches(lambda a, b: torch.cat([a, b, a], 1), nn.Conv2d(18, 4, 1))
    check(model, (X,), kept={"a.weight": (4, 3, 1, 1), "back.weight": (4, 11, 1, 1)})
    kill(model.b, range(6))
    check(model, (X,), kept={"b.weight": (), "back.weight": (4, 8, 1, 1)})
    kill(model.a, range(6))
    check(model, (X,))  # nothing varies any more


def test_cat_along_other_axes_ties() -> None:
    for axis in (0, 2, 3):
        model = Branches(lambda a, b, axis=axis: torch.cat([a, b], axis), nn.Conv2d(6, 4, 1))
        check(model, (X,), others=[OTHER])
    model = Branches(lambda a, b: torch.cat([a, b], 3), nn.Conv2d(6, 4, 1))
    with torch.no_grad():
        model.b.bias[1] = model.a.bias[1]  # the same constant in both halves, else it is no constant
    check(model, (X,), kept={"a.weight": (5, 3, 1, 1), "back.weight": (4, 5, 1, 1)})


def test_cat_with_the_input() -> None:
    """The input's channels are not ours to remove."""

    class WithInput(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.back = nn.Conv2d(3, 6, 1), nn.Conv2d(9, 4, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.back(torch.cat([x, self.a(x)], 1))

    model = randomized(WithInput())
    kill(model.a, [0, 1])
    kill(model.back, columns=[0, 2])
    check(model, (X,), others=[OTHER], kept={"a.weight": (4, 3, 1, 1), "back.weight": (4, 7, 1, 1)})


def test_dense_block() -> None:
    class Dense(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem = nn.Conv2d(3, 6, 3, padding=1)
            self.layers = nn.ModuleList(
                nn.Sequential(nn.BatchNorm2d(n), nn.ReLU(), nn.Conv2d(n, 4, 3, padding=1, bias=False))
                for n in (6, 10, 14)
            )
            self.norm, self.fc = nn.BatchNorm2d(18), nn.Linear(18, 3)

        def forward(self, x: Tensor) -> Tensor:
            found = [self.stem(x)]
            for layer in self.layers:
                found.append(layer(torch.cat(found, 1)))
            return self.fc(F.relu(self.norm(torch.cat(found, 1))).mean((2, 3)))

    for seed in range(3):
        check(masked(randomized(Dense(), seed), seed), (X,), others=[OTHER])


@pytest.mark.parametrize("axis", [1, 2])
def test_stack_of_different_constants(axis: int) -> None:
    """Two constants of one channel stand side by side: the reader of the flattened stack takes both."""
    front, back = nn.Conv2d(3, 6, 1), nn.Conv2d(12, 4, 1)
    model = Sandwich(front, lambda x: torch.stack([x, 2 * x + 1], axis).flatten(1, 2), back)
    kill(randomized(model).front, [0, 4])
    check(model, (X,), others=[OTHER], kept={"front.weight": (4, 3, 1, 1), "back.weight": (4, 8, 1, 1)})


@pytest.mark.parametrize("axis", [1, 2, -1])
def test_stack(axis: int) -> None:
    model = Branches(lambda a, b: torch.stack([a, b], axis).mean(axis), nn.Conv2d(6, 4, 1))
    check(model, (X,), others=[OTHER])


# ---------------------------------------------------------------------------------------- padding
PADS: dict[str, tuple[Op, int]] = {
    "space": (lambda x: F.pad(x, (1, 1, 1, 1)), 8),
    "space by a value": (lambda x: F.pad(x, (1, 2), value=0.5), 8),
    "module": (nn.ZeroPad2d(1), 8),
    "constant module": (nn.ConstantPad2d((1, 0, 2, 1), 0.3), 8),
    "crop": (lambda x: F.pad(x, (-1, -1)), 8),
    "channels": (lambda x: F.pad(x, (0, 0, 0, 0, 2, 3)), 13),
    "channels by a value": (lambda x: F.pad(x, (0, 0, 0, 0, 0, 2), "constant", 0.7), 10),
    "channels cropped": (lambda x: F.pad(x, (0, 0, 0, 0, -1, 2)), 9),
    "channels and space": (lambda x: F.pad(x, (1, 1, 0, 0, 2, 2)), 12),
    "reflect": (lambda x: F.pad(x, (1, 1, 1, 1), mode="reflect"), 8),
    "replicate": (lambda x: F.pad(x, (1, 1, 1, 1), mode="replicate"), 8),
    "circular": (lambda x: F.pad(x, (1, 1, 1, 1), mode="circular"), 8),
    "reflection module": (nn.ReflectionPad2d(1), 8),
    "replication module": (nn.ReplicationPad2d((1, 0, 0, 1)), 8),
    "circular module": (nn.CircularPad2d(1), 8),
}


@pytest.mark.parametrize("name", PADS)
@pytest.mark.parametrize("bias", [False, True])
def test_pad(name: str, bias: bool) -> None:
    op, n = PADS[name]
    model = randomized(Sandwich(nn.Conv2d(3, 8, 1), op, nn.Conv2d(n, 4, 3)))
    kill(model.front, [0, 3, 7], bias=bias)
    check(model, (X,), others=[(torch.randn(3, 3, 8, 5),)])
    disturbs = name in ("space", "space by a value", "module", "constant module", "channels and space")
    if not disturbs or (bias and name not in ("space by a value", "constant module")):
        check(model, (X,), kept={"front.weight": (5, 3, 1, 1)})
