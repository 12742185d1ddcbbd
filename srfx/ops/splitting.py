"""Splitting an axis into a tuple of values: split, chunk, unbind (theory: Lemmas M1 to M5)."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from srfx.ir.call import Call
from srfx.ir.editor import GraphEdit
from srfx.ir.edits import ReorderOperand, Retarget
from srfx.ir.plan import Reason
from srfx.ir.program import Value
from srfx.lattice.constancy import Constancy
from srfx.lattice.movement import Fields, Regroup, Step, Take, pull_back, walk
from srfx.ops.facts import Demand, FactTable, Labeller, Live
from srfx.ops.movement import _axis
from srfx.ops.registry import op_rule
from srfx.ops.rule import OpRule
from srfx.ops.sizes import set_argument

aten = torch.ops.aten


# ------------------------------------------------------------------------------------------ tuples
class Splitting(OpRule):
    """Several results, each a run of positions of one axis."""

    signature: tuple[str, ...] = ("input", "sizes", "dim")

    def is_even(self, call: Call) -> bool:
        return True

    def runs(self, call: Call) -> list[Tensor]:
        axis = self.axis(call)
        found, start = [], 0
        for part in call.output:
            found.append(torch.arange(start, start + int(part.shape[axis])))
            start += int(part.shape[axis])
        return found

    def axis(self, call: Call) -> int:
        return _axis(call.get("dim", 0), len(call.shape(self.source(call))))

    def source(self, call: Call) -> Value:
        return call.operand("input")

    def steps(self, call: Call) -> list[list[Step]]:
        axis, extent = self.axis(call), call.shape(self.source(call))[self.axis(call)]
        return [[Take(axis, run, extent)] for run in self.runs(call)]

    def is_dynamic(self, call: Call, labels: Labeller) -> bool:
        """Whether the sizes of the parts are known at run time only (theory: Lemma M5)."""
        arguments = {name: raw for name, raw in call.bound.items() if name != "input"}
        return labels.is_dynamic(list(arguments.values()))

    def label(self, call: Call, labels: Labeller) -> tuple[Fields, ...]:
        found, axis, whole = [], self.axis(call), dict(labels.of(self.source(call)))
        if self.is_dynamic(call, labels):
            labels.pin(self.source(call), call.node.name, Reason.DATA_DEPENDENT, [axis])
            whole.pop(axis, None)
            for a, f in whole.items():
                labels.table.tie(f, f.narrow(axis, 0, 1))
                whole[a] = f.narrow(axis, 0, 1)
        for steps in self.steps(call):
            fields = whole
            for step in steps:
                fields, required = step.carry(fields, labels.table, call.node.name)
                for channel in required:
                    labels.require(call.node, channel)
            found.append(fields)
        return tuple(found)

    def forward(self, call: Call, facts: FactTable) -> tuple[Constancy, ...]:
        c = facts.constancy(self.source(call))
        if self.is_dynamic(call, facts.labeller):
            c = c.settle(set(range(c.value.dim())) - {self.axis(call)})
        return tuple(Constancy(walk(s, c.varies, False), walk(s, c.value)) for s in self.steps(call))

    def backward(self, call: Call, live: Live, facts: FactTable) -> Demand:
        source = self.source(call)
        layout = facts.layout(source)
        wanted = torch.zeros(layout, dtype=torch.bool)
        for steps, part in zip(self.steps(call), live, strict=True):
            if part is not None:
                wanted = wanted | pull_back(steps, part, layout)
        if self.is_dynamic(call, facts.labeller):
            wanted = wanted.any(self.axis(call), keepdim=True).expand(layout)
        return {source: wanted}

    def reads(self, call: Call, facts: FactTable) -> list[Value]:
        return [self.source(call)]

    def in_order(self, call: Call, facts: FactTable) -> list[GraphEdit]:
        """An edit that puts the operand's kept channels into their original order, when they stand in another."""
        axis, source = self.axis(call), self.source(call)
        index = facts.index(facts.fields(source), axis) if axis in facts.fields(source) else torch.arange(1)
        if index.dim() > 1 or bool((index.diff() > 0).all()):
            return []
        order = index.argsort()
        return [ReorderOperand(call.node.name, call["input"].name, axis, f"{call.node.name}_order", order)]

    def counts(self, call: Call, facts: FactTable) -> list[int] | None:
        """Positions that stay in each result, None when nothing goes."""
        axis, source = self.axis(call), self.source(call)
        if not facts.changed(facts.fields(source), axis, call.shape(source)[axis]):
            return None
        parts = facts.labeller.fields[call.node]
        assert isinstance(parts, tuple)
        return [facts.count(fields, axis) for fields in parts]


@op_rule(torch.split, "split", aten.split.Tensor, aten.split_with_sizes.default, torch.split_with_sizes, "split_with_sizes",
         (aten.split.sizes, "input sizes dim"))  # fmt: skip
class Split(Splitting):
    """split, split_with_sizes: unequal parts are listed."""

    def compact(self, call: Call, facts: FactTable) -> Iterable[GraphEdit]:
        counts = self.counts(call, facts)
        if counts is None:
            return self.in_order(call, facts)
        if call.node.target in (aten.split.Tensor, aten.split.sizes):
            split = Retarget(call.node.name, aten.split_with_sizes.default, (counts, self.axis(call)))
            return [*self.in_order(call, facts), split]
        name = next(
            n for n in ("sizes", "split_size", "split_size_or_sections", "split_sizes") if n in call.bound
        )
        return [*self.in_order(call, facts), set_argument(call, name, counts)]


@op_rule(torch.chunk, "chunk", aten.chunk.default, torch.tensor_split, "tensor_split", aten.tensor_split.sections,
         aten.tensor_split.indices)  # fmt: skip
class Chunk(Splitting):
    """chunk: becomes a split with listed sizes when channels go."""

    signature: tuple[str, ...] = ("input", "chunks", "dim")

    def compact(self, call: Call, facts: FactTable) -> Iterable[GraphEdit]:
        counts = self.counts(call, facts)
        if counts is None:
            return self.in_order(call, facts)
        target = (
            aten.split_with_sizes.default
            if isinstance(call.node.target, torch._ops.OpOverload)
            else torch.split
        )
        return [*self.in_order(call, facts), Retarget(call.node.name, target, (counts, self.axis(call)))]


@op_rule(torch.unbind, "unbind", aten.unbind.int)
class Unbind(Splitting):
    """unbind: one result for each position; a position whose result is used must stay."""

    signature: tuple[str, ...] = ("input", "dim")

    def runs(self, call: Call) -> list[Tensor]:
        return [torch.tensor([i]) for i in range(call.shape(self.source(call))[self.axis(call)])]

    def steps(self, call: Call) -> list[list[Step]]:
        shape = list(call.shape(self.source(call)))
        shape[self.axis(call)] = 1
        after = tuple(int(n) for n in call.output[0].shape)
        return [[*steps, Regroup(tuple(shape), after)] for steps in super().steps(call)]

    def label(self, call: Call, labels: Labeller) -> tuple[Fields, ...]:
        labels.pin(self.source(call), call.node.name, Reason.UNTRACKED_AXIS, [self.axis(call)])
        return super().label(call, labels)
