"""Every spelling of the elementwise ops: constants pass through them and dead channels go."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from srfx.ir.plan import Reason
from tests.helpers import Sandwich, check, kill, randomized

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
