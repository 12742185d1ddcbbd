"""Indexing: ``x[...]`` with slices, numbers and constant positions, and the items of a tuple (theory: Lemmas M1 to M5)."""

from __future__ import annotations

import operator
from collections.abc import Iterable
from typing import Any, TypeVar

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from srfx.ir.call import Call
from srfx.ir.editor import GraphEdit
from srfx.ir.plan import Reason
from srfx.ir.program import Value
from srfx.lattice.constancy import Constancy
from srfx.lattice.movement import Fields, Regroup, Shape, Step, Take
from srfx.ops.facts import Demand, FactTable, Labeller, Live
from srfx.ops.lookup import Lookup
from srfx.ops.movement import AlongAxis, _axis, original
from srfx.ops.registry import op_rule
from srfx.ops.rule import OpRule
from srfx.ops.sizes import index_instead, is_range, positions, set_argument

aten = torch.ops.aten


_F = TypeVar("_F")


def _pick(facts: tuple[_F, ...], places: int | list[int]) -> _F | tuple[_F, ...]:
    """The fact of an element of a tuple, or those of a tuple within it."""
    return facts[places] if isinstance(places, int) else tuple(facts[i] for i in places)


@op_rule(operator.getitem)
class GetItem(AlongAxis):
    """Element of a tuple, or indexing of a tensor by ints, slices, None, Ellipsis and one constant index tensor."""

    signature: tuple[str, ...] = ("input", "index")

    # -------------------------------------------------------------- elements of tuples
    def _tuple(self, call: Call) -> fx.Node | None:
        node = call["input"]
        hint = call.program.hints.get(node)
        return node if isinstance(hint, (tuple, list)) and not isinstance(hint, torch.Size) else None

    def _places(self, call: Call, node: fx.Node, index: int | slice) -> int | list[int]:
        """Where the element stands among the tuple's leaves; a list of places when it is a tuple itself."""
        spec = pytree.tree_structure(call.program.hints[node])
        found = pytree.tree_unflatten(list(range(spec.num_leaves)), spec)[index]
        return found if isinstance(found, int) else pytree.tree_leaves(found)

    def label(self, call: Call, labels: Labeller) -> Fields | tuple[Fields, ...]:  # type: ignore[override]
        node = self._tuple(call)
        if node is not None:
            found, index = labels.fields.get(node), call.get("index")
            if (
                isinstance(found, tuple)
                and isinstance(index, (int, slice))
                and isinstance(call.output, (Tensor, tuple, list))
            ):
                return _pick(found, self._places(call, node, index))
            return {}
        if not isinstance(call.output, Tensor):
            if self._reads_tracked(call, labels):
                labels.static.add(call.node)
            return {}
        parsed = self._parse(call)
        if parsed is None:
            rule = self._unparsed(call)
            if rule is self.opaque:
                labels.refuse(call.node, Reason.UNRECOGNISED_CALL)
            return rule.label(call, labels)
        source = self.source(call)
        fields = dict(labels.of(source))
        fields = self.known_fields(call, labels, fields)
        if len(parsed.takes) > 1 or parsed.picked or None in parsed.entries:
            for (
                axis
            ) in parsed.irregular():  # positions that are no run, beside other entries, have no plain form
                labels.pin(source, call.node.name, Reason.CHANNEL_MIXING, [axis])
        for axis, at in parsed.picked.items():
            if axis in fields:
                labels.require(call.node, fields.pop(axis).index_select(axis, torch.tensor([at])).reshape(-1))
        for step in parsed.steps:
            fields, required = step.carry(fields, labels.table, call.node.name)
            for channel in required:
                labels.require(call.node, channel)
        return fields

    def dynamic_axes(self, call: Call, labels: Labeller) -> list[int]:
        parsed = self._parse(call)
        return [] if parsed is None else parsed.dynamic(labels)

    def _reads_tracked(self, call: Call, labels: Labeller) -> bool:
        """Whether this is the size of an axis with channels, which is the same at every call of the network."""
        node, index = call["input"], call.get("index")
        if not isinstance(node, fx.Node) or node in labels.static:
            return True
        whole = (node.target is getattr and node.args[1] == "shape") or (
            node.target == "size" and len(node.args) == 1
        )
        if not whole or not isinstance(index, int):
            return False
        source = call.program.value(node.args[0])  # type: ignore[arg-type]
        return index % len(call.shape(source)) in labels.of(source)

    def forward(self, call: Call, facts: FactTable) -> Constancy | tuple[Constancy, ...]:  # type: ignore[override]
        node = self._tuple(call)
        if node is not None:
            found, index = facts.constants.get(node), call.get("index")
            if isinstance(found, tuple) and isinstance(index, (int, slice)):
                return _pick(found, self._places(call, node, index))
            return OpRule.forward(self, call, facts)
        if not isinstance(call.output, Tensor):  # a size, or some of them
            return Constancy.top(0)
        if self._parse(call) is None:
            return self._unparsed(call).forward(call, facts)
        return super().forward(call, facts)

    def backward(self, call: Call, live: Live, facts: FactTable) -> Demand:
        node = self._tuple(call)
        if node is not None:
            index = call.get("index")
            if not isinstance(index, (int, slice)):
                return {}
            places = self._places(call, node, index)
            if isinstance(places, int):
                return {(node, places): live} if isinstance(live, Tensor) else {}
            parts = live if isinstance(live, tuple) else (None,) * len(places)
            return {(node, i): part for i, part in zip(places, parts, strict=True) if part is not None}
        if not isinstance(call.output, Tensor):
            return OpRule.backward(self, call, live, facts)
        if self._parse(call) is None:
            return self._unparsed(call).backward(call, live, facts)
        return super().backward(call, live, facts)

    def reads(self, call: Call, facts: FactTable) -> list[Value]:
        return call.values()

    # -------------------------------------------------------------- indexing of tensors
    def is_followed(self, call: Call) -> bool:
        return isinstance(call.output, Tensor) and self._tuple(call) is None and self._parse(call) is not None

    def steps(self, call: Call) -> list[Step]:
        parsed = self._parse(call)
        assert parsed is not None
        return parsed.steps

    lookup, opaque = Lookup(), OpRule()

    def _unparsed(self, call: Call) -> OpRule:
        """What speaks for a call that is no fixed selection."""
        return self.lookup if self.lookup.site(call) is not None else self.opaque

    def _parse(self, call: Call) -> Indexing | None:
        return Indexing.parse(call, call.shape(self.source(call)))

    def compact(self, call: Call, facts: FactTable) -> Iterable[GraphEdit]:
        if not isinstance(call.output, Tensor) or self._tuple(call) is not None:
            return []
        parsed, source = self._parse(call), self.source(call)
        if parsed is None:
            return []
        fields, shape = facts.fields(source), call.shape(source)
        changed = [
            a
            for a in fields
            if facts.changed(fields, a, shape[a]) and (a in parsed.picked or a in parsed.takes)
        ]
        if not changed:
            return []
        entries = list(parsed.entries)
        if any(axis in parsed.gathered for axis in changed):
            (axis,) = parsed.takes
            taken = facts.is_kept(fields[axis]).index_select(axis, parsed.takes[axis].source)
            return [
                index_instead(
                    call,
                    call["input"],
                    axis,
                    positions(facts, fields, axis, parsed.takes[axis].source, taken),
                )
            ]
        for axis in changed:
            take = parsed.takes.get(axis) or Take(axis, torch.tensor([parsed.picked[axis]]), shape[axis])
            taken = facts.is_kept(fields[axis])
            taken = taken.index_select(axis, take.source)
            index = positions(facts, fields, axis, take.source, taken)
            entries[parsed.entry_of[axis]] = self._entry(axis in parsed.picked, index)
        if any(e is None and i in parsed.entry_of.values() for i, e in enumerate(entries)):
            axis = changed[0]
            index = positions(
                facts,
                fields,
                axis,
                parsed.takes[axis].source,
                facts.is_kept(fields[axis]).index_select(axis, parsed.takes[axis].source),
            )
            return [index_instead(call, call["input"], axis, index)]
        return [set_argument(call, "index", tuple(entries))]

    def _entry(self, picked: bool, index: Tensor) -> Any:
        if picked:
            return int(index[0])
        if is_range(index):
            start = int(index[0]) if index.numel() else 0
            return slice(start, start + index.numel(), None)
        return None


class Indexing:
    """A parsed index: steps, plain entries (one for each indexed axis), and which entry serves which axis."""

    def __init__(self) -> None:
        self.steps: list[Step] = []
        self.entries: list[Any] = []
        self.raw: list[Any] = []
        self.entry_of: dict[int, int] = {}
        self.picked: dict[int, int] = {}
        self.takes: dict[int, Take] = {}
        self.gathered: list[int] = []

    @classmethod
    def parse(cls, call: Call, shape: Shape, index: Any = None) -> Indexing | None:
        index = call["index"] if index is None else index
        raw = list(index) if isinstance(index, tuple) else [index]
        hinted = [_constant_index(call, r) for r in raw]
        gathers = sum(isinstance(h, Tensor) for h in hinted)
        if any(isinstance(h, fx.Node) for h in hinted) or gathers > 1:
            return None
        if gathers and any(isinstance(h, int) or h is None for h in hinted):
            return None  # torch then moves the gathered axis to the front, or adds axes
        consumed = sum(1 for h in hinted if h is not None and h is not Ellipsis)
        found, axis, kept = cls(), 0, []
        for entry, plain in zip(raw, hinted, strict=True):
            if plain is Ellipsis:
                for _ in range(len(shape) - consumed):
                    kept.append(shape[axis])
                    axis += 1
                found._add(entry, entry)
                continue
            if plain is None:
                kept.append(1)
                found._add(entry, entry)
                continue
            if isinstance(plain, bool):
                return None
            found.entry_of[axis] = len(found.entries)
            found._add(entry, entry)
            if isinstance(plain, int):
                at = _axis(plain, shape[axis])
                found.picked[axis] = at
                found.steps.append(Take(axis, torch.tensor([at]), shape[axis]))
            else:
                if isinstance(plain, Tensor):
                    source = torch.where(plain < 0, plain + shape[axis], plain)
                    found.gathered.append(axis)
                    found.takes[axis] = Take(axis, source, shape[axis])
                else:
                    source = torch.tensor(list(range(shape[axis])[plain]), dtype=torch.long)
                kept.append(source.numel())
                if source.numel() != shape[axis]:
                    found.takes[axis] = Take(axis, source, shape[axis])
                if axis in found.takes:
                    found.steps.append(found.takes[axis])
            axis += 1
        middle = list(shape)
        for a in found.picked:
            middle[a] = 1
        for a, take in found.takes.items():
            middle[a] = take.source.numel()
        after = tuple(kept) + tuple(shape[axis:])
        if tuple(middle) != after:
            found.steps.append(Regroup(tuple(middle), after))
        return found

    def _add(self, raw: Any, entry: Any) -> None:
        self.raw.append(raw)
        self.entries.append(entry)

    def irregular(self) -> list[int]:
        """Axes of which positions are taken that do not follow one another."""
        return [a for a, take in self.takes.items() if a in self.gathered or not is_range(take.source)]

    def dynamic(self, labels: Labeller) -> list[int]:
        """Axes whose bounds are computed at run time."""
        found = []
        for axis, i in self.entry_of.items():
            raw = self.raw[i]
            if axis in self.gathered:
                continue
            bounds = (raw.start, raw.stop, raw.step) if isinstance(raw, slice) else (raw,)
            if any(labels.is_dynamic(b) for b in bounds):
                found.append(axis)
        return found


def _constant_index(call: Call, raw: Any) -> Any:
    """An entry of an index with sizes as numbers and constant positions as a tensor [n]; other tensors stay nodes."""
    if isinstance(raw, list) and raw and all(type(r) is int for r in raw):
        return torch.tensor(raw)
    value = original(call, call.as_value(raw))
    if value is None:
        plain = call.hint(raw)
        return call.node if isinstance(plain, list) else plain  # a list of anything else is not followed
    tensor = getattr(value, "tensor", None)
    if isinstance(tensor, Tensor) and tensor.dim() == 1 and tensor.dtype in (torch.int32, torch.int64):
        return tensor.detach().cpu().long()
    return raw if isinstance(raw, fx.Node) else call.node


@op_rule(aten.index.Tensor, aten._unsafe_index.Tensor)
class IndexTensor(GetItem):
    """x[:, index] as export spells it: None for the axes that are taken whole."""

    signature: tuple[str, ...] = ("input", "indices")

    def _tuple(self, call: Call) -> fx.Node | None:
        return None

    def _parse(self, call: Call) -> Indexing | None:
        index = tuple(slice(None) if i is None else i for i in call["indices"])
        return Indexing.parse(call, call.shape(self.source(call)), index)
