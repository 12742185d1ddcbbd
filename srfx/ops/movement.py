"""Movement, the base of ops that move elements and compute none, and copies (theory: Lemmas M1 to M5)."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx, nn

from srfx.ir.call import Call
from srfx.ir.editor import GraphEdit
from srfx.ir.plan import Reason
from srfx.ir.program import Param, Value
from srfx.lattice.constancy import Affine, Constancy
from srfx.lattice.movement import Fields, Step, Take, follow, pull_back, walk
from srfx.ops.facts import Demand, FactTable, Labeller, Live
from srfx.ops.registry import op_rule
from srfx.ops.rule import OpRule
from srfx.ops.sizes import index_instead, positions

aten = torch.ops.aten


class Movement(OpRule):
    """y[p] = x[s(p)] for a fixed map s of positions, given as steps."""

    binds = False
    """Whether what is taken of an axis has the labels of a norm's operand (theory: Lemma N8)."""

    def is_even(self, call: Call) -> bool:
        return True

    def is_followed(self, call: Call) -> bool:
        """Whether this very call is such a map; its steps are asked for only then."""
        return True

    def steps(self, call: Call) -> list[Step]:
        """The map from the operand to the result."""
        raise NotImplementedError

    def fill(self, call: Call) -> float:
        """Value of positions that are new."""
        return 0.0

    def source(self, call: Call) -> Value:
        return call.operand("input")

    why_dynamic = Reason.DATA_DEPENDENT
    """The reason for which dynamic axes stay."""

    def dynamic_axes(self, call: Call, labels: Labeller) -> list[int]:
        """Axes of the operand along which the positions are known at run time only (theory: Lemma M5)."""
        return []

    def label(self, call: Call, labels: Labeller) -> Fields:
        fields = self.known_fields(call, labels, dict(labels.of(self.source(call))))
        for step in self.steps(call):
            fields, required = step.carry(fields, labels.table, call.node.name)
            for channel in required:
                labels.require(call.node, channel)
        return fields

    def known_fields(self, call: Call, labels: Labeller, fields: Fields) -> Fields:
        """The fields without dynamic axes, which stay whole and along which the others' labels have to agree."""
        dynamic = self.dynamic_axes(call, labels)
        for axis in dynamic:
            labels.pin(self.source(call), call.node.name, self.why_dynamic, [axis])
            fields.pop(axis, None)
            for a, f in fields.items():
                _flatten_ties(f, axis, labels)
                fields[a] = f.narrow(axis, 0, 1)
        return fields

    def forward(self, call: Call, facts: FactTable) -> Constancy:
        before, steps = facts.constancy(self.source(call)), self.steps(call)
        dynamic = self.dynamic_axes(call, facts.labeller)
        if dynamic:  # any part of these axes may be taken: constant only where the whole axis is
            before = replace(
                before.settle(set(range(before.value.dim())) - set(dynamic)), sums_to_one=None, affine=None
            )
        affine = self.carry_affine(call, before.affine)
        total = None if before.sums_to_one is None else follow(steps, before.sums_to_one)
        if any(isinstance(s, Take) and bool((s.source < 0).any()) for s in steps):
            total = None
        varies, value = walk(steps, before.varies, False), walk(steps, before.value, self.fill(call))
        return Constancy(varies, value, affine, total)

    def carry_affine(self, call: Call, affine: Affine | None) -> Affine | None:
        """The operand's affine channels, if their axis arrives whole; new positions elsewhere make a border."""
        if affine is None:
            return None
        steps = self.steps(call)
        axis = follow(steps, affine.axis)
        if axis is None:
            return None
        fresh = any(isinstance(s, Take) and bool((s.source < 0).any()) for s in steps)
        if fresh and self.fill(call) != 0:
            return None
        return replace(affine, axis=axis, bordered=affine.bordered or fresh)

    def backward(self, call: Call, live: Live, facts: FactTable) -> Demand:
        assert isinstance(live, Tensor)
        source = self.source(call)
        wanted = pull_back(self.steps(call), live, facts.layout(source))
        for axis in self.dynamic_axes(call, facts.labeller):
            wanted = wanted.any(axis, keepdim=True)
        return {source: wanted.expand(facts.layout(source))}

    def reads(self, call: Call, facts: FactTable) -> list[Value]:
        return [self.source(call)]


@op_rule(
    nn.Identity, "contiguous", "clone", "detach", "to", "float", "double", "half", "bfloat16", "type", "type_as", "cpu", "cuda",
    torch.clone, torch.detach, "requires_grad_", "alias", aten.contiguous.default, aten.clone.default, aten.alias.default,
    aten.detach.default, aten.detach_.default, aten.to.dtype, aten.to.dtype_layout, aten.to.device, aten.to.other,
    aten._to_copy.default, aten.type_as.default, aten.lift_fresh_copy.default, aten.lift_fresh.default,
    aten.positive.default, torch.positive, torch.Tensor.contiguous,
)  # fmt: skip
class Copy(Movement):
    """y = x in another place, layout or dtype; a constant is rounded as the cast rounds it."""

    def steps(self, call: Call) -> list[Step]:
        return []

    def forward(self, call: Call, facts: FactTable) -> Constancy:
        source, dtype = self.source(call), call.output.dtype
        found = super().forward(call, facts)
        before = source.tensor.dtype if isinstance(source, Param) else call.program.hints[source].dtype
        if dtype == before or dtype.is_complex:
            return found
        value = found.value.to(dtype)
        if not dtype.is_floating_point:  # no linear map
            return Constancy(found.varies, value)
        return replace(found, value=value.double())


def _axis(dim: int, rank: int) -> int:
    return dim + rank if dim < 0 else dim


# ------------------------------------------------------------------------------------------ along one axis
class AlongAxis(Movement):
    """The result takes positions ``source`` of one axis, known when the graph is read."""

    def selection(self, call: Call) -> Take:
        raise NotImplementedError

    def steps(self, call: Call) -> list[Step]:
        return [self.selection(call)]

    def backward(self, call: Call, live: Live, facts: FactTable) -> Demand:
        demand = super().backward(call, live, facts)
        if self.binds:
            self._refuse_statistics(call, demand[self.source(call)], facts)
        return demand

    def _refuse_statistics(self, call: Call, wanted: Tensor, facts: FactTable) -> None:
        """Say so where a norm's channels stay because they are taken as they are (theory: Lemma N8)."""
        affine, axis = facts.constancy(self.source(call)).affine, self.selection(call).axis
        if affine is None or affine.axis != axis:
            return
        found = wanted.movedim(axis, -1).flatten(0, -2).any(0) if wanted.dim() > 1 else wanted
        if bool((found & affine.mask).any()):
            assert isinstance(affine.norm, fx.Node)
            facts.refuse(affine.norm, Reason.NOT_LINEAR_IN_NORM, f"{call.node.name} takes a part of it")

    def compact(self, call: Call, facts: FactTable) -> Iterable[GraphEdit]:
        step, fields = self.selection(call), facts.fields(self.source(call))
        after = facts.fields(call.node)
        if step.axis not in fields or step.axis not in after:
            return []
        taken = facts.is_kept(after[step.axis])
        index = positions(facts, fields, step.axis, step.source, taken)
        order = facts.index(after, step.axis)
        if order.dim() == 1:  # the result may stand in an order of its own (theory: Lemmas N6 and G8)
            index = index[order.argsort().argsort()]
        if not facts.changed(fields, step.axis, step.extent) and torch.equal(index, step.source):
            return []  # as many may stay in another order: a norm puts its statistics behind its channels
        return self.rewrite(call, step.axis, index)

    def rewrite(self, call: Call, axis: int, index: Tensor) -> Iterable[GraphEdit]:
        return [index_instead(call, call["input"], axis, index)]


_COPIES = (torch.clone, "clone", aten.clone.default, aten.lift_fresh_copy.default)


def original(call: Call, value: Value | None) -> Value | None:
    """What a value is a copy of, where nothing else could write into the copy: an export clones its constants."""
    while isinstance(value, fx.Node) and value.target in _COPIES and len(value.users) == 1:
        source = value.args[0] if value.args else None
        value = call.program.value(source) if isinstance(source, fx.Node) else None
    return value


def tensor_of(value: Any) -> Tensor | None:
    """The constant tensor behind a parameter value."""
    tensor = getattr(value, "tensor", None)
    return tensor if isinstance(tensor, Tensor) else None


def _flatten_ties(labels: Tensor, axis: int, labeller: Labeller) -> None:
    if labels.shape[axis] > 1:
        labeller.table.tie(labels, labels.narrow(axis, 0, 1))
