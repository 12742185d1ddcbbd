"""Everything the analyses know about a program, keyed by value: the one thing that rules read.

`Labeller` is handed to `OpRule.label`, `FactTable` to every other method of a rule.  Layout tensors throughout: the
rank of the value, size 1 on axes along which nothing differs.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Hashable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

from srfx.ir.call import Call
from srfx.ir.editor import take
from srfx.ir.plan import Reason, Refusal
from srfx.ir.program import Param, Program, Value
from srfx.lattice.classes import Classes
from srfx.lattice.constancy import Constancy
from srfx.lattice.labels import LabelTable
from srfx.lattice.movement import Fields, Shape

Live = Tensor | tuple[Tensor | None, ...]
"""Live channels of a node's result: a bool layout tensor, or one for each element of a tuple result."""

Demand = dict[Value | tuple[fx.Node, int], Tensor]
"""Live channels that a call asks of its operands; (node, i) names element i of a tuple-valued operand."""


@dataclass
class Labeller:
    """Hands out labels and records constraints while the graph is labelled in topological order."""

    program: Program
    table: LabelTable = field(default_factory=LabelTable)
    fields: dict[Value, Fields | tuple[Fields, ...]] = field(default_factory=dict)
    slots: dict[str, Fields] = field(default_factory=dict)
    required: dict[fx.Node, list[Tensor]] = field(default_factory=dict)
    refusals: list[Refusal] = field(default_factory=list)
    static: set[fx.Node] = field(default_factory=set)
    followers: set[Value] = field(default_factory=set)
    """Parameters whose width follows from that of values: nothing is to be counted there."""
    firsts: list[int] = field(default_factory=list)
    """First labels of the results of norms whose statistics may come in places of channels, rising."""
    plain: list[Tensor] = field(default_factory=list)
    """For each of these, labels of its channels that are kept iff the channel is and is no place of a statistic."""

    def is_dynamic(self, raw: Any) -> bool:
        """Whether an integer argument is computed at run time from sizes that may differ from call to call."""
        found: list[fx.Node] = []
        fx.node.map_arg(raw, found.append)
        return any(n not in self.static for n in found)

    def of(self, value: Value) -> Fields:
        """Channel axes of a value; a parameter gets fresh labels on every axis when first met."""
        if value not in self.fields and isinstance(value, Param):
            shape = value.shape
            self.fields[value] = {
                a: self.table.fresh(n).view(_along(a, len(shape))) for a, n in enumerate(shape) if n > 0
            }
        found = self.fields.get(value, {})
        assert isinstance(found, dict), f"{value} is a tuple"
        return found

    def pin(self, value: Value, site: str, reason: Reason, axes: Iterable[int] | None = None) -> None:
        """Keep all channels of these axes of a value (default: of all its axes)."""
        fields = self.of(value)
        for axis in fields if axes is None else axes:
            if axis in fields:
                self.table.pin(fields[axis], site, reason.name)

    def even(self, fields: Fields, axis: int) -> Fields:
        """The fields with one size for all positions of an axis: labels of other axes that differ along it are tied."""
        found = dict(fields)
        for a, f in fields.items():
            if a != axis and f.shape[axis] > 1:
                found[a] = f.narrow(axis, 0, 1)
                self.table.tie(f, found[a])
        return found

    def unify(self, operands: list[tuple[Fields, Shape]], rank: int, site: str) -> Fields:
        """Tie operands that broadcast against each other, right-aligned; returns the fields of the result.

        An axis of size 1 broadcasts and ties nothing.  Where some operand has the axis without channels, the
        channels of the others stay.  Where an operand does not differ along an outer axis with channels (a norm
        scale shared by all heads), the tie holds only where the outer channel is kept (theory: Lemma C3).
        """
        aligned = [
            ({a + rank - len(s): _lift(f, rank) for a, f in fs.items()}, (1,) * (rank - len(s)) + s)
            for fs, s in operands
        ]
        chosen: Fields = {}
        for axis in range(rank):
            extent = max(s[axis] for _, s in aligned)
            wide = [f for f, s in aligned if s[axis] == extent]
            holders = [f[axis] for f in wide if axis in f]
            if not holders:
                continue
            if len(holders) < len(wide):
                for labels in holders:
                    self.table.pin(labels, site, Reason.UNTRACKED_AXIS.name)
                continue
            chosen[axis] = max(holders, key=Tensor.numel)
        for axis, carrier in list(chosen.items()):
            for f, s in aligned:
                if axis in f and s[axis] == carrier.shape[axis] and f[axis] is not carrier:
                    chosen[axis] = self._join(chosen[axis], f[axis], axis, chosen)
        return chosen

    def _join(self, carrier: Tensor, other: Tensor, axis: int, fields: Fields) -> Tensor:
        """Tie two label tensors of one axis; the result is the one that differs along more outer axes."""
        spread = [d for d in range(carrier.dim()) if carrier.shape[d] != other.shape[d]]
        guards = [fields[d] for d in spread if d != axis and d in fields]
        if not guards or any(other.shape[d] > 1 for d in spread):
            self.table.tie(carrier, other)
            return carrier if guards or carrier.numel() <= other.numel() else other
        self.table.imply(carrier, other)
        self.table.imply(other, carrier, guards)
        return carrier

    def settle(self, fields: Fields, site: str) -> None:
        """Record the block rule of every axis whose labels differ along another axis."""
        for axis, labels in fields.items():
            self.table.rectangular(labels, axis, fields, site)

    def bind(self, own: Tensor, plain: Tensor) -> None:
        """The fresh labels ``own`` of a norm's result may be places of statistics; ``plain`` are its channels alone."""
        self.firsts.append(int(own[0]))
        self.plain.append(plain)

    def bound(self, labels: Tensor) -> Tensor:
        """Labels for a reader of a norm's channels that takes no statistic in their places (theory: Lemma N8)."""
        if not self.firsts or not labels.numel():
            return labels
        nearest = bisect_right(self.firsts, int(labels.max()))
        lowest = max(bisect_right(self.firsts, int(labels.min())) - 1, 0)
        for first, plain in zip(self.firsts[lowest:nearest], self.plain[lowest:nearest], strict=True):
            at = labels - first
            found = (at >= 0) & (at < plain.numel())
            if bool(found.any()):
                labels = torch.where(found, plain[at.clamp(0, plain.numel() - 1)], labels)
        return labels

    def declare(self, slot: str, fields: Fields) -> None:
        """Labels of a tensor attribute that may not exist yet (a bias that folding may create)."""
        self.slots[slot] = fields

    def require(self, node: fx.Node, labels: Tensor) -> None:
        """These labels must be kept if the node is executed at all (it selects one position)."""
        self.required.setdefault(node, []).append(labels)

    def refuse(self, node: fx.Node, reason: Reason, detail: str = "") -> None:
        self.refusals.append(Refusal(node.name, reason, detail))


@dataclass
class FactTable:
    """Fields, constancy, liveness and the kept set of a program, filled by the analyses in this order.

    carriers: value -> the channel that carries all nonzero constants of this value into zero-padded readers.
    emitted: norm node -> position at which each emitted statistic travels; {} when the norm emits nothing.
    shifts: norm node -> c of the statistic (mu - c) r.
    closed: norm nodes that lose no channel for want of places for their statistics.
    declined: calls of shared weights for which a matrix of statistics would be larger than the columns it replaces.
    siblings: contraction -> all calls that share its weight and bias, and may change them together.
    cache, operands: what rules derive from weights and from constancy, to derive it once.
    whole: norm nodes whose result is as wide as their operand: to select channels would cost more than it saves.
    ranks: [labels] by representative; channels of rank > 0 stand behind all others of their axis, by rank.
    """

    program: Program
    labeller: Labeller
    classes: Classes
    constants: dict[Value, Constancy | tuple[Constancy, ...]] = field(default_factory=dict)
    live: dict[Value, Live] = field(default_factory=dict)
    kept: Tensor = field(default_factory=lambda: torch.zeros(1, dtype=torch.bool))
    carriers: dict[Value, int] = field(default_factory=dict)
    cache: dict[tuple[int, ...], Tensor] = field(default_factory=dict)
    operands: dict[fx.Node, tuple[Constancy, Tensor, Tensor]] = field(default_factory=dict)
    _layouts: dict[Value, Shape] = field(default_factory=dict)
    emitted: dict[Hashable, dict[str, int]] = field(default_factory=dict)
    shifts: dict[Hashable, float] = field(default_factory=dict)
    closed: set[Hashable] = field(default_factory=set)
    declined: set[fx.Node] = field(default_factory=set)
    siblings: Mapping[fx.Node, tuple[Call, ...]] = field(default_factory=dict)
    whole: set[Hashable] = field(default_factory=set)
    ranks: Tensor = field(default_factory=lambda: torch.zeros(1, dtype=torch.int8))
    refusals: list[Refusal] = field(default_factory=list)
    demanded: Tensor | None = None
    """What live channels demand when nothing is kept besides, by representative; the rest of ``kept`` is revived."""

    # ------------------------------------------------------------------ facts of one value
    def fields(self, value: Value) -> Fields:
        return self.labeller.of(value)

    def constancy(self, value: Value) -> Constancy:
        """What is known of the value's channels; a parameter is known altogether."""
        if isinstance(value, Param):
            return Constancy.known(value.tensor.detach())
        found = self.constants.get(value)
        return found if isinstance(found, Constancy) else Constancy.top(len(self.program.shape(value)))

    def liveness(self, value: Value) -> Tensor:
        """Live channels of a tensor value, bool layout."""
        found = self.live.get(value)
        if isinstance(found, Tensor):
            return found
        return torch.zeros((1,) * len(self.program.shape(value)), dtype=torch.bool)

    def layout(self, value: Value) -> Shape:
        """Sizes of the value's layout tensors: full on axes along which some field differs, else 1."""
        if value not in self._layouts:
            self._layouts[value] = layout_of(self.fields(value), len(self.program.shape(value)))
        return self._layouts[value]

    # ------------------------------------------------------------------ the kept set
    def is_kept(self, labels: Tensor) -> Tensor:
        """Whether each label is kept in the current solution, shape of ``labels``."""
        return self.kept[self.classes.representative[labels]]

    def kept_channels(self, value: Value) -> Tensor:
        """Elements of the value's layout that exist in the result (bool)."""
        return self.all_kept(self.fields(value), len(self.program.shape(value)))

    def all_kept(self, fields: Fields, rank: int) -> Tensor:
        """Elements of which every label is kept, a layout tensor."""
        kept = torch.ones((1,) * rank, dtype=torch.bool)
        for labels in fields.values():
            kept = kept & self.is_kept(labels)
        return kept

    def index(self, fields: Fields, axis: int) -> Tensor:
        """Kept positions along an axis: [k], or per row of the outer axes (a layout tensor) where rows differ."""
        kept = self.is_kept(fields[axis])
        if kept.numel() == kept.shape[axis]:
            found = kept.flatten().nonzero().flatten()
            rank = self.ranks[self.classes.representative[fields[axis].flatten()[found]]]
            return found[rank.argsort(stable=True)] if bool(rank.any()) else found
        count = int(kept.sum(axis).max())
        return torch.sort(~kept, dim=axis, stable=True).indices.narrow(axis, 0, count)

    def count(self, fields: Fields, axis: int) -> int:
        """How many channels stay along an axis."""
        return int(self.is_kept(fields[axis]).sum(axis).max())

    def changed(self, fields: Fields, axis: int, extent: int) -> bool:
        """Whether the axis loses channels."""
        return axis in fields and self.count(fields, axis) != extent

    def steps(self, fields: Fields, shape: Shape) -> list[tuple[int, Tensor]]:
        """(axis, index) selections that compact a tensor laid out like ``fields``; inner ragged axes come first."""
        found = [(a, self.index(fields, a)) for a in sorted(fields)]
        # as many may stay as there were, in another order: a norm puts the statistics it emits behind its channels
        found = [(a, i) for a, i in found if self.changed(fields, a, shape[a]) or not _is_identity(i)]
        return sorted(found, key=lambda step: step[1].dim() == 1)

    def compact(self, tensor: Tensor, fields: Fields, shape: Shape) -> Tensor:
        """A layout tensor of a value with the removed channels cut out."""
        for axis, index in self.steps(fields, shape):
            if tensor.shape[axis] > 1 or shape[axis] == 1:
                tensor = take(tensor, axis, index)
        return tensor

    def has_run_time_number(self, raw: Any) -> bool:
        """Whether an argument is a number that differs from call to call: a size, or an input that is no tensor."""
        found: list[fx.Node] = []
        fx.node.map_arg(raw, found.append)
        numbers = [n for n in found if not isinstance(self.program.hints.get(n), Tensor)]
        return any(n not in self.program.independent and self.labeller.is_dynamic(n) for n in numbers)

    def refuse_constants(self, node: fx.Node, value: Value, axes: Iterable[int], reason: Reason) -> None:
        """Note the refusal when constant channels stay along one of these axes of an operand."""
        varies = self.constancy(value).varies
        if any(a in self.fields(value) for a in axes) and not bool(varies.all()):
            self.refuse(node, reason)

    def refuse(self, node: fx.Node, reason: Reason, detail: str = "") -> None:
        refusal = Refusal(node.name, reason, detail)
        if refusal not in self.refusals:
            self.refusals.append(refusal)


def _is_identity(index: Tensor) -> bool:
    return index.dim() > 1 or bool((index == torch.arange(index.numel())).all())


def layout_of(fields: Fields, rank: int) -> Shape:
    """Joint shape of all label tensors of a value."""
    return tuple(max((f.shape[a] for f in fields.values()), default=1) for a in range(rank))


def collapse(mask: Tensor, shape: Shape) -> Tensor:
    """OR a bool tensor down to a layout: leading axes and axes of size 1 there are reduced."""
    if not mask.numel():
        return torch.zeros(shape, dtype=torch.bool)
    lead = mask.dim() - len(shape)
    axes = [a + lead for a, n in enumerate(shape) if n == 1 and mask.shape[a + lead] > 1]
    if lead:
        mask = mask.to(torch.uint8).amax(list(range(lead)), keepdim=True).to(torch.bool)
    if axes:  # bytes: `any` of bool is slow on CPU
        mask = mask.to(torch.uint8).amax(axes, keepdim=True).to(torch.bool)
    return mask.reshape(mask.shape[lead:])


def _along(axis: int, rank: int) -> list[int]:
    return [-1 if a == axis else 1 for a in range(rank)]


def _lift(t: Tensor, rank: int) -> Tensor:
    return t.view((1,) * (rank - t.dim()) + tuple(t.shape))
