"""Elementwise ops of two operands: what ties, what they absorb, what they refuse."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.helpers import Sandwich, check, kill, masked, randomized

X = torch.randn(2, 3, 5, 6)
OTHER = (torch.randn(3, 3, 7, 4),)


def sandwich(op: Callable[[Any], Any], *, bias: bool = False) -> nn.Module:
    """Three of eight channels are constant in front of ``op``."""
    model = randomized(Sandwich(nn.Conv2d(3, 8, 1), op, nn.Conv2d(8, 4, 1)))
    kill(model.front, [0, 3, 7], bias=bias)
    return model


KEPT = {"front.weight": (5, 3, 1, 1), "front.bias": (5,), "back.weight": (4, 5, 1, 1), "back.bias": (4,)}


# ---------------------------------------------------------------------------------------- two operands
class Two(nn.Module):
    """back(op(a(x), b(x))) with a constant in channels 0, 1, 2 and b in channels 1, 2, 3 of eight."""

    def __init__(self, op: Callable[[Tensor, Tensor], Tensor], zero: bool = False) -> None:
        super().__init__()
        self.a, self.b, self.back = nn.Conv2d(3, 8, 1), nn.Conv2d(3, 8, 1), nn.Conv2d(8, 4, 1)
        self.op = op
        randomized(self)
        kill(self.a, [0, 1, 2], bias=zero)
        kill(self.b, [1, 2, 3])

    def forward(self, x: Tensor) -> Tensor:
        return self.back(self.op(self.a(x), self.b(x)))


BINARY: list[Callable[[Tensor, Tensor], Tensor]] = [
    operator.add,
    operator.sub,
    torch.add,
    torch.sub,
    torch.maximum,
    torch.minimum,
    torch.max,
    torch.min,
    torch.fmax,
    torch.fmin,
    lambda a, b: a.add(b),
    lambda a, b: torch.add(a, b, alpha=2),
    lambda a, b: torch.where(a > b, a, b),
    lambda a, b: a.max(b),
    lambda a, b: torch.lerp(a, b, 0.3),
    lambda a, b: a.addcmul(a, b),
    torch.atan2,
    torch.hypot,
    lambda a, b: a / (b * b + 1),
    lambda a, b: torch.div(a, b.abs() + 1),
    lambda a, b: (a < b).to(a.dtype) - a,
]


@pytest.mark.parametrize("op", BINARY)
def test_branches_with_different_dead_channels(op: Callable[[Tensor, Tensor], Tensor]) -> None:
    check(
        Two(op), (X,), kept={"a.weight": (6, 3, 1, 1), "b.weight": (6, 3, 1, 1), "back.weight": (4, 6, 1, 1)}
    )


@pytest.mark.parametrize("op", [operator.mul, torch.mul, lambda a, b: a.mul(b), torch.multiply])
def test_zero_times_anything_is_zero(op: Callable[[Tensor, Tensor], Tensor]) -> None:
    """Channel 0 varies in b, is 0 in a, and the product is 0."""
    check(
        Two(op, zero=True),
        (X,),
        kept={"a.weight": (5, 3, 1, 1), "b.weight": (5, 3, 1, 1), "back.weight": (4, 5, 1, 1)},
    )
    check(Two(op), (X,), kept={"a.weight": (6, 3, 1, 1), "back.weight": (4, 6, 1, 1)})


CHOICES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "where": lambda m, x: torch.where(m, x, 0.7),
    "where, the other way": lambda m, x: torch.where(~m, torch.full_like(x, 0.7), x),
    "where, method": lambda m, x: x.where(m, torch.full_like(x, 0.7)),
    "masked_fill": lambda m, x: x.masked_fill(m, 0.7),
    "masked_fill, by name": lambda m, x: torch.masked_fill(x, mask=m, value=0.7),
}


@pytest.mark.parametrize("name", CHOICES)
@pytest.mark.parametrize("width", [1, 8])
def test_a_choice_between_equal_constants(name: str, width: int) -> None:
    """Padding may put in what is there already: then it does not matter where it is put."""

    class Padded(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.front, self.back = nn.Conv2d(3, width, 1), nn.Conv2d(width + 2, 4, 1)
            self.beside = nn.Conv2d(3, 2, 1)

        def forward(self, x: Tensor, seen: Tensor) -> Tensor:
            return self.back(torch.cat([CHOICES[name](seen[:, None], self.front(x)), self.beside(x)], 1))

    model = randomized(Padded()).double()
    kill(model.front, range(min(width, 3)))
    model.front.bias.data[0] = 0.7  # the others are other constants
    seen = torch.rand(2, 5, 6) < 0.5
    if width == 1:  # as wide as the mask, whose axis 1 has no channels: the column stays
        check(model, (X, seen), kept={"front.weight": ()})
    else:
        check(
            model, (X, seen), kept={"back.weight": (4, width + 1, 1, 1), "front.weight": (width - 1, 3, 1, 1)}
        )


@pytest.mark.parametrize(
    "op", [torch.log, torch.sqrt, torch.rsqrt, torch.reciprocal, lambda x: x**-1.5, lambda x: 1 / x]
)
def test_a_kept_leftover_never_turns_into_nan(op: Callable[[Tensor], Tensor]) -> None:
    """Channels that stay for another reader may hold any finite value, so a partial op demands its operand."""

    class Leftover(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 8, 1), nn.Conv2d(3, 8, 1)
            self.back, self.other = nn.Conv2d(8, 4, 1), nn.Conv2d(8, 2, 1)
            randomized(self)
            kill(self.back, columns=[0, 1])  # nobody reads op(a)[0:2], but b's channels 0, 1 are read below
            kill(self.a, [0, 2])

        def forward(self, x: Tensor) -> Tensor:
            b = self.b(x)
            y = op(self.a(x).abs() + 1) + b
            return torch.cat([self.back(y), self.other(b)], 1)

    check(Leftover(), (X,))


# ---------------------------------------------------------------------------------------- broadcasting
class Gate(nn.Module):
    """Squeeze and excite: a gate [N, C, 1, 1] times a map [N, C, H, W]."""

    def __init__(self, flip: bool) -> None:
        super().__init__()
        self.front, self.down, self.up, self.back = (
            nn.Conv2d(3, 8, 1),
            nn.Conv2d(8, 4, 1),
            nn.Conv2d(4, 8, 1),
            nn.Conv2d(8, 2, 1),
        )
        self.flip = flip

    def forward(self, x: Tensor) -> Tensor:
        y = self.front(x)
        gate = torch.sigmoid(self.up(F.relu(self.down(F.adaptive_avg_pool2d(y, 1)))))
        return self.back(gate * y if self.flip else y * gate)


@pytest.mark.parametrize("flip", [False, True])
def test_gate_absorbs_constants_and_ties_the_rest(flip: bool) -> None:
    model = randomized(Gate(flip))
    kill(model.front, [0, 3, 7])  # k times a gate that varies: varies, so these channels stay
    kill(model.down, [1])
    check(model, (X,), others=[OTHER], kept={"front.weight": (8, 3, 1, 1), "down.weight": (3, 8, 1, 1)})
    kill(model.front, [0, 3, 7], bias=True)  # 0 times a gate is 0
    check(
        model,
        (X,),
        others=[OTHER],
        kept={"front.weight": (5, 3, 1, 1), "down.weight": (3, 5, 1, 1), "up.weight": (5, 3, 1, 1)},
    )


def test_dead_gate_rows_are_constant_gates() -> None:
    model = randomized(Gate(False))
    kill(model.up, range(8))
    check(model, (X,), kept={"front.weight": (8, 3, 1, 1), "up.weight": (), "down.weight": ()})


class Scales(nn.Module):
    """Layer scale, a learned bias, a learned map over positions, a parameter on the left."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.front, self.back = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 2, 1)
        self.scale, self.shift = nn.Parameter(torch.ones(shape)), nn.Parameter(torch.ones(shape))

    def forward(self, x: Tensor) -> Tensor:
        return self.back(self.scale * (self.front(x) + self.shift) - self.shift)


@pytest.mark.parametrize("shape", [(8, 1, 1), (1, 8, 1, 1)])
def test_parameters_in_arithmetic(shape: tuple[int, ...]) -> None:
    model = randomized(Scales(shape))
    kill(model.front, [0, 1])
    left = tuple(6 if n == 8 else n for n in shape)
    check(model, (X,), others=[OTHER], kept={"front.weight": (6, 3, 1, 1), "scale": left, "shift": left})


def test_zero_scale_makes_its_channel_constant() -> None:
    model = randomized(Scales((8, 1, 1)))
    with torch.no_grad():
        model.scale[[2, 4, 5]] = 0
    check(
        model,
        (X,),
        others=[OTHER],
        kept={"front.weight": (5, 3, 1, 1), "scale": (5, 1, 1), "back.weight": (2, 5, 1, 1)},
    )


def test_a_map_that_differs_from_position_to_position_is_no_constant() -> None:
    model = randomized(Scales((8, 5, 6)))
    kill(model.front, [0, 1])
    check(model, (X,), kept={"front.weight": (8, 3, 1, 1)})
    with torch.no_grad():
        model.scale[0] = 0
        model.shift[0] = 0.25
    check(model, (X,), kept={"front.weight": (7, 3, 1, 1), "scale": (7, 5, 6)})


def test_scalar_and_single_element_parameters() -> None:
    class Scalar(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.front, self.back = nn.Linear(4, 6), nn.Linear(6, 2)
            self.s, self.t = nn.Parameter(torch.tensor(0.7)), nn.Parameter(torch.tensor([0.3]))

        def forward(self, x: Tensor) -> Tensor:
            return self.back(self.s * self.front(x) + self.t)

    model = randomized(Scalar())
    kill(model.front, [0, 5])
    check(model, (torch.randn(3, 4),), kept={"front.weight": (4, 4), "s": (), "t": (1,)})


def test_outer_broadcasting_of_two_values_keeps_both_axes() -> None:
    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.back = nn.Linear(3, 6), nn.Linear(3, 5), nn.Linear(5, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.back(self.a(x).unsqueeze(2) + self.b(x).unsqueeze(1)).sum(1)

    model = randomized(Outer())
    kill(model.b, [0, 1])
    check(model, (torch.randn(3, 3),))


def test_constant_operand_becomes_a_stored_tensor() -> None:
    """All of b is dead: what is left of it is one vector."""
    model = Two(operator.add)
    kill(model.b, range(8))
    small = check(model, (X,), kept={"b.weight": (), "b.bias": (), "a.weight": (5, 3, 1, 1)})
    assert "b" not in dict(small["symbolic"].small.named_children())


def test_random_masks_over_everything() -> None:
    for seed in range(3):
        check(masked(randomized(Gate(bool(seed % 2)), seed), seed, scales=0), (X,), others=[OTHER])


def test_residual_branches_that_die_one_after_the_other() -> None:
    """Each addition is bypassed; the second one's operand is the first, which is gone by then."""

    class Stream(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.fc = nn.Conv2d(3, 6, 1), nn.Linear(6, 2)
            self.branches = nn.ModuleList(
                nn.Sequential(nn.Conv2d(6, 4, 1), nn.ReLU(), nn.Conv2d(4, 6, 1, bias=False)) for _ in range(3)
            )

        def forward(self, x: Tensor) -> Tensor:
            y = self.stem(x)
            for branch in self.branches:
                y = y + branch(F.relu(y))
            return self.fc(y.mean((2, 3)))

    model = randomized(Stream())
    for branch in model.branches:
        kill(branch[2], range(6))
    check(model, (X,), others=[OTHER], parameters=(3 * 6 + 6) + (6 * 2 + 2))


RUN_TIME: dict[str, tuple[Callable[[Tensor], Tensor], bool]] = {
    "times": (lambda x: x * x.size(0), True),
    "over": (lambda x: x / x.shape[0], True),
    "over numel": (lambda x: x / x.numel(), True),
    "plus": (lambda x: x + x.size(0), False),
    "from": (lambda x: x.size(0) - x, False),
    "power": (lambda x: (x.abs() + 1) ** x.size(0), False),
    "clamp": (lambda x: x.clamp(max=x.size(0) / 10), False),
    "weighted": (lambda x: torch.add(x, torch.ones_like(x[:, :1]), alpha=x.size(0)), False),
    "full": (lambda x: x + torch.full((8, 1, 1), x.size(0)), False),
    "full like": (lambda x: x + torch.full_like(x, x.size(0)), False),
}


@pytest.mark.parametrize("name", list(RUN_TIME))
@pytest.mark.parametrize("bias", [False, True], ids=["constant", "zero"])
def test_numbers_known_at_run_time_only(name: str, bias: bool) -> None:
    """A constant times a size is none: it differs from picture to picture.  Zero times a size is zero."""
    op, keeps_zero = RUN_TIME[name]
    found = check(sandwich(op, bias=bias), (X,), others=[OTHER])
    for outcome in found.values():
        kept = 5 if keeps_zero and bias else 8
        assert tuple(outcome.small.get_submodule("back").weight.shape) == (4, kept, 1, 1)


def test_a_number_of_channels_is_known() -> None:
    check(sandwich(lambda x: x / x.size(1)), (X,), others=[OTHER], kept=KEPT)


def test_padding_with_a_number_known_at_run_time() -> None:
    """By symbolic_trace only: torch.export writes the example's number into the graph."""
    model = sandwich(lambda x: F.pad(x, (1, 1, 1, 1), value=x.size(0)))
    found = check(model, (X,), others=[OTHER], routes=["symbolic"])
    assert tuple(found["symbolic"].small.get_submodule("back").weight.shape) == (4, 8, 1, 1)


class Shifted(nn.Module):
    """Rows without a weight whose bias a parameter takes away: 0 in the model, the parameter itself where rows are blank."""

    def __init__(self, dead: list[int]) -> None:
        super().__init__()
        self.front = randomized(nn.Linear(5, 6))
        kill(self.front, dead)
        self.shift = nn.Parameter(-self.front.bias.detach().clone())

    def forward(self, x: Tensor) -> Tensor:
        return self.front(x) + self.shift


def test_of_two_zeros_that_are_multiplied_one_stays_a_zero() -> None:
    """Softmax keeps the product's channels, though nothing of either factor varies there."""

    class Products(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.back = Shifted([1, 2]), Shifted([2, 3]), randomized(nn.Linear(6, 3))

        def forward(self, x: Tensor) -> Tensor:
            return self.back(torch.softmax(self.a(x) * self.b(x), -1))

    check(Products(), (torch.randn(4, 5),), kept={"back.weight": (3, 6)}, idempotent=False)


@pytest.mark.parametrize("op", [lambda a, b: a - b, torch.sub, lambda a, b: torch.rsub(b, a)])
def test_what_is_taken_from_zero_is_not_left_as_it_is(op: Callable[[Tensor, Tensor], Tensor]) -> None:
    class Difference(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.back = nn.Linear(5, 6), nn.Linear(5, 6), nn.Linear(6, 3)
            randomized(self)

        def forward(self, x: Tensor) -> Tensor:
            return self.back(op(self.a(x), self.b(x)))

    model = Difference()
    kill(model.a, range(6), bias=True)
    check(model, (torch.randn(4, 5),), kept={"b.weight": (6, 5), "back.weight": (3, 6)})


@pytest.mark.parametrize("is_read", [True, False])
def test_an_operand_that_is_left_out_beside_one_that_is_stored(is_read: bool) -> None:
    """max(h, 0 + h): the sum is h, and h is constant as far as anybody reads; one of both has to bring the batch."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc, self.zero, self.out = nn.Linear(5, 8), nn.Linear(5, 8), nn.Linear(8, 4)

        def forward(self, x: Tensor) -> Tensor:
            h = self.fc(x)
            return self.out(torch.maximum(h, self.zero(x) + h))

    model = randomized(Net())
    with torch.no_grad():
        for p in (*model.zero.parameters(), *(() if is_read else (model.out.weight,))):
            p.zero_()
    model.fc.weight.data[[1, 4]] = 0
    check(model, (torch.randn(3, 5),), kept={"fc.weight": (6, 5)} if is_read else {})
