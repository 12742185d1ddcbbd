"""Elementwise rules, of any number of operands, with broadcasting (theory: Lemmas E1 to E5)."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, fx

from srfx.ir.call import Call
from srfx.ir.editor import GraphEdit, take
from srfx.ir.edits import Bypass, PickFromTable, ReplaceOperand
from srfx.ir.plan import Reason
from srfx.ir.program import Value
from srfx.lattice.constancy import Constancy
from srfx.lattice.movement import Fields, Shape
from srfx.ops.facts import Demand, FactTable, Labeller, Live, collapse
from srfx.ops.rule import OpRule, PortSite, Shifted


class Elementwise(OpRule):
    """y = f(x_1, .., x_n) position by position.

    Constant where all operands are; live channels are live in every operand.  An operand that is constant
    altogether, while others carry the shape, is read as a stored constant and need not be computed.
    """

    signature: tuple[str, ...] = ("input", "other")

    def is_even(self, call: Call) -> bool:
        return True

    def operands(self, call: Call) -> list[Value]:
        return [
            v
            for v in call.values()
            if not isinstance(v, fx.Node) or isinstance(call.program.hints[v], Tensor)
        ]

    def label(self, call: Call, labels: Labeller) -> Fields:
        if not isinstance(call.output, Tensor):
            self._label_integers(call, labels)
            return {}
        found = [self._followed(call, labels, v) for v in self.operands(call)]
        return labels.unify(found, len(call.out_shape), call.node.name)

    def _followed(self, call: Call, labels: Labeller, value: Value) -> tuple[Fields, Shape]:
        """Fields and shape of an operand; a table that others are as wide as is not tied, but picked from."""
        fields, shape = labels.of(value), call.shape(value)
        picked = self.picked_axes(call, value)
        labels.pin(value, call.node.name, Reason.CONSTANT_TABLE, picked)
        return {a: f for a, f in fields.items() if a not in picked}, tuple(
            1 if a in picked else n for a, n in enumerate(shape)
        )

    def picked_axes(self, call: Call, value: Value) -> list[int]:
        """Axes of a constant table (rotary angles, a fixed bias) along which some computed operand is as wide."""
        if value not in call.program.tables:
            return []
        shape, rank = call.shape(value), len(call.out_shape)
        others = [call.shape(v) for v in self.operands(call) if v not in call.program.tables]
        aligned = [(1,) * (rank - len(s)) + s for s in others]
        shift = rank - len(shape)
        return [a for a, n in enumerate(shape) if n > 1 and any(s[a + shift] == n for s in aligned)]

    def _label_integers(self, call: Call, labels: Labeller) -> None:
        if not any(labels.is_dynamic(n) for n in call.node.all_input_nodes):
            labels.static.add(call.node)

    def ports(self, call: Call, facts: FactTable) -> list[PortSite]:
        """Computed operands, where there are several: each brings the channels in which it varies."""
        if not isinstance(call.output, Tensor):
            return []
        independent, rank = call.program.independent, len(call.out_shape)
        computed = [v for v in self.operands(call) if isinstance(v, fx.Node) and v not in independent]
        found: list[PortSite] = []
        for axis in range(-rank, 0):
            wide = [v for v in computed if len(call.shape(v)) >= -axis and call.shape(v)[axis] > 1]
            if len(wide) > 1 and any(len(call.shape(v)) + axis in facts.fields(v) for v in wide):
                found += [PortSite(v, len(call.shape(v)) + axis, True) for v in wide]
        return found

    def forward(self, call: Call, facts: FactTable) -> Constancy:
        if not isinstance(call.output, Tensor):
            return Constancy.top(0)
        operands = {v: facts.constancy(v) for v in self.operands(call)}
        varies = torch.zeros((1,) * len(call.out_shape), dtype=torch.bool)
        for c in operands.values():
            varies = varies | c.varies.cpu()
        if bool(varies.all()) and not any(c.value.numel() > 1 for c in operands.values()):
            return self.annihilate(call, Constancy.top(len(call.out_shape)), facts)
        value = call.run({v: _typed(c.value, _dtype(call, v)) for v, c in operands.items()})
        value = (
            value.double()
            if isinstance(value, Tensor) and not value.is_complex()
            else torch.tensor(float("nan"))
        )
        found = Constancy(varies.cpu(), value.cpu())
        if facts.has_run_time_number((call.node.args, call.node.kwargs)):
            found = Constancy.top(len(call.out_shape))
        return self.annihilate(call, found, facts)

    def annihilate(self, call: Call, result: Constancy, facts: FactTable) -> Constancy:
        """Channels that are constant although an operand varies."""
        return result

    def backward(self, call: Call, live: Live, facts: FactTable) -> Demand:
        if not isinstance(call.output, Tensor):
            return {}
        assert isinstance(live, Tensor)
        wanted = self.wanted(call, live, facts)
        return {
            v: collapse(self.refine(call, v, wanted, facts), facts.layout(v)) for v in self.reads(call, facts)
        }

    def wanted(self, call: Call, live: Tensor, facts: FactTable) -> Tensor:
        """Channels of the result that have to be right; a partial function has no harmless argument."""
        return live

    def refine(self, call: Call, value: Value, live: Tensor, facts: FactTable) -> Tensor:
        """Live channels of one operand."""
        return live

    def reads(self, call: Call, facts: FactTable) -> list[Value]:
        operands = self.operands(call)
        constant = self.constant_operand(call, facts)
        return [v for v in operands if v is not constant]

    def constant_operand(self, call: Call, facts: FactTable) -> fx.Node | None:
        """A computed operand that is constant where it is wanted, while the others alone give the result its shape."""
        operands = self.operands(call)
        if len(operands) < 2 or facts.constancy(call.node).is_known:
            return None
        wanted = self.wanted(call, facts.liveness(call.node), facts)
        for value in operands:
            others = [call.shape(v) for v in operands if v is not value]
            if not isinstance(value, fx.Node) or value in call.program.independent:
                continue  # stored already
            if bool((facts.constancy(value).varies.cpu() & wanted).any()):
                continue
            if tuple(torch.broadcast_shapes(*others)) == call.out_shape and call.output.dtype == _promoted(
                call, operands, value
            ):
                return value
        return None

    def compact(self, call: Call, facts: FactTable) -> Iterable[GraphEdit]:
        if not isinstance(call.output, Tensor):
            return []
        operand = self.constant_operand(call, facts)
        picks = self._picks(call, facts)
        if operand is None:
            return picks
        constant = facts.constancy(operand)
        value = constant.value.expand(torch.broadcast_shapes(constant.value.shape, constant.varies.shape))
        fields = {a: f for a, f in facts.fields(operand).items() if call.shape(operand)[a] > 1}
        value = facts.compact(value, fields, call.shape(operand))
        neutral = self.neutral(call, operand, value)
        if neutral is not None:
            return [Bypass(call.node.name, neutral.name)]
        stored = value.to(call.program.hints[operand].dtype).contiguous()
        return [*picks, ReplaceOperand(call.node.name, operand.name, f"{call.node.name}_constant", stored)]

    def _picks(self, call: Call, facts: FactTable) -> list[GraphEdit]:
        """A table gives each head, and each channel, the positions that are left of them."""
        fields, rank = facts.fields(call.node), len(call.out_shape)
        found: list[GraphEdit] = []
        for node in call.node.all_input_nodes:
            value = call.program.value(node)
            shift = rank - len(call.shape(value)) if call.program.is_tensor(node) else 0
            picked = (
                {a + shift for a in self.picked_axes(call, value)} if call.program.is_tensor(node) else set()
            )
            every = facts.steps(fields, call.out_shape)
            steps = [(a, _where_rows_stay(i, a, picked, every)) for a, i in every if a in picked]
            if steps:
                found.append(
                    PickFromTable(
                        call.node.name, node.name, f"{call.node.name}_{node.name}", tuple(steps), rank, shift
                    )
                )
        return found

    def neutral(self, call: Call, operand: fx.Node, value: Tensor) -> fx.Node | None:
        """The other operand, when the constant one changes nothing."""
        return None


def _where_rows_stay(
    index: Tensor, axis: int, picked: set[int], steps: Iterable[tuple[int, Tensor]]
) -> Tensor:
    """Positions along ``axis`` for the rows that stay; rows of a picked axis are cut by its own step."""
    for a, rows in steps:
        if a not in picked and a != axis and index.dim() > 1 and index.shape[a] > 1:
            index = take(index, a, rows)
    return index


class Partial(Elementwise):
    """An elementwise op that may yield inf or nan: its operands are live wherever the result is kept."""

    def wanted(self, call: Call, live: Tensor, facts: FactTable) -> Tensor:
        return live | facts.kept_channels(call.node)


class Quotient(Partial):
    """y = a / b: constant 0 where a is; b is finite and not 0 by assumption (theory: Lemma E3)."""

    def annihilate(self, call: Call, result: Constancy, facts: FactTable) -> Constancy:
        a = call.value("input")
        if a is None or not call.output.is_floating_point():
            return result
        zero = facts.constancy(a).is_constant(0).cpu()
        zero = zero.view((1,) * (len(call.out_shape) - zero.dim()) + tuple(zero.shape))
        if not bool(zero.any()):
            return result
        return Constancy(result.varies & ~zero, result.value.masked_fill(zero, 0))


class SignedZero(Elementwise):
    """An elementwise op that tells -0 from 0, which no analysis does: a constant 0 is not known (theory: H6)."""

    def forward(self, call: Call, facts: FactTable) -> Constancy:
        found = super().forward(call, facts)
        zero = torch.zeros((1,) * len(call.out_shape), dtype=torch.bool)
        for v in self.operands(call):
            zero = zero | facts.constancy(v).is_constant(0).cpu()
        return Constancy(found.varies | zero, torch.where(zero, 0.0, found.value))


class Product(Elementwise):
    """y = a * b: constant 0 where either is 0, and then the other is not read."""

    def annihilate(self, call: Call, result: Constancy, facts: FactTable) -> Constancy:
        zero = torch.zeros((1,) * len(call.out_shape), dtype=torch.bool)
        for v in self.operands(call):
            zero = zero | facts.constancy(v).is_constant(0).cpu()
        return Constancy(
            result.varies & ~zero, result.value.masked_fill(zero, 0) if zero.any() else result.value
        )

    def refine(self, call: Call, value: Value, live: Tensor, facts: FactTable) -> Tensor:
        operands = self.operands(call)
        if len(operands) < 2:
            return live
        first, second = operands[0], operands[1]
        zero = {v: facts.constancy(v).is_constant(0).cpu() for v in (first, second)}
        if value is first:
            return live & (zero[first] | ~zero[second])
        return live & ~zero[first]

    def neutral(self, call: Call, operand: fx.Node, value: Tensor) -> fx.Node | None:
        return _other(call, self.operands(call), operand) if bool((value == 1).all()) else None


class Sum(Elementwise):
    """y = a + b, a - b."""

    is_overwritable = True

    def neutral(self, call: Call, operand: fx.Node, value: Tensor) -> fx.Node | None:
        if bool((value != 0).any()) or (self.subtracts and call["input"] is operand):
            return None
        if call.get("alpha", 1) != 1 and call["input"] is operand:
            return None
        return _other(call, self.operands(call), operand)

    subtracts = False

    def shifted(self, call: Call, axis: int, shift: Tensor) -> list[Shifted]:
        """By either summand that is as large as the sum; a subtrahend or a scaled one is left alone."""
        first, second = call.value("input"), call.value("other")
        if first is second:
            return []
        found = (first,) if self.subtracts or call.get("alpha", 1) != 1 else (first, second)
        whole = [v for v in found if isinstance(v, fx.Node) and _is_whole(call, v)]
        return [Shifted((), v, shift, axis) for v in whole]


class Choice(Elementwise):
    """where, masked_fill: constant where both branches are one and the same constant, whichever is taken."""

    signature: tuple[str, ...] = ("condition", "input", "other")

    def annihilate(self, call: Call, result: Constancy, facts: FactTable) -> Constancy:
        condition = call.value("condition")
        branches = [v for v in self.operands(call) if v is not condition]
        varies = torch.zeros((1,) * len(call.out_shape), dtype=torch.bool)
        for v in branches:
            varies = varies | facts.constancy(v).varies.cpu()
        if (
            condition is None
            or bool(varies.all())
            or facts.has_run_time_number((call.node.args, call.node.kwargs))
        ):
            return result
        flag = (1,) * len(call.shape(condition))
        yes, no = (
            call.run({condition: torch.full(flag, chosen)}
                     | {v: _typed(facts.constancy(v).value, _dtype(call, v)) for v in branches})
            for chosen in (True, False)
        )  # fmt: skip
        same = ~varies & (yes == no)
        return Constancy(result.varies & ~same, torch.where(same, yes.double(), result.value))


class Fill(Elementwise):
    """zeros_like, full_like and kin: a constant of the operand's shape; the operand lends only its shape."""

    def forward(self, call: Call, facts: FactTable) -> Constancy:
        if facts.has_run_time_number((call.node.args, call.node.kwargs)):
            return Constancy.top(len(call.out_shape))
        value = call.run(
            {v: torch.zeros((1,) * len(call.shape(v)), dtype=_dtype(call, v)) for v in self.operands(call)}
        )
        return Constancy(torch.zeros_like(value, dtype=torch.bool), value.double())

    def backward(self, call: Call, live: Live, facts: FactTable) -> Demand:
        return {}

    def reads(self, call: Call, facts: FactTable) -> list[Value]:
        return self.operands(call)


def _typed(value: Tensor, dtype: torch.dtype) -> Tensor:
    value = value.detach()
    if dtype == torch.bool:
        return value != 0
    return value.double() if dtype.is_floating_point else value.to(dtype)


def _dtype(call: Call, value: Value) -> torch.dtype:
    return call.program.hints[value].dtype if isinstance(value, fx.Node) else value.tensor.dtype


def _promoted(call: Call, operands: list[Value], _: Value) -> torch.dtype:
    found = _dtype(call, operands[0])
    for v in operands[1:]:
        found = torch.promote_types(found, _dtype(call, v))
    return found if call.output.dtype != torch.bool else torch.bool


def _other(call: Call, operands: list[Value], operand: fx.Node) -> fx.Node | None:
    rest = [v for v in operands if v is not operand]
    if len(rest) != 1 or not isinstance(rest[0], fx.Node):
        return None
    return rest[0] if _is_whole(call, rest[0]) else None


def _is_whole(call: Call, operand: fx.Node) -> bool:
    """Whether an operand has the result's shape and dtype."""
    return call.shape(operand) == call.out_shape and _dtype(call, operand) == call.output.dtype
