"""Write norms that are spelled by other ops as the one op they are.

1. native      native_layer_norm(x, ..)[0]                            ->  layer_norm(x, ..)
               native_group_norm(x, w, b, N, C, HxW, G, eps)[0]       ->  group_norm(x, G, w, b, eps)
               view, _native_batch_norm_legit, view                   ->  instance_norm(x, ..)   (`_instance_norm`)
2. RMS norm    x * rsqrt(mean(x^2, -1) + eps), then times a weight    ->  rms_norm(x, [C], weight, eps)

Decomposed exports spell norms the first way, language models the second.  Spelled out, a channel that is a
constant other than 0 varies as soon as it is multiplied by the varying 1/rms, and stays; as one op it goes, and
linear readers take 1/rms in its place.  Casts in between are dropped where rms_norm makes them itself (it
computes at least in float32).                                                          [exact in real arithmetic]
"""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from srfx.ir.aliases import mutation_barriers
from srfx.ir.dead_code import remove_dead_nodes
from srfx.ir.plan import Edit, Plan, Reason, Refusal
from srfx.ir.program import Param, Program
from srfx.ir.shapes import hint_inputs, propagate
from srfx.nn.layer_norm_forms import statistics_dtype
from srfx.ops.movement import Copy
from srfx.ops.registry import resolve
from srfx.passes import _instance_norm
from srfx.passes._channels import holds_channels
from srfx.passes.base import Pass, register_pass

aten = torch.ops.aten
_NATIVE = {
    torch.native_layer_norm: aten.layer_norm.default,
    aten.native_layer_norm.default: aten.layer_norm.default,
    torch.native_group_norm: aten.group_norm.default,
    aten.native_group_norm.default: aten.group_norm.default,
}
_MUL = (operator.mul, torch.mul, "mul", aten.mul.Tensor)
_DIV = (operator.truediv, torch.div, "div", aten.div.Tensor)
_ADD = (operator.add, torch.add, "add", aten.add.Tensor, aten.add.Scalar)
_POW = (operator.pow, torch.pow, "pow", aten.pow.Tensor_Scalar)
_SQUARE = (torch.square, "square", aten.square.default)
_MEAN = (torch.mean, "mean", aten.mean.dim)
_RSQRT = (torch.rsqrt, "rsqrt", aten.rsqrt.default)
_SQRT = (torch.sqrt, "sqrt", aten.sqrt.default)


@dataclass(frozen=True)
class RaiseNorm(Edit):
    """The value of ``node`` is ``target`` of these arguments; nodes stand by name, as in ``(Named(x), 8)``."""

    target: Any
    args: tuple[Any, ...]


@dataclass(frozen=True)
class Named:
    """A node by its name."""

    name: str


@register_pass("raise-norms")
class RaiseNorms(Pass):
    """Turn native norms and spelled-out RMS norms into layer_norm, group_norm, instance_norm and rms_norm.

    An RMS norm has to run over the last axis, which has to be as long as its weight or to come from the rows of
    another one, so that its size is the same at every call.

    Args:
        hints: one example or fake value for each placeholder; None takes metadata or probes.

    Refuses: OTHER_READERS when the statistics of a native norm are read too; UNSUPPORTED_DTYPE when an RMS norm
        is computed in less precision than its operand has, or its weight has another dtype; MUTATION when
        storage is written in place.
    """

    takes_hints: ClassVar[bool] = True

    def __init__(self, hints: Sequence[Any] | None = None) -> None:
        self.hints = hints
        self._raised: dict[
            str, fx.Node
        ] = {}  # by the name of what they replaced: a norm may read another one

    def plan(self, gm: fx.GraphModule) -> Plan:
        """Every norm, in graph order; propagates shapes only where there is a candidate."""
        spelled = (*_NATIVE, *_instance_norm.NATIVE)
        candidates = [n for n in gm.graph.nodes if n.target in spelled or _is(n, _RSQRT + _SQRT)]
        plan = Plan()
        if not candidates:
            return plan
        hints = self.hints if self.hints is not None else hint_inputs(gm)
        program, barred = Program(gm, propagate(gm, hints)), mutation_barriers(gm)
        for node in candidates:
            if node.target in _NATIVE:
                found = _native(node)
            else:
                is_batch = node.target in _instance_norm.NATIVE
                found = _instance(program, node) if is_batch else _RMS(program, node).found()
            if isinstance(found, Refusal):
                plan.refusals.append(found)
            elif found is not None and not barred.isdisjoint([node]):
                plan.refusals.append(Refusal(found.node, Reason.MUTATION))
            elif found is not None:
                plan.edits.append(found)
        return plan

    def apply(self, gm: fx.GraphModule, edit: Edit) -> None:
        """Replace one norm."""
        assert isinstance(edit, RaiseNorm)
        nodes = {n.name: n for n in gm.graph.nodes} | self._raised
        old = nodes[edit.node]
        args = tuple(nodes[a.name] if isinstance(a, Named) else a for a in edit.args)
        with gm.graph.inserting_before(old):
            new = gm.graph.call_function(edit.target, args)
        new.meta = dict(old.meta)
        old.replace_all_uses_with(new)
        gm.graph.erase_node(old)
        self._raised[edit.node] = new

    def finish(self, gm: fx.GraphModule) -> None:
        """Remove what spelled the norms."""
        self._raised = {}
        remove_dead_nodes(gm)


def _native(node: fx.Node) -> RaiseNorm | Refusal | None:
    readers = [u for u in node.users if u.users or u.op == "output"]
    if not readers:
        return None
    if any(u.target is not operator.getitem or u.args[1] != 0 for u in readers) or len(readers) > 1:
        return Refusal(node.name, Reason.OTHER_READERS, "mean and 1/std are read")
    if node.kwargs:
        return Refusal(node.name, Reason.UNRECOGNISED_CALL)
    target, args = _NATIVE[node.target], tuple(node.args)
    if target is aten.group_norm.default:
        x, weight, bias, _, _, _, groups, eps = args
        args = (x, groups, weight, bias, eps)
    return _raised(readers[0], target, args)


def _instance(program: Program, node: fx.Node) -> RaiseNorm | None:
    found = _instance_norm.instance_norm(program, node)
    return None if found is None else _raised(found[0], _instance_norm.TARGET, found[1])


def _raised(node: fx.Node, target: Any, args: Sequence[Any]) -> RaiseNorm:
    return RaiseNorm(node.name, target, tuple(Named(a.name) if isinstance(a, fx.Node) else a for a in args))


@dataclass
class _RMS:
    """Reads ``x * rsqrt(mean(x^2) + eps)`` or ``x / sqrt(..)`` around the given root, then the weight."""

    program: Program
    root: fx.Node

    def found(self) -> RaiseNorm | Refusal | None:
        read = self._statistics()
        if read is None or len(self.root.users) != 1:
            return None
        x, eps = read
        core = next(iter(self.root.users))
        operand = self._scaled(core)
        if operand is None or self._source(operand) is not x:
            return None
        width = self.program.shape(x)[-1]
        last, weight = self._weighted(core, width)
        if weight is None and not holds_channels(self.program, x, len(self.program.shape(x)) - 1):
            return None
        if not self._is_native_precision(x, core, last, weight):
            return Refusal(
                last.name, Reason.UNSUPPORTED_DTYPE, "computed in another precision than rms_norm's"
            )
        named = Named(weight.name) if weight is not None else None
        return RaiseNorm(last.name, F.rms_norm, (Named(x.name), (width,), named, eps))

    def _statistics(self) -> tuple[fx.Node, float] | None:
        """The operand and eps of sqrt(mean(x^2) + eps)."""
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
        if total.kwargs or not math.isfinite(eps) or not self._is_mean_over_last(mean):
            return None
        square = mean.args[0]
        source = _squared(square) if isinstance(square, fx.Node) else None
        return (self._source(source), float(eps)) if source is not None else None

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
        if _is(self.root, _SQRT):
            return a if _is(core, _DIV) and b is self.root and isinstance(a, fx.Node) else None
        if not _is(core, _MUL):
            return None
        other = b if a is self.root else a
        return other if isinstance(other, fx.Node) and other is not self.root else None

    def _weighted(self, core: fx.Node, width: int) -> tuple[fx.Node, fx.Node | None]:
        """The product with the weight, and the weight; (core, None) when there is none."""
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
            if not _is(user, _MUL) or len(user.args) != 2 or user.kwargs:
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

    def _is_native_precision(self, x: fx.Node, core: fx.Node, last: fx.Node, weight: fx.Node | None) -> bool:
        """Whether rms_norm computes at least as precisely, and returns the same dtype."""
        dtype = self.program.hints[x].dtype
        computed = {self.program.hints[n].dtype for n in (self.root, core)}
        is_known = weight is None or self.program.hints[weight].dtype == dtype
        return (
            is_known
            and computed <= {dtype, statistics_dtype(dtype)}
            and self.program.hints[last].dtype == dtype
        )


def _is(node: fx.Node, targets: tuple[Any, ...]) -> bool:
    return node.op in ("call_function", "call_method") and node.target in targets


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
