"""Norms that are spelled out: how the ops of an RMS norm or a layer norm over the last axis are recognised."""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from srfx.ir.plan import Edit, Reason, Refusal
from srfx.ir.program import Param, Program
from srfx.nn.layer_norm_forms import statistics_dtype
from srfx.ops.movement import Copy
from srfx.ops.registry import resolve
from srfx.passes._channels import holds_channels

aten = torch.ops.aten
_MUL = (operator.mul, torch.mul, "mul", aten.mul.Tensor)
_DIV = (operator.truediv, torch.div, "div", aten.div.Tensor)
_ADD = (operator.add, torch.add, "add", aten.add.Tensor, aten.add.Scalar)
_POW = (operator.pow, torch.pow, "pow", aten.pow.Tensor_Scalar)
_SQUARE = (torch.square, "square", aten.square.default)
_SUB = (operator.sub, torch.sub, "sub", aten.sub.Tensor)
_MEAN = (torch.mean, "mean", aten.mean.dim)
_VAR = (torch.var, "var", aten.var.correction, aten.var.dim)
_RSQRT = (torch.rsqrt, "rsqrt", aten.rsqrt.default)
_SQRT = (torch.sqrt, "sqrt", aten.sqrt.default)
_RECIPROCAL = (torch.reciprocal, "reciprocal", aten.reciprocal.default)


@dataclass(frozen=True)
class RaiseNorm(Edit):
    """The value of ``node`` is ``target`` of these arguments; nodes stand by name, as in ``(Named(x), 8)``."""

    target: Any
    args: tuple[Any, ...]


@dataclass(frozen=True)
class Named:
    """A node by its name."""

    name: str


def raised(node: fx.Node, target: Any, args: Sequence[Any]) -> RaiseNorm:
    return RaiseNorm(node.name, target, tuple(Named(a.name) if isinstance(a, fx.Node) else a for a in args))


@dataclass
class SpelledNorm:
    """Reads ``x * rsqrt(mean(x^2) + eps)`` or ``x / sqrt(..)`` around the given root, then the weight.

    Where x is y - mean(y), it is a layer norm of y, and a bias may follow the weight.
    """

    program: Program
    root: fx.Node
    divides: bool = False

    def found(self) -> RaiseNorm | Refusal | None:
        read, root = self._statistics(), root_power(self.root)
        if read is None or root is None or len(self.root.users) != 1:
            return None
        self.divides = root == 0.5
        user = next(iter(self.root.users))
        if self.divides and _inverts(user, self.root):
            self.root, self.divides = user, False
            user = next(iter(self.root.users), self.root)
            if _is(user, _MUL) and tuple(user.args) == (self.root, 1):  # as export writes 1 / root
                self.root = user
            if len(self.root.users) != 1:
                return None
        x, eps, is_centred = read
        core = next(iter(self.root.users))
        operand = self._scaled(core)
        if operand is None:
            return None
        y = self._centred(self._source(operand))
        if is_centred:
            if y is not x:
                return None
        elif self._source(operand) is not x and (y is None or y is not self._centred(x)):
            return None
        x = x if y is None else y
        width = self.program.shape(x)[-1]
        last, weight = self._scaled_by_parameter(core, width, _MUL)
        bias = None
        if y is not None:
            last, bias = self._scaled_by_parameter(last, width, _ADD)
        known = [v for v in (weight, bias) if v is not None]
        if not known and not holds_channels(self.program, x, len(self.program.shape(x)) - 1):
            return None
        if not self._is_native_precision(x, core, last, known):
            norm = "rms_norm" if y is None else "layer_norm"
            return Refusal(
                last.name, Reason.UNSUPPORTED_DTYPE, f"computed in another precision than {norm}'s"
            )
        if y is None:
            return raised(last, F.rms_norm, (x, (width,), weight, eps))
        return raised(last, F.layer_norm, (x, (width,), weight, bias, eps))

    def _statistics(self) -> tuple[fx.Node, float, bool] | None:
        """The operand and eps of sqrt(mean(x^2) + eps), or sqrt(var(x) + eps) and True."""
        total = self.root.args[0]
        if (
            not isinstance(total, fx.Node)
            or not _is(total, _ADD)
            or len(total.users) != 1
            or len(total.args) < 2
        ):
            return None
        a, b = total.args[:2]
        mean, eps = (a, b) if isinstance(a, fx.Node) else (b, a)
        if (
            not isinstance(mean, fx.Node)
            or isinstance(eps, (fx.Node, bool))
            or not isinstance(eps, (int, float))
        ):
            return None
        if total.kwargs or not math.isfinite(eps):
            return None
        if _is(mean, _VAR) and isinstance(mean.args[0], fx.Node) and self._is_biased_variance(mean):
            return self._source(mean.args[0]), float(eps), True
        if not self._is_mean_over_last(mean):
            return None
        square = mean.args[0]
        source = _squared(square) if isinstance(square, fx.Node) else None
        return (self._source(source), float(eps), False) if source is not None else None

    def _centred(self, node: fx.Node) -> fx.Node | None:
        """Y of y - mean(y) over the last axis."""
        if not _is(node, _SUB) or len(node.args) != 2 or node.kwargs:
            return None
        y, mean = node.args
        if not isinstance(y, fx.Node) or not isinstance(mean, fx.Node) or not self._is_mean_over_last(mean):
            return None
        y = self._source(y)
        inner = mean.args[0]
        return y if isinstance(inner, fx.Node) and self._source(inner) is y else None

    def _is_biased_variance(self, node: fx.Node) -> bool:
        """Whether a variance over the last axis divides by all, and keeps the axis."""
        rank = len(self.program.shape(node.args[0]))  # type: ignore[arg-type]
        bound = {**dict(zip(("input", "dim"), node.args, strict=False)), **node.kwargs}
        names = ("unbiased", "keepdim") if len(node.args) > 2 else ()
        bound.update(zip(names, node.args[2:], strict=False))
        dims = [bound.get("dim")] if isinstance(bound.get("dim"), int) else bound.get("dim")
        is_biased = bound.get("unbiased") is False or bound.get("correction") == 0
        known = {"input", "dim", "unbiased", "correction", "keepdim"}
        is_last = isinstance(dims, (list, tuple)) and list(dims) in ([-1], [rank - 1])
        return is_last and bool(is_biased) and bound.get("keepdim") is True and set(bound) <= known

    def _is_mean_over_last(self, node: fx.Node) -> bool:
        if not _is(node, _MEAN) or not isinstance(node.args[0], fx.Node):
            return False
        rank = len(self.program.shape(node.args[0]))
        bound = {**dict(zip(("input", "dim", "keepdim"), node.args, strict=False)), **node.kwargs}
        dim, keep = bound.get("dim"), bound.get("keepdim", False)
        dims = [dim] if isinstance(dim, int) else dim
        is_last = isinstance(dims, (list, tuple)) and list(dims) in ([-1], [rank - 1])
        return is_last and keep is True and set(bound) <= {"input", "dim", "keepdim"}

    def _source(self, node: fx.Node) -> fx.Node:
        """What a chain of casts casts."""
        while node.op.startswith("call") and self.program.is_tensor(node):
            rule, call = resolve(node, self.program)
            before = call.bound.get("input")
            if (
                not isinstance(rule, Copy)
                or not isinstance(before, fx.Node)
                or not self._is_cast(before, node)
            ):
                return node
            node = before
        return node

    def _is_cast(self, before: fx.Node, after: fx.Node) -> bool:
        """Whether nothing but the dtype changes, if that: not the device, not what has a gradient."""
        a, b = self.program.hints.get(before), self.program.hints.get(after)
        is_detached = after.target in ("detach", torch.detach, aten.detach.default, "requires_grad_")
        if is_detached or not isinstance(a, Tensor) or not isinstance(b, Tensor):
            return False
        alike = a.shape == b.shape and a.device == b.device
        return alike and a.is_floating_point() and b.is_floating_point()

    def _scaled(self, core: fx.Node) -> fx.Node | None:
        """The other factor of the product with the root, or what the root divides."""
        if len(core.args) != 2 or core.kwargs:
            return None
        a, b = core.args
        if self.divides:
            return a if _is(core, _DIV) and b is self.root and isinstance(a, fx.Node) else None
        if not _is(core, _MUL):
            return None
        other = b if a is self.root else a
        return other if isinstance(other, fx.Node) and other is not self.root else None

    def _scaled_by_parameter(
        self, core: fx.Node, width: int, op: tuple[Any, ...]
    ) -> tuple[fx.Node, fx.Node | None]:
        """The product with the weight (sum with the bias), and that; (core, None) when there is none."""
        node = core
        while len(node.users) == 1:
            user = next(iter(node.users))
            if (
                user.op.startswith("call")
                and self.program.is_tensor(user)
                and self._source(user) is self._source(node)
            ):
                node = user
                continue
            if not _is(user, op) or len(user.args) != 2 or user.kwargs:
                break
            other = user.args[1] if user.args[0] is node else user.args[0]
            value = self.program.value(other) if isinstance(other, fx.Node) else None
            if isinstance(other, fx.Node) and isinstance(value, Param) and value.shape == (width,):
                return self._cast_behind(user), other
            break
        return core, None

    def _cast_behind(self, node: fx.Node) -> fx.Node:
        """The last of the casts behind the product with the weight (Gemma casts back there)."""
        while len(node.users) == 1:
            user = next(iter(node.users))
            if (
                not user.op.startswith("call")
                or not self.program.is_tensor(user)
                or self._source(user) is not self._source(node)
            ):
                break
            node = user
        return node

    def _is_native_precision(self, x: fx.Node, core: fx.Node, last: fx.Node, stored: list[fx.Node]) -> bool:
        """Whether the one op computes at least as precisely, and returns the same dtype."""
        dtype = self.program.hints[x].dtype
        computed = {self.program.hints[n].dtype for n in (self.root, core)}
        return (
            all(self.program.hints[v].dtype == dtype for v in stored)
            and computed <= {dtype, statistics_dtype(dtype)}
            and self.program.hints[last].dtype == dtype
        )


def _is(node: fx.Node, targets: tuple[Any, ...]) -> bool:
    return node.op in ("call_function", "call_method") and node.target in targets


def root_power(node: fx.Node) -> float | None:
    """0.5 for a square root, -0.5 for the inverse of one; None for anything else."""
    if _is(node, _SQRT + _RSQRT) and len(node.args) == 1 and not node.kwargs:
        return 0.5 if _is(node, _SQRT) else -0.5
    if _is(node, _POW) and len(node.args) == 2 and not node.kwargs and node.args[1] in (0.5, -0.5):
        return float(node.args[1])  # type: ignore[arg-type]
    return None


def _inverts(node: fx.Node, root: fx.Node) -> bool:
    """Whether this is 1 / root."""
    if node.kwargs:
        return False
    if _is(node, _DIV):
        return len(node.args) == 2 and node.args[1] is root and bool(node.args[0] == 1)
    if _is(node, _POW):
        return tuple(node.args) == (root, -1)
    return _is(node, _RECIPROCAL) and tuple(node.args) == (root,)


def _squared(node: fx.Node) -> fx.Node | None:
    """X of x^2, pow or product."""
    if (
        _is(node, _SQUARE)
        or (_is(node, _POW) and len(node.args) == 2 and node.args[1] == 2 and not node.kwargs)
        or (_is(node, _MUL) and len(node.args) == 2 and node.args[0] is node.args[1])
    ):
        found = node.args[0]
    else:
        return None
    return found if isinstance(found, fx.Node) else None
