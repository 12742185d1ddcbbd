"""Ops that read or make sizes: size, shape, numel, and tensors made from sizes alone (theory: Lemmas S1, S2)."""

from __future__ import annotations

import builtins
import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, fx

from srfx.ir.call import Call
from srfx.ir.editor import Expr, GraphEdit, Ref, Scaled, SizeOf
from srfx.ir.edits import FreezeSize
from srfx.ir.program import Param, Value
from srfx.lattice.constancy import Constancy
from srfx.lattice.movement import Fields, Shape
from srfx.ops.elementwise import _dtype
from srfx.ops.facts import Demand, FactTable, Labeller, Live
from srfx.ops.movement import Copy, _axis
from srfx.ops.permute import MatrixTranspose
from srfx.ops.registry import op_rule
from srfx.ops.rule import OpRule
from srfx.ops.sizes import resized

aten = torch.ops.aten


class ShapeRead(OpRule):
    """A number read from a shape.  It keeps its original value, whatever becomes of the axis."""

    def is_even(self, call: Call) -> bool:
        return True

    def label(self, call: Call, labels: Labeller) -> Fields:
        source = call.value("input")
        if source is not None and all(
            a in labels.of(source) for a in self.axes(call, len(call.shape(source)))
        ):
            labels.static.add(call.node)
        return {}

    def forward(self, call: Call, facts: FactTable) -> Constancy | tuple[Constancy, ...]:
        return Constancy.top(0) if not isinstance(call.output, Tensor) else super().forward(call, facts)

    def axes(self, call: Call, rank: int) -> list[int]:
        """Axes that are read."""
        dim = call.get("dim")
        return list(range(rank)) if dim is None else [_axis(dim, rank)]

    def backward(self, call: Call, live: Live, facts: FactTable) -> Demand:
        return {}

    def compact(self, call: Call, facts: FactTable) -> Iterable[GraphEdit]:
        source, node = call.value("input"), call["input"]
        if source is None:
            return []
        fields, shape = facts.fields(source), call.shape(source)
        axes = self.axes(call, len(shape))
        if not any(facts.changed(fields, a, shape[a]) for a in axes):
            return []
        return [FreezeSize(call.node.name, self.frozen(call, node, fields, shape, facts))]

    def frozen(self, call: Call, node: fx.Node, fields: Fields, shape: Shape, facts: FactTable) -> Expr:
        sizes = tuple(_original(node, a, fields, shape, facts) for a in self.axes(call, len(shape)))
        return sizes if call.get("dim") is None else sizes[0]


def _original(node: fx.Node, axis: int, fields: Fields, shape: Shape, facts: FactTable) -> Expr:
    """The size the axis had: a literal, or scaled up where channels repeat along an axis of changing size."""
    if not facts.changed(fields, axis, shape[axis]):
        return SizeOf(node.name, axis)
    labels = fields[axis].movedim(axis, -1).reshape(-1, shape[axis])[0]
    if labels.unique().numel() == shape[axis]:
        return shape[axis]
    count = facts.count(fields, axis)
    common = math.gcd(count, shape[axis])
    return Scaled(SizeOf(node.name, axis), shape[axis] // common, count // common) if count else shape[axis]


@op_rule("size", aten.sym_size.int, aten.sym_size.default, aten.size.int, aten.size.default)
class Size(ShapeRead):
    """x.size(), x.size(d)."""

    signature: tuple[str, ...] = ("input", "dim")


@op_rule(builtins.getattr)
class GetAttribute(ShapeRead):
    """x.shape, x.dtype, x.device, x.ndim: only the shape is affected by removed channels."""

    signature: tuple[str, ...] = ("input", "name")

    def axes(self, call: Call, rank: int) -> list[int]:
        return list(range(rank)) if call.get("name") == "shape" else []

    def label(self, call: Call, labels: Labeller) -> Fields:
        if isinstance(call.output, Tensor):
            return self.tensor_rule(call).label(call, labels)  # type: ignore[return-value]
        return super().label(call, labels)

    def forward(self, call: Call, facts: FactTable) -> Constancy | tuple[Constancy, ...]:
        return (
            self.tensor_rule(call).forward(call, facts)
            if isinstance(call.output, Tensor)
            else Constancy.top(0)
        )

    def backward(self, call: Call, live: Live, facts: FactTable) -> Demand:
        return self.tensor_rule(call).backward(call, live, facts) if isinstance(call.output, Tensor) else {}

    def tensor_rule(self, call: Call) -> OpRule:
        """x.mT and x.T move elements, x.data moves none; x.real and the like are not known."""
        rank = len(call.out_shape)
        if call.get("name") == "mT" or (call.get("name") in ("T", "H") and rank == 2):
            return MatrixTranspose()
        return Copy() if call.get("name") == "data" else OpRule()


@op_rule("numel", torch.numel, "nelement", aten.sym_numel.default, aten.numel.default)
class Numel(ShapeRead):
    """x.numel()."""

    def frozen(self, call: Call, node: fx.Node, fields: Fields, shape: Shape, facts: FactTable) -> Expr:
        count = math.prod(facts.count(fields, a) if a in fields else n for a, n in enumerate(shape))
        common = math.gcd(count, math.prod(shape))
        return Scaled(Ref(call.node.name), math.prod(shape) // common, count // common)


@op_rule("dim", "ndimension", "is_floating_point", torch.is_floating_point, torch.is_tensor, builtins.len, "get_device",
         "is_complex", torch.is_complex, math.sqrt, builtins.int, builtins.float, torch.sym_int, torch.sym_float,
         torch.sym_max, torch.sym_min, torch.sym_ite, torch.sym_sqrt, builtins.max, builtins.min, builtins.round,
         math.ceil, math.floor, math.prod, builtins.bool, builtins.isinstance)  # fmt: skip
class Scalar(OpRule):
    """Arithmetic on Python numbers, and questions whose answer no removed channel changes."""

    def label(self, call: Call, labels: Labeller) -> Fields:
        if any(isinstance(call.program.hints.get(n), Tensor) for n in call.node.all_input_nodes):
            if call.node.target in (builtins.int, builtins.float, builtins.bool, builtins.max, builtins.min):
                return OpRule.label(self, call, labels)  # type: ignore[return-value]
        elif not any(labels.is_dynamic(n) for n in call.node.all_input_nodes):
            labels.static.add(call.node)
        return {}

    def backward(self, call: Call, live: Live, facts: FactTable) -> Demand:
        return (
            OpRule.backward(self, call, live, facts)
            if call.node.target in (builtins.int, builtins.float)
            else {}
        )


# ------------------------------------------------------------------------------------------ creation
class Creation(OpRule):
    """A tensor made from sizes: channels of literal axes are free to go, axes of computed size are not followed."""

    signature: tuple[str, ...] = ("size", "fill_value")

    def sizes(self, call: Call) -> Any:
        return call["size"]

    def label(self, call: Call, labels: Labeller) -> Fields:
        like = call.value("input")
        if like is not None:
            labels.of(like)
        shape, raw = call.out_shape, self.sizes(call)
        if isinstance(raw, fx.Node):
            return {}
        return {
            a: labels.table.fresh(n).view([n if i == a else 1 for i in range(len(shape))])
            for a, n in enumerate(shape)
            if n > 1 and not isinstance(raw[a], fx.Node)
        }

    def forward(self, call: Call, facts: FactTable) -> Constancy:
        likes = {v: torch.zeros(call.shape(v), dtype=_dtype(call, v)) for v in call.values()}
        is_known = self.is_uniform and not facts.has_run_time_number(call.bound.get("fill_value"))
        value = call.run(likes) if is_known else None
        if value is None or value.is_complex() or not value.numel():
            return Constancy.top(len(call.out_shape))
        first = value.flatten()[:1].double().view((1,) * value.dim())
        return Constancy(torch.zeros_like(first, dtype=torch.bool), first)

    is_uniform = True

    def backward(self, call: Call, live: Live, facts: FactTable) -> Demand:
        return {}

    def reads(self, call: Call, facts: FactTable) -> list[Value]:
        return [v for v in call.values() if not isinstance(v, Param)]

    def compact(self, call: Call, facts: FactTable) -> Iterable[GraphEdit]:
        return resized(call, facts, "size", facts.fields(call.node), call.out_shape)


op_rule(
    aten.zeros.default,
    aten.ones.default,
    aten.full.default,
    (torch.zeros, "*size"),
    (torch.ones, "*size"),
    torch.full,
)(Creation)
op_rule(
    (aten.new_zeros.default, "input size"), (aten.new_ones.default, "input size"),
    (aten.new_full.default, "input size fill_value"), ("new_zeros", "input *size"), ("new_ones", "input *size"),
    ("new_full", "input size fill_value"),
)(Creation)  # fmt: skip


class ScalarTensor(Creation):
    """A number as a tensor without axes, as decompositions write the number of a `where`."""

    signature: tuple[str, ...] = ("fill_value",)

    def sizes(self, call: Call) -> Any:
        return ()

    def compact(self, call: Call, facts: FactTable) -> Iterable[GraphEdit]:
        return []


op_rule(torch.scalar_tensor, aten.scalar_tensor.default)(ScalarTensor)


class Positions(OpRule):
    """arange and kin: numbers that differ from position to position and carry no channels."""

    def label(self, call: Call, labels: Labeller) -> Fields:
        return {}

    def backward(self, call: Call, live: Live, facts: FactTable) -> Demand:
        return {}


op_rule(torch.arange, aten.arange.default, aten.arange.start, aten.arange.start_step, torch.linspace, aten.linspace.default,
        aten.eye.default, torch.eye, aten.empty.memory_format)(Positions)  # fmt: skip
