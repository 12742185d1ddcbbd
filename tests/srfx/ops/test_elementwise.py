"""Elementwise ops in every spelling: what passes through them, what they absorb, what they refuse."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from srfx.ir.plan import Reason
from tests.helpers import Sandwich, check, kill, masked, randomized

X = torch.randn(2, 3, 5, 6)
OTHER = (torch.randn(3, 3, 7, 4),)


def sandwich(op: Callable[[Any], Any], *, bias: bool = False) -> nn.Module:
    """Three of eight channels are constant in front of ``op``."""
    model = randomized(Sandwich(nn.Conv2d(3, 8, 1), op, nn.Conv2d(8, 4, 1)))
    kill(model.front, [0, 3, 7], bias=bias)
    return model


KEPT = {"front.weight": (5, 3, 1, 1), "front.bias": (5,), "back.weight": (4, 5, 1, 1), "back.bias": (4,)}

FUNCTIONS: list[Callable[[Tensor], Tensor]] = [
    torch.abs,
    torch.relu,
    F.relu,
    F.relu6,
    F.elu,
    F.selu,
    F.celu,
    F.gelu,
    F.silu,
    F.mish,
    torch.sigmoid,
    F.sigmoid,
    torch.tanh,
    F.tanh,
    F.softplus,
    F.softsign,
    F.hardtanh,
    F.hardswish,
    F.hardsigmoid,
    F.hardshrink,
    F.softshrink,
    F.tanhshrink,
    F.leaky_relu,
    F.logsigmoid,
    torch.sign,
    torch.sgn,
    torch.neg,
    torch.negative,
    torch.ceil,
    torch.floor,
    torch.round,
    torch.trunc,
    torch.fix,
    torch.frac,
    torch.cos,
    torch.sin,
    torch.atan,
    torch.arctan,
    torch.erf,
    torch.erfc,
    torch.sinc,
    torch.asinh,
    torch.square,
    torch.deg2rad,
    torch.rad2deg,
    torch.nan_to_num,
    torch.positive,
    torch.special.expit,
    torch.special.erf,
]
WITH_ARGUMENTS: list[Callable[[Tensor], Tensor]] = [
    lambda x: F.threshold(x, 0.1, 0.7),
    lambda x: torch.clamp(x, -0.5, 0.5),
    lambda x: torch.clamp(x, min=0.1),
    lambda x: x.clamp_min(0.2),
    lambda x: x.clamp_max(0.4),
    lambda x: torch.clip(x, -0.3, 0.3),
    lambda x: x + 1,
    lambda x: 1 + x,
    lambda x: x - 0.5,
    lambda x: 0.5 - x,
    lambda x: x * 2,
    lambda x: 2 * x,
    lambda x: x / 3,
    lambda x: torch.add(x, 1.5, alpha=2),
    lambda x: torch.sub(x, 1.5, alpha=2),
    lambda x: torch.rsub(x, 1.5),
    lambda x: torch.mul(x, 3),
    lambda x: torch.div(x, 3),
    lambda x: torch.div(x, 3, rounding_mode="floor"),
    lambda x: -x,
    lambda x: +x,
    lambda x: abs(x),
    lambda x: F.elu(x, alpha=0.5),
    lambda x: F.leaky_relu(x, 0.3),
    lambda x: F.hardtanh(x, -0.2, 0.2),
    lambda x: F.gelu(x, approximate="tanh"),
    lambda x: F.softplus(x, 2.0, 3.0),
    lambda x: x.masked_fill(x > 0.2, 0.3),
    lambda x: torch.where(x > 0, x, -0.1 * x),
    lambda x: x.pow(2),
    lambda x: x**3,
    lambda x: torch.maximum(x, torch.zeros_like(x)),
    lambda x: x.square() + torch.ones_like(x),
    lambda x: torch.lerp(x, x * x, 0.25),
    lambda x: torch.addcmul(x, x, x, value=0.5),
    lambda x: x.float().to(x.dtype),
    lambda x: (x > 0).to(x.dtype),
    lambda x: (x >= 0).type_as(x),
    lambda x: torch.logical_and(x > 0, x < 1).to(x.dtype),
    lambda x: (x == x).to(x.dtype) + (x != x).to(x.dtype),
    lambda x: F.rrelu(x, training=False),
    lambda x: torch.atan2(x, x + 2),
    lambda x: torch.hypot(x, x),
    lambda x: torch.copysign(x, -x),
    lambda x: torch.logaddexp(x, x),
    lambda x: ((x > 0) & (x < 1)).to(x.dtype),
    lambda x: (~(x > 0)).to(x.dtype),
    lambda x: torch.heaviside(x, x),
    lambda x: torch.full_like(x, 2.0) * x,
]
PARTIAL: list[Callable[[Tensor], Tensor]] = [
    lambda x: torch.log(x.abs() + 1),
    lambda x: torch.log2(x.abs() + 1),
    lambda x: torch.log10(x * x + 1),
    lambda x: torch.log1p(x * x),
    lambda x: torch.sqrt(x * x + 1),
    lambda x: torch.rsqrt(x * x + 1),
    lambda x: torch.exp(x),
    lambda x: torch.exp2(x),
    lambda x: torch.expm1(x),
    lambda x: torch.sinh(x),
    lambda x: torch.cosh(x),
    lambda x: torch.tan(x * 0.1),
    lambda x: torch.asin(torch.tanh(x)),
    lambda x: torch.acos(torch.tanh(x)),
    lambda x: torch.acosh(x * x + 2),
    lambda x: torch.atanh(torch.tanh(x) * 0.5),
    lambda x: 1 / (x * x + 1),
    lambda x: (x * x + 1).reciprocal(),
    lambda x: torch.float_power(x * x + 1, 0.5),
    lambda x: torch.fmod(x, 0.7),
    lambda x: torch.remainder(x, 0.7),
    lambda x: x % 0.7,
    lambda x: x // 0.7,
    lambda x: torch.logit(torch.sigmoid(x)),
    lambda x: torch.xlogy(x, x * x + 1),
    lambda x: torch.addcdiv(x, x, x * x + 1),
    lambda x: (x * x + 1) ** -0.5,
    lambda x: torch.erfinv(torch.tanh(x) * 0.5),
    lambda x: torch.lgamma(x * x + 1),
    lambda x: torch.pow(2.0, x),
]
METHODS = [
    "abs",
    "relu",
    "sigmoid",
    "tanh",
    "sign",
    "neg",
    "ceil",
    "floor",
    "round",
    "trunc",
    "frac",
    "cos",
    "sin",
    "atan",
    "erf",
    "square",
    "exp",
    "expm1",
    "sinh",
    "cosh",
    "nan_to_num",
    "clone",
    "contiguous",
    "detach",
]
MODULES = [
    nn.ReLU(),
    nn.ReLU(inplace=True),
    nn.ReLU6(),
    nn.ELU(),
    nn.SELU(),
    nn.CELU(),
    nn.GELU(),
    nn.SiLU(),
    nn.Mish(),
    nn.Sigmoid(),
    nn.Tanh(),
    nn.Softplus(),
    nn.Softsign(),
    nn.Hardtanh(),
    nn.Hardswish(),
    nn.Hardsigmoid(),
    nn.Hardshrink(),
    nn.Softshrink(),
    nn.Tanhshrink(),
    nn.Threshold(0.1, 0.3),
    nn.LeakyReLU(0.2),
    nn.LogSigmoid(),
    nn.RReLU(),
    nn.Dropout(),
    nn.Dropout2d(),
    nn.AlphaDropout(),
    nn.Identity(),
    nn.PReLU(),
    nn.PReLU(8),
]


def chunks(ops: list[Any], n: int = 10) -> list[list[Any]]:
    return [ops[i : i + n] for i in range(0, len(ops), n)]


class Total(nn.Module):
    """The sum of several ops of one value: a single barrier among them would keep every channel."""

    def __init__(self, ops: list[Callable[[Tensor], Tensor]]) -> None:
        super().__init__()
        self.modules_ = nn.ModuleList(op for op in ops if isinstance(op, nn.Module))
        self.others = [op for op in ops if not isinstance(op, nn.Module)]

    def forward(self, x: Tensor) -> Tensor:
        parts = [op(x) for op in (*self.others, *self.modules_)]
        total = parts[0]
        for part in parts[1:]:
            total = total + part
        return total


@pytest.mark.parametrize("ops", chunks(FUNCTIONS) + chunks(WITH_ARGUMENTS) + chunks(PARTIAL))
def test_functions_pass_constants_and_drop_dead_channels(ops: list[Callable[[Tensor], Tensor]]) -> None:
    check(sandwich(Total(ops)), (X,), others=[OTHER], kept=KEPT)


@pytest.mark.parametrize("names", chunks(METHODS, 12))
def test_methods(names: list[str]) -> None:
    check(sandwich(Total([operator.methodcaller(n) for n in names])), (X,), kept=KEPT)


@pytest.mark.parametrize("modules", chunks(MODULES, 8))
def test_modules(modules: list[nn.Module]) -> None:
    found = check(sandwich(nn.Sequential(*modules)), (X,), others=[OTHER], kept=KEPT)
    assert not any(Reason.UNKNOWN_OP in o.reasons for o in found.values())


@pytest.mark.parametrize(
    "op",
    [
        F.relu_,
        torch.relu_,
        lambda x: x.add_(1),
        lambda x: x.mul_(2).sigmoid_(),
        lambda x: F.relu(x, inplace=True),
        lambda x: operator.iadd(x, 1),
    ],
)
def test_in_place(op: Callable[[Tensor], Tensor]) -> None:
    check(sandwich(op), (X,), kept=KEPT)


def test_sigmoid_of_a_zero_channel_is_one_half() -> None:
    """The dead row has no bias, so a tool that takes it for zero is wrong by W * 0.5."""
    for op in (torch.sigmoid, F.hardsigmoid, lambda x: torch.cos(x)):
        check(sandwich(op, bias=True), (X,), kept=KEPT)


# ---------------------------------------------------------------------------------------- PReLU
@pytest.mark.parametrize("n", [1, 8])
@pytest.mark.parametrize("spelling", ["module", "function", "torch"])
def test_prelu(n: int, spelling: str) -> None:
    class Functional(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.rand(n))

        def forward(self, x: Tensor) -> Tensor:
            return (F.prelu if spelling == "function" else torch.prelu)(x, self.weight)

    model = sandwich(nn.PReLU(n) if spelling == "module" else Functional())
    check(model, (X,), others=[OTHER], kept={**KEPT, "op.weight": (1 if n == 1 else 5,)})


def test_prelu_of_a_matrix_and_of_a_single_channel_value() -> None:
    model = randomized(nn.Sequential(nn.Linear(5, 8), nn.PReLU(8), nn.Linear(8, 3)))
    check(kill(model[0], [2, 5]) and model, (torch.randn(4, 5),), kept={"0.weight": (6, 5), "1.weight": (6,)})
    single = randomized(nn.Sequential(nn.Conv1d(2, 1, 3), nn.PReLU(1), nn.Conv1d(1, 2, 1)))
    check(single, (torch.randn(2, 2, 9),), kept={"1.weight": (1,)})


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
