"""Which ops are elementwise: the names, and every spelling of them."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from srfx.ops.activation import PReLU, Random, RandomShift, RandomSlope
from srfx.ops.elementwise import Choice, Elementwise, Fill, Partial, Product, Quotient, SignedZero, Sum
from srfx.ops.registry import has_rule, op_rule

aten = torch.ops.aten


TOTAL = [
    "abs",
    "relu",
    "relu6",
    "elu",
    "selu",
    "celu",
    "gelu",
    "silu",
    "mish",
    "sigmoid",
    "tanh",
    "softplus",
    "softsign",
    "hardtanh",
    "hardswish",
    "hardsigmoid",
    "hardshrink",
    "softshrink",
    "tanhshrink",
    "threshold",
    "leaky_relu",
    "logsigmoid",
    "log_sigmoid",
    "sign",
    "sgn",
    "neg",
    "negative",
    "ceil",
    "floor",
    "round",
    "trunc",
    "fix",
    "frac",
    "clamp",
    "clamp_min",
    "clamp_max",
    "clip",
    "cos",
    "sin",
    "atan",
    "arctan",
    "erf",
    "erfc",
    "sinc",
    "asinh",
    "arcsinh",
    "square",
    "deg2rad",
    "rad2deg",
    "maximum",
    "minimum",
    "fmax",
    "fmin",
    "max",
    "min",
    "eq",
    "ne",
    "lt",
    "le",
    "gt",
    "ge",
    "equal",
    "greater",
    "less",
    "greater_equal",
    "less_equal",
    "not_equal",
    "logical_and",
    "logical_or",
    "logical_not",
    "logical_xor",
    "bitwise_and",
    "bitwise_or",
    "bitwise_not",
    "bitwise_xor",
    "isnan",
    "isinf",
    "isfinite",
    "isposinf",
    "isneginf",
    "nan_to_num",
    "hypot",
    "logaddexp",
    "logaddexp2",
    "heaviside",
    "lerp",
    "addcmul",
    "rsub",
    "__and__",
    "__or__",
    "__xor__",
    "__invert__",
    "i0",
    "special_expit",
    "expit",
    "special_erf",
    "special_erfc",
    "special_sinc",
    "special_round",
    "sinc",
    "erfcx",
    "special_erfcx",
    "angle",
    "gcd",
    "lcm",
    "bitwise_left_shift",
    "bitwise_right_shift",
]


PARTIAL = [
    "log",
    "log2",
    "log10",
    "log1p",
    "sqrt",
    "rsqrt",
    "reciprocal",
    "floor_divide",
    "pow",
    "float_power",
    "exp",
    "exp2",
    "expm1",
    "sinh",
    "cosh",
    "tan",
    "asin",
    "acos",
    "arcsin",
    "arccos",
    "acosh",
    "arccosh",
    "atanh",
    "arctanh",
    "lgamma",
    "digamma",
    "logit",
    "erfinv",
    "fmod",
    "remainder",
    "xlogy",
    "addcdiv",
    "mvlgamma",
    "polygamma",
    "nextafter",
    "igamma",
    "igammac",
    "ldexp",
]


SPECIAL = [
    "airy_ai",
    "entr",
    "i0e",
    "i1",
    "i1e",
    "bessel_j0",
    "bessel_j1",
    "bessel_y0",
    "bessel_y1",
    "modified_bessel_i0",
    "modified_bessel_i1",
    "modified_bessel_k0",
    "modified_bessel_k1",
    "scaled_modified_bessel_k0",
    "scaled_modified_bessel_k1",
    "spherical_bessel_j0",
    "log_ndtr",
    "ndtri",
    "ndtr",
    "zeta",
    "xlog1py",
    "gammaln",
    "gammainc",
    "gammaincc",
    "psi",
    "multigammaln",
    "exp2",
    "expm1",
    "log1p",
]


"""Names in torch.special; aten spells them with the prefix ``special_``."""


MODULES: tuple[type[nn.Module], ...] = (
    nn.ReLU, nn.ReLU6, nn.ELU, nn.SELU, nn.CELU, nn.GELU, nn.SiLU, nn.Mish, nn.Sigmoid, nn.Tanh, nn.Softplus, nn.Softsign,
    nn.Hardtanh, nn.Hardswish, nn.Hardsigmoid, nn.Hardshrink, nn.Softshrink, nn.Tanhshrink, nn.Threshold, nn.LeakyReLU,
    nn.LogSigmoid,
)  # fmt: skip


OPERATORS: dict[str, tuple[Callable[..., Any], ...]] = {
    "total": (operator.neg, operator.pos, operator.abs, operator.eq, operator.ne, operator.lt, operator.le, operator.gt, operator.ge,
              operator.and_, operator.or_, operator.xor, operator.invert, operator.not_),
    "partial": (operator.floordiv, operator.mod, operator.pow),
}  # fmt: skip


def spellings(name: str) -> Iterator[Any]:
    """Every target that spells the op ``name``: functions, the method, its ATen overloads."""
    seen: list[Any] = []
    for home in (torch, F, torch.special):
        target = getattr(home, name, None)
        if callable(target) and not isinstance(target, type):
            seen.append(target)
    if hasattr(Tensor, name):
        seen.append(name)
    packet = getattr(aten, name, None)
    if packet is not None:
        seen += [getattr(packet, o) for o in packet.overloads() if "out" not in o]
    for target in dict.fromkeys(seen):
        if not has_rule(target) and not _reduces(target):
            yield target


def _reduces(target: Any) -> bool:
    """Max and min of one tensor reduce; only their two-operand forms are elementwise."""
    if isinstance(target, torch._ops.OpOverload):
        return target in (aten.max.default, aten.max.dim, aten.min.default, aten.min.dim)
    return target in (torch.max, torch.min, "max", "min")


def _register() -> None:
    op_rule(*(t for n in ("mul", "multiply") for t in spellings(n)), operator.mul)(Product)
    op_rule(*spellings("add"), operator.add)(Sum)
    op_rule(*(t for n in ("sub", "subtract") for t in spellings(n)), operator.sub, subtracts=True)(Sum)
    fills = ("zeros_like", "ones_like", "full_like")
    op_rule(*(t for n in fills for t in spellings(n)))(Fill)
    noisy = ("dropout", "feature_dropout", "dropout1d", "dropout2d", "dropout3d")
    modules = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d)
    op_rule(*(t for n in noisy for t in spellings(n)), *modules, signature=("input", "p", "training"))(Random)
    shifting = [t for n in ("alpha_dropout", "feature_alpha_dropout") for t in spellings(n)]
    shifting += [nn.AlphaDropout, nn.FeatureAlphaDropout]
    op_rule(*shifting, signature=("input", "p", "training"))(RandomShift)
    op_rule(*(t for n in ("signbit", "copysign", "atan2", "arctan2") for t in spellings(n)))(SignedZero)
    quotients = [t for n in ("div", "divide", "true_divide") for t in spellings(n)]
    op_rule(*quotients, operator.truediv)(Quotient)
    op_rule(*(t for t in spellings("where") if t != "where"), ("where", "input condition other"))(Choice)
    masked = (
        t if isinstance(t, torch._ops.OpOverload) else (t, "input condition value")
        for t in spellings("masked_fill")
    )
    op_rule(*masked)(Choice)
    for name in TOTAL:
        op_rule(*spellings(name))(Elementwise)
    for name in PARTIAL:
        op_rule(*spellings(name))(Partial)
    op_rule(nn.RReLU, *spellings("rrelu"))(RandomSlope)
    op_rule(nn.PReLU, *spellings("prelu"))(PReLU)
    op_rule(aten._prelu_kernel.default)(Elementwise)
    for name in SPECIAL:
        op_rule(*spellings(f"special_{name}"), *spellings(name))(Partial)
    op_rule(*MODULES, *OPERATORS["total"])(Elementwise)
    op_rule(*OPERATORS["partial"])(Partial)


_register()
