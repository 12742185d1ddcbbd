"""Ports: readers of one value that keep different channels of it (theory: Lemmas G1 to G3).

    port        y = x, as one reader sees it: its channels are numbered anew.  It stands in a graph between analysis
                and compaction only; what it becomes is nothing, a slice, a selection or a spread.
    spread      y[index[i]] = x[i], and constants elsewhere: what is left of a port whose reader needs constants

Both are y[c] = x[s(c)] where s(c) >= 0 and a known number elsewhere, with labels of their own for y.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx

from srfx.ir.call import Call
from srfx.ir.editor import GraphEdit, GraphEditor, Stored
from srfx.ir.edits import Bypass, SetArgument
from srfx.ir.plan import Reason
from srfx.ir.program import Param
from srfx.lattice.constancy import Constancy
from srfx.lattice.movement import Fields, Step, Take
from srfx.nn.selection import select, spread
from srfx.ops.facts import Demand, FactTable, Labeller, Live, collapse
from srfx.ops.movement import Movement
from srfx.ops.registry import op_rule, resolve
from srfx.ops.rule import Shifted
from srfx.ops.selection import IndexSelect
from srfx.ops.sizes import is_range


def port(x: Tensor, dim: int, absorbs: bool, is_bound: bool = False) -> Tensor:
    """X itself.

    Args:
        x: any tensor.
        dim: the axis whose channels the reader may select, not negative.
        absorbs: constants that the reader needs may come from a stored tensor instead of x.
        is_bound: the reader takes channels of a norm's operand only, and no statistics in their places.
    """
    return x


class Rewired(Movement):
    """y[c] = x[s(c)] or a known number, along one axis; y's channels are free of x's."""

    signature: tuple[str, ...] = ("input", "dim")

    def axis(self, call: Call) -> int:
        dim: int = call["dim"]
        return dim + len(call.out_shape) if dim < 0 else dim

    def sources(self, call: Call) -> Tensor:
        """Return s [C]; -1 where a number stands."""
        raise NotImplementedError

    def numbers(self, call: Call) -> Tensor:
        """The number of each channel, [C] float64; 0 where there is none."""
        raise NotImplementedError

    def absorbs(self, call: Call) -> bool:
        """Whether a constant of x may become a number of y."""
        return True

    def is_bound(self, call: Call) -> bool:
        """Whether no channel of y may be a statistic in the place of a norm's channel (theory: Lemma N8)."""
        return False

    def steps(self, call: Call) -> list[Step]:
        return [Take(self.axis(call), self.sources(call), call.shape(self.source(call))[self.axis(call)])]

    def label(self, call: Call, labels: Labeller) -> Fields:
        axis, rank = self.axis(call), len(call.out_shape)
        own = labels.table.fresh(call.out_shape[axis])
        fields = dict(labels.of(self.source(call)))
        if not self.absorbs(call) and axis in fields:  # a channel that is kept has to come from somewhere
            source = fields[
                axis
            ]  # of several vectors where another port made blocks of it: each has the channel
            bound = labels.bound(source.flatten()).view(source.shape) if self.is_bound(call) else source
            labels.table.imply(own.view([-1 if a == axis else 1 for a in range(rank)]), bound)
        fields[axis] = own.view([-1 if a == axis else 1 for a in range(rank)])
        for name in ("index", "template"):
            value = call.value(name)
            if value is not None:
                labels.pin(value, call.node.name, Reason.CONSTANT_TABLE)
        return fields

    def forward(self, call: Call, facts: FactTable) -> Constancy:
        found, axis = super().forward(call, facts), self.axis(call)
        fresh = self.sources(call) < 0
        if not bool(fresh.any()):
            return found
        shape = [-1 if a == axis else 1 for a in range(len(call.out_shape))]
        value = torch.where(fresh.view(shape), self.numbers(call).view(shape), found.value.double().cpu())
        return Constancy(found.varies, value)

    def backward(self, call: Call, live: Live, facts: FactTable) -> Demand:
        assert isinstance(live, Tensor)
        demand = super().backward(call, live, facts)
        if not self.absorbs(call):
            return demand
        source = self.source(call)
        wanted, varies = demand[source], self._settled(call, facts).varies
        if not self._supplies(call, facts):
            varies = varies | facts.kept_channels(source)
        return {source: collapse(wanted & varies, facts.layout(source))}

    def _supplies(self, call: Call, facts: FactTable) -> bool:
        """Whether the constants of x come from a stored tensor: all of them, unless all that are needed are there."""
        source = self.source(call)
        wanted = super().backward(call, facts.liveness(call.node), facts)[source]
        constant = wanted & ~self._settled(call, facts).varies
        return self.absorbs(call) and bool((constant & ~facts.kept_channels(source)).any())

    def _settled(self, call: Call, facts: FactTable) -> Constancy:
        c = facts.constancy(self.source(call))
        return Constancy(c.varies.cpu(), c.value.double().cpu()).settle([self.axis(call)])

    def compact(self, call: Call, facts: FactTable) -> Iterable[GraphEdit]:
        source, axis = self.source(call), self.axis(call)
        fields, n_before = facts.fields(source), call.shape(source)[axis]
        held = facts.index(fields, axis) if axis in fields else torch.arange(n_before)
        constants = self._settled(call, facts)
        varies = constants.varies.flatten().expand(n_before)
        wanted = facts.index(facts.fields(call.node), axis)
        place = torch.full((n_before,), -1).index_copy(0, held, torch.arange(held.numel()))
        if self._supplies(call, facts):
            place = torch.where(varies, place, -1)
        s = self.sources(call)[wanted]
        found = torch.where(s >= 0, place[s.clamp(min=0)], -1)
        if self.is_unchanged(call, found, held.numel(), s):
            return []
        value = torch.where(varies, 0.0, constants.value.flatten().expand(n_before))
        numbers = torch.where(s >= 0, value[s.clamp(min=0)], self.numbers(call)[wanted])
        return [self._form(call, axis, found, torch.where(found < 0, numbers, 0.0), held.numel())]

    def is_unchanged(self, call: Call, found: Tensor, n_held: int, s: Tensor) -> bool:
        """Whether the call may stay as it is."""
        return False

    def _form(self, call: Call, axis: int, found: Tensor, numbers: Tensor, n_held: int) -> Rewire | Bypass:
        """Channel c is the ``found[c]``-th of the operand, or a number where that is -1."""
        name, operand, dim = call.node.name, call["input"].name, axis - len(call.out_shape)
        at = (found >= 0).nonzero().flatten()
        chosen = found[at]
        if at.numel() == found.numel():
            if chosen.numel() == n_held and is_range(chosen):
                return Bypass(name, operand)
            return Rewire(name, operand, dim, len(call.out_shape), _stored(chosen, call))
        chosen, order = chosen.sort()
        one = (
            chosen if chosen.numel() else torch.zeros(1, dtype=torch.long)
        )  # a reader of constants takes the shape
        selected = None if one.numel() == n_held else _stored(one, call)
        template = numbers.to(call.output.dtype).to(call.output.device)
        return Rewire(name, operand, dim, len(call.out_shape), selected, _stored(at[order], call), template)


def _stored(index: Tensor, call: Call) -> Tensor:
    return index.to(torch.int32).to(call.output.device)


@dataclass(frozen=True)
class Rewire(GraphEdit):
    """The call becomes a selection of its operand's channels, a spread of them among constants, or both."""

    operand: str
    dim: int
    n_axes: int
    selected: Tensor | None = None
    index: Tensor | None = None
    template: Tensor | None = None

    def apply(self, editor: GraphEditor) -> None:
        node, graph = editor.nodes[self.node], editor.gm.graph
        result = editor.nodes[self.operand]
        if self.selected is not None:
            result = self._select(editor, node, result, self.selected)
        if self.index is not None and self.template is not None:
            stored: dict[str, fx.Node] = {}
            is_run = is_range(self.index) and self.index.numel() > 0
            for role in ("index", "template"):
                tensor = getattr(self, role)
                if not is_run if role == "index" else bool((tensor != 0).any()):
                    stored[role] = editor.store(f"{self.node}_{role}", tensor, node)
            first = stored.pop("index", None)
            index, n_channels = int(self.index[0]) if first is None else first, self.template.numel()
            args: tuple[Any, ...] = (result, self.dim, index, n_channels, *stored.values())
            with graph.inserting_before(node):
                result = graph.call_function(spread, args)
        node.replace_all_uses_with(result)
        editor.nodes[self.node] = result

    def _select(self, editor: GraphEditor, node: fx.Node, x: fx.Node, selected: Tensor) -> fx.Node:
        """A slice, the selection that another reader of x has made already, or a new one."""
        graph = editor.gm.graph
        key = (x, self.dim, tuple(selected.tolist()))
        if key in editor.selections:
            return editor.selections[key]
        if is_range(selected):
            args = (x, self.dim, int(selected[0]), selected.numel())
            with graph.inserting_before(node):
                editor.selections[key] = graph.call_function(torch.narrow, args)
            return editor.selections[key]
        index = editor.store(f"{self.node}_selected", selected, node)
        with graph.inserting_before(node):
            target = select if self.dim == -1 and self.n_axes > 2 else torch.index_select
            editor.selections[key] = graph.call_function(target, (x, self.dim, index))
        return editor.selections[key]


@op_rule(port)
class Port(Rewired):
    """y = x, numbered anew for one reader (theory: Lemma G1)."""

    signature: tuple[str, ...] = ("input", "dim", "absorbs", "is_bound")

    def absorbs(self, call: Call) -> bool:
        return bool(call["absorbs"])

    def is_bound(self, call: Call) -> bool:
        return bool(call.get("is_bound", False))

    def forward(self, call: Call, facts: FactTable) -> Constancy:
        found = super().forward(call, facts)
        return replace(found, affine=None) if self.is_bound(call) else found

    def sources(self, call: Call) -> Tensor:
        return torch.arange(call.out_shape[self.axis(call)])

    def numbers(self, call: Call) -> Tensor:
        return torch.zeros(call.out_shape[self.axis(call)], dtype=torch.float64)

    def steps(self, call: Call) -> list[Step]:
        return []

    def compact(self, call: Call, facts: FactTable) -> Iterable[GraphEdit]:
        inner = selection_before(call["input"], self.axis(call), facts)
        return [
            replace(edit, operand=inner.operand, selected=_stored(inner.chosen[edit.selected.long()], call))
            if inner is not None and isinstance(edit, Rewire) and edit.selected is not None
            else edit
            for edit in super().compact(call, facts)
        ]


class Selection(NamedTuple):
    """An index_select by a constant index along an axis that keeps all its channels."""

    operand: str
    chosen: Tensor


def selection_before(node: object, axis: int, facts: FactTable) -> Selection | None:
    """The selection along ``axis`` that a port reads: a selection of it is one of its operand (theory: Lemma G7)."""
    if not isinstance(node, fx.Node) or not node.op.startswith("call"):
        return None
    rule, call = resolve(node, facts.program)
    if not isinstance(rule, IndexSelect) or rule.index(call) is None:
        return None
    take, source = rule.selection(call), call["input"]
    if take.axis != axis or axis in facts.fields(rule.source(call)) or axis in facts.fields(node):
        return None
    return Selection(source.name, take.source)


@op_rule(spread)
class Spread(Rewired):
    """y[index[i]] = x[i], y[c] = template[c] elsewhere (theory: Lemma G2)."""

    signature: tuple[str, ...] = ("input", "dim", "index", "n_channels", "template")

    def is_unrecognised(self, call: Call) -> bool:
        is_stored = isinstance(call.value("index"), Param) or isinstance(call["index"], int)
        return not is_stored or not (
            call.get("template") is None or isinstance(call.value("template"), Param)
        )

    def sources(self, call: Call) -> Tensor:
        index, n = self._index(call), call.out_shape[self.axis(call)]
        return torch.full((n,), -1).index_copy(0, index, torch.arange(index.numel()))

    def numbers(self, call: Call) -> Tensor:
        if call.value("template") is None:
            return torch.zeros(call.out_shape[self.axis(call)], dtype=torch.float64)
        return self._tensor(call, "template").double()

    def _index(self, call: Call) -> Tensor:
        first = call["index"]
        if isinstance(first, int):
            return torch.arange(first, first + call.shape(self.source(call))[self.axis(call)])
        return self._tensor(call, "index").long()

    def _tensor(self, call: Call, name: str) -> Tensor:
        value = call.value(name)
        assert isinstance(value, Param)
        return value.tensor.detach().cpu()

    def shifted(self, call: Call, axis: int, shift: Tensor) -> list[Shifted]:
        """Numbers at channels of x go to x, the others join the template, if there is one (theory: Lemma G9)."""
        if axis != self.axis(call) or self._index(call).numel() == 0:
            return []
        is_own = self.sources(call) >= 0
        total = torch.where(is_own, 0.0, self.numbers(call) + shift)
        template = None
        if bool((total != 0).any()):
            if call.get("template") is None:
                return []  # it would be a spread among zeros no more
            template = Stored(
                f"{call.node.name}_template", total.to(call.output.dtype).to(call.output.device)
            )
        edit = SetArgument(call.node.name, "template", template, self.signature)
        inner = shift[self._index(call)]
        if bool((inner == 0).all()):
            return [Shifted((edit,))]
        source = self.source(call)
        return [Shifted((edit,), source, inner, axis)] if isinstance(source, fx.Node) else []

    def is_unchanged(self, call: Call, found: Tensor, n_held: int, s: Tensor) -> bool:
        return torch.equal(found, self.sources(call)) and n_held == max(1, self._index(call).numel())
