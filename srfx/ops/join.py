"""Joining and splitting: cat, stack, split, chunk, unbind, getitem, pad, channel and pixel shuffle (Lemmas M1 to M5)."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Sequence
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from srfx.ir.call import Call
from srfx.ir.edits import GraphEdit, Ref, ReorderOperand, Retarget
from srfx.ir.plan import Reason
from srfx.ir.program import Value
from srfx.lattice.constancy import Constancy
from srfx.lattice.movement import Fields, Permute, Regroup, Shape, Step, Take, pull_back, walk
from srfx.ops.facts import Demand, FactTable, Labeller, Live, collapse
from srfx.ops.lookup import Lookup
from srfx.ops.movement import AlongAxis, Movement, _axis
from srfx.ops.registry import op_rule
from srfx.ops.rule import OpRule
from srfx.ops.sizes import index_instead, is_range, positions, set_argument

aten = torch.ops.aten


@op_rule(
    torch.cat,
    torch.concat,
    torch.concatenate,
    aten.cat.default,
    aten.concat.default,
    aten.concatenate.default,
)
class Concat(OpRule):
    """y = cat(x_1 .. x_n, dim).  The channel sets of ``dim`` are concatenated, other axes are tied."""

    signature: tuple[str, ...] = ("tensors", "dim")

    def parts(self, call: Call) -> list[Value]:
        found = [call.as_value(t) for t in call["tensors"]]
        return [v for v in found if v is not None and call.shape(v) != (0,)]

    def is_unrecognised(self, call: Call) -> bool:
        return not isinstance(call["tensors"], (list, tuple))  # a whole tuple as operand

    def axis(self, call: Call) -> int:
        return _axis(call.get("dim", 0), len(call.out_shape))

    def label(self, call: Call, labels: Labeller) -> Fields:
        axis, rank, site = self.axis(call), len(call.out_shape), call.node.name
        parts = [(labels.of(v), call.shape(v)) for v in self.parts(call)]
        # one position (a class token) does not make an axis of tokens a channel axis
        tracked = any(axis in f and s[axis] > 1 for f, s in parts) or all(axis in f for f, _ in parts)
        joined: Fields = {}
        if not tracked:
            for f, _ in parts:
                if axis in f:
                    labels.table.pin(f[axis], site, Reason.UNTRACKED_AXIS.name)
        if tracked:
            pieces = [f[axis] if axis in f else self._untracked(labels, s, axis, site) for f, s in parts]
            joined[axis] = _cat(pieces, axis)
        for other in range(rank):
            if other == axis:
                continue
            held = [f[other] for f, _ in parts if other in f]
            if len(held) < len(parts):
                for found in held:
                    labels.table.pin(found, site, Reason.UNTRACKED_AXIS.name)
            elif tracked and any(h.shape[axis] > 1 for h in held):
                joined[other] = _cat(
                    [_widen(h, axis, s[axis]) for h, (_, s) in zip(held, parts, strict=True)], axis
                )
            else:
                joined[other] = self._tied(labels, held, axis)
        return joined

    def _untracked(self, labels: Labeller, shape: Shape, axis: int, site: str) -> Tensor:
        fresh = labels.table.fresh(*[n if a == axis else 1 for a, n in enumerate(shape)])
        labels.table.pin(fresh, site, Reason.UNTRACKED_AXIS.name)
        return fresh

    def _tied(self, labels: Labeller, held: list[Tensor], axis: int) -> Tensor:
        first = min(held, key=Tensor.numel).narrow(axis, 0, 1)
        for other in held:
            labels.table.tie(first, other)
        return first

    def forward(self, call: Call, facts: FactTable) -> Constancy:
        axis = self.axis(call)
        parts = [(facts.constancy(v), call.shape(v)[axis]) for v in self.parts(call)]
        varies = _cat([_widen(c.varies, axis, n) for c, n in parts], axis)
        value = _cat([_widen(c.value.double(), axis, n) for c, n in parts], axis)
        return Constancy(varies, value)

    def backward(self, call: Call, live: Live, facts: FactTable) -> Demand:
        assert isinstance(live, Tensor)
        demand: Demand = {}
        for value, piece in self._pieces(call, live):
            wanted = collapse(piece, facts.layout(value))
            demand[value] = demand[value] | wanted if value in demand else wanted
        return demand

    def _pieces(self, call: Call, t: Tensor) -> list[tuple[Value, Tensor]]:
        axis, start, found = self.axis(call), 0, []
        for value in self.parts(call):
            extent = call.shape(value)[axis]
            found.append((value, t if t.shape[axis] == 1 else t.narrow(axis, start, extent)))
            start += extent
        return found

    def _present(self, call: Call, facts: FactTable) -> list[bool]:
        """Operands that keep a channel along the axis; the others are left out."""
        axis = self.axis(call)
        fields = facts.fields(call.node)
        if axis not in fields:
            return [True] * len(self.parts(call))
        return [bool(piece.any()) for _, piece in self._pieces(call, facts.is_kept(fields[axis]))]

    def reads(self, call: Call, facts: FactTable) -> list[Value]:
        present = self._present(call, facts)
        return [v for v, p in zip(self.parts(call), present, strict=True) if p]

    def compact(self, call: Call, facts: FactTable) -> Iterable[GraphEdit]:
        present = self._present(call, facts)
        if all(present):
            return []
        kept = [t for t in call["tensors"] if call.as_value(t) in self.parts(call)]
        names = tuple(Ref(t.name) for t, p in zip(kept, present, strict=True) if p)
        return [set_argument(call, "tensors", names)]


@op_rule(torch.stack, aten.stack.default)
class Stack(OpRule):
    """y = stack(x_1 .. x_n, dim): the operands keep equally many channels, and may keep different ones."""

    signature: tuple[str, ...] = ("tensors", "dim")

    def parts(self, call: Call) -> list[Value]:
        return [v for v in (call.as_value(t) for t in call["tensors"]) if v is not None]

    def is_unrecognised(self, call: Call) -> bool:
        return not isinstance(call["tensors"], (list, tuple))  # a whole tuple as operand

    def axis(self, call: Call) -> int:
        return _axis(call.get("dim", 0), len(call.out_shape))

    def label(self, call: Call, labels: Labeller) -> Fields:
        axis = self.axis(call)
        parts = [
            {_past(a, axis): f.unsqueeze(axis) for a, f in labels.of(v).items()} for v in self.parts(call)
        ]
        joined: Fields = {}
        for a in {a: None for f in parts for a in f}:
            held = [f[a] for f in parts if a in f]
            if len(held) == len(parts):
                found = _cat(held, axis)
                same = bool((found == found.narrow(axis, 0, 1)).all())
                joined[a] = found.narrow(axis, 0, 1) if same else found
            else:
                for found in held:
                    labels.table.pin(found, call.node.name, Reason.UNTRACKED_AXIS.name)
        return joined

    def forward(self, call: Call, facts: FactTable) -> Constancy:
        axis, parts = self.axis(call), [facts.constancy(v) for v in self.parts(call)]
        return Constancy(
            _cat([c.varies.unsqueeze(axis) for c in parts], axis),
            _cat([c.value.double().unsqueeze(axis) for c in parts], axis),
        )

    def backward(self, call: Call, live: Live, facts: FactTable) -> Demand:
        assert isinstance(live, Tensor)
        axis = self.axis(call)
        demand: Demand = {}
        for i, value in enumerate(self.parts(call)):
            wanted = collapse(live.select(axis, min(i, live.shape[axis] - 1)), facts.layout(value))
            demand[value] = demand[value] | wanted if value in demand else wanted
        return demand


def _past(axis: int, inserted: int) -> int:
    return axis + 1 if axis >= inserted else axis


def _widen(t: Tensor, axis: int, extent: int) -> Tensor:
    return t.expand([extent if a == axis else n for a, n in enumerate(t.shape)])


def _cat(parts: Sequence[Tensor], axis: int) -> Tensor:
    """Cat of layout tensors, broadcast against each other on the other axes."""
    joint = torch.broadcast_shapes(*([1 if a == axis else n for a, n in enumerate(p.shape)] for p in parts))
    return torch.cat(
        [p.expand([p.shape[a] if a == axis else n for a, n in enumerate(joint)]) for p in parts], axis
    )


# ------------------------------------------------------------------------------------------ tuples
class Splitting(OpRule):
    """Several results, each a run of positions of one axis."""

    signature: tuple[str, ...] = ("input", "sizes", "dim")

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
        value = call.value("input")
        assert value is not None
        return value

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
            return self._unparsed(call).label(call, labels)
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
    value = call.as_value(raw)
    if value is None:
        plain = call.hint(raw)
        return call.node if isinstance(plain, list) else plain  # a list of anything else is not followed
    tensor = getattr(value, "tensor", None)
    if isinstance(tensor, Tensor) and tensor.dim() == 1 and tensor.dtype in (torch.int32, torch.int64):
        return tensor.detach().cpu().long()
    return raw if isinstance(raw, fx.Node) else call.node


@op_rule(aten.index.Tensor)
class IndexTensor(GetItem):
    """x[:, index] as export spells it: None for the axes that are taken whole."""

    signature: tuple[str, ...] = ("input", "indices")

    def _tuple(self, call: Call) -> fx.Node | None:
        return None

    def _parse(self, call: Call) -> Indexing | None:
        index = tuple(slice(None) if i is None else i for i in call["indices"])
        return Indexing.parse(call, call.shape(self.source(call)), index)


# ------------------------------------------------------------------------------------------ padding and shuffles
@op_rule(F.pad, aten.pad.default, aten.constant_pad_nd.default, nn.ZeroPad1d, nn.ZeroPad2d, nn.ZeroPad3d,
         nn.ConstantPad1d, nn.ConstantPad2d, nn.ConstantPad3d)  # fmt: skip
class Pad(Movement):
    """Constant padding: new positions hold the value.  Negative amounts crop."""

    signature: tuple[str, ...] = ("input", "pad", "mode", "value")

    def amounts(self, call: Call) -> tuple[int, ...]:
        pad = call.get("pad")
        pad = call.get("padding") if pad is None else pad
        rank = len(call.out_shape)
        return tuple(pad) if not isinstance(pad, int) else (pad,) * (2 * (rank - 2))

    def fill(self, call: Call) -> float:
        value = call.get("value")
        return 0.0 if value is None else float(value)

    def is_constant(self, call: Call) -> bool:
        mode = call.get("mode", "constant")
        return mode == "constant" or not isinstance(mode, str)

    def steps(self, call: Call) -> list[Step]:
        shape, pad = call.shape(self.source(call)), self.amounts(call)
        found: list[Step] = []
        for k in range(len(pad) // 2):
            axis, extent = len(shape) - 1 - k, shape[len(shape) - 1 - k]
            source = torch.arange(-pad[2 * k], extent + pad[2 * k + 1])
            if pad[2 * k] or pad[2 * k + 1]:
                if not self.is_constant(call):
                    numbers = torch.arange(extent, dtype=torch.float64).view(1, 1, -1)
                    source = F.pad(numbers, (pad[2 * k], pad[2 * k + 1]), call.get("mode")).flatten().long()
                found.append(Take(axis, torch.where(source < extent, source, -1).clamp(min=-1), extent))
        return found

    def dynamic_axes(self, call: Call, labels: Labeller) -> list[int]:
        if not labels.is_dynamic(call.bound.get("pad")):
            return []
        rank = len(call.out_shape)
        return [rank - 1 - k for k in range(len(self.amounts(call)) // 2)]

    def label(self, call: Call, labels: Labeller) -> Fields:
        axes = [s.axis for s in self.steps(call) if isinstance(s, Take)]
        if not self.is_constant(call):
            labels.pin(self.source(call), call.node.name, Reason.CHANNEL_MIXING, axes)
        return super().label(call, labels)

    def compact(self, call: Call, facts: FactTable) -> Iterable[GraphEdit]:
        fields, shape = facts.fields(call.node), call.out_shape
        before = facts.fields(self.source(call))
        pad, edited = list(self.amounts(call)), False
        for step in self.steps(call):
            assert isinstance(step, Take)
            if step.axis not in fields or not facts.changed(fields, step.axis, shape[step.axis]):
                continue
            taken = facts.is_kept(fields[step.axis])
            index = positions(facts, before, step.axis, step.source, taken)
            k = len(shape) - 1 - step.axis
            pad[2 * k : 2 * k + 2] = _amounts(index, facts.count(before, step.axis))
            edited = True
        name = "pad" if "pad" in call.bound else "padding"
        return [set_argument(call, name, tuple(pad))] if edited else []


def _amounts(index: Tensor, extent: int) -> tuple[int, int]:
    """Padding amounts (negative: cropping) that put positions ``index`` of ``extent``, -1 for new ones, in a row."""
    body = (index >= 0).nonzero().flatten()
    if not body.numel():
        return index.numel(), -extent
    first, last = int(body[0]), int(body[-1])
    return first or -int(index[first]), (index.numel() - 1 - last) or int(index[last]) + 1 - extent


@op_rule(nn.PixelShuffle, torch.pixel_shuffle, aten.pixel_shuffle.default)
class PixelShuffle(Movement):
    """[N, C r^2, H, W] -> [N, C, r H, r W]: the r^2 channels of an output channel stay or go together."""

    signature: tuple[str, ...] = ("input", "upscale_factor")

    def steps(self, call: Call) -> list[Step]:
        *batch, c, h, w = call.shape(self.source(call))
        r, n = call.get("upscale_factor"), len(batch)
        split = (*batch, c // (r * r), r, r, h, w)
        order = (*range(n), n, n + 3, n + 1, n + 4, n + 2)
        spread = tuple(split[i] for i in order)
        return [Regroup((*batch, c, h, w), split), Permute(order), Regroup(spread, call.out_shape)]

    def label(self, call: Call, labels: Labeller) -> Fields:
        axis, fields = len(call.out_shape) - 3, dict(labels.of(self.source(call)))
        if axis not in fields:
            return fields
        r2 = call.get("upscale_factor") ** 2
        grouped = fields[axis].unflatten(axis, (-1, r2))
        labels.table.tie(grouped, grouped.narrow(axis + 1, 0, 1))
        return {**fields, axis: grouped.select(axis + 1, 0)}


@op_rule(nn.PixelUnshuffle, torch.pixel_unshuffle, aten.pixel_unshuffle.default)
class PixelUnshuffle(Movement):
    """[N, C, r H, r W] -> [N, C r^2, H, W]: each channel appears r^2 times."""

    signature: tuple[str, ...] = ("input", "downscale_factor")

    def steps(self, call: Call) -> list[Step]:
        *batch, c, h, w = call.shape(self.source(call))
        r, n = call.get("downscale_factor"), len(batch)
        split = (*batch, c, h // r, r, w // r, r)
        order = (*range(n), n, n + 2, n + 4, n + 1, n + 3)
        spread = tuple(split[i] for i in order)
        return [Regroup((*batch, c, h, w), split), Permute(order), Regroup(spread, call.out_shape)]


@op_rule(nn.ChannelShuffle, torch.channel_shuffle, aten.channel_shuffle.default, torch.native_channel_shuffle)
class ChannelShuffle(AlongAxis):
    """A fixed permutation of channels; becomes an index_select when channels go."""

    signature: tuple[str, ...] = ("input", "groups")

    def selection(self, call: Call) -> Take:
        channels = call.out_shape[1]
        order = torch.arange(channels).view(call.get("groups"), -1).t().flatten()
        return Take(1, order, channels)
