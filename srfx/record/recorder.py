"""Watch a minimize run and write its record."""

from __future__ import annotations

import dataclasses
import hashlib
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from srfx.analysis.liveness import live_labels
from srfx.ir.attrs import split_path
from srfx.ir.edits import CompactTensor
from srfx.ir.effects import op_name
from srfx.ir.fake_run import Survey
from srfx.ir.plan import Edit, Reason, Refusal
from srfx.ops.facts import FactTable
from srfx.record.keep_plan import AxisCut, KeepPlan, RefusalNote, TensorPlan
from srfx.record.record import Record, TensorSpec

_MASK_SUFFIXES = ("_orig", "_mask", "_g", "_v", "_u")


class Recorder:
    """Collects what a run does, step by step; reads only.

    Args:
        gm: the canonicalised graph, before any channel is cut.
        survey: its values and FLOPs.
        source: the user's module, None when there is none (its unread tensors are then not listed).
        options: arguments of minimize that matter.
    """

    def __init__(
        self, gm: fx.GraphModule, survey: Survey, source: nn.Module | None, options: dict[str, Any]
    ) -> None:
        self.options = options
        self.inputs = pytree.tree_map_only(Tensor, _spec, survey.inputs)
        self.tensors = inventory(gm)
        self.unread = _unread(source, gm) if source is not None else []
        self.nodes = [n.name for n in gm.graph.nodes]
        self.edges, self.ops = _edges(gm)
        self.layers, self.flops = _layers(gm, survey)
        self.graph = _digest(gm)
        self.cuts: dict[str, list[AxisCut]] = {}
        self.origins: dict[str, str] = {}
        self.notes: list[RefusalNote] = []
        self.revived: Counter[str] = Counter()

    def refusals(self, source: str, found: Iterable[Refusal]) -> None:
        """Note the refusals of a pass that reasons about sites, not channels."""
        for r in found:
            self.notes.append(RefusalNote(r.node, r.reason.name, r.reason.value, r.detail, 0, source))

    def compaction(self, source: str, edits: Iterable[Edit], facts: FactTable) -> None:
        """Note the cuts of one round of a pass, what it refused, and what it revived.

        What stays in one round is met again in the next, where it may look live: the larger number counts.
        """
        for edit in edits:
            if isinstance(edit, CompactTensor):
                self._cut(edit)
        before, self.notes = self.notes, []
        self._pinned(source, facts)
        self.notes = _merged([*before, *self.notes])
        self.revived |= revived(facts)

    def moves(self, edits: Iterable[CompactTensor], copies: Mapping[str, str]) -> None:
        """Note where positions of tensors have gone that a pass lays out anew, and what it has copied.

        Args:
            edits: where the positions come from.
            copies: by the path of each copy, which from now on is cut by itself, that of the tensor it was made from.
        """
        for edit in edits:
            self._cut(edit)
        for path, old in copies.items():
            first = next((n for n, t in self.tensors.items() if old in (n, *t.aliases)), old)
            self.origins[path] = self.origins.get(first, first)
            self.cuts[path] = list(self.cuts.get(first, ()))

    def record(self, gm: fx.GraphModule, survey: Survey) -> Record:
        """The record of the finished result."""
        names = [n.name for n in gm.graph.nodes]
        edges, ops = _edges(gm)
        plan = KeepPlan(
            tensors=(*self._tensor_plans(gm), *self.unread),
            removed_nodes=_missing(self.nodes, names),
            added_nodes=_missing(names, self.nodes),
            refusals=tuple(dict.fromkeys(self.notes)),
            options=self.options,
            graph=self.graph,
        )
        unknown = Counter(n.detail for n in plan.refusals if n.reason == Reason.UNKNOWN_OP.name)
        return Record(
            plan,
            self.inputs,
            self.layers,
            self.flops,
            _layers(gm, survey)[1],
            dict(sorted(unknown.items())),
            dict(sorted(self.revived.items())),
            len(self.nodes),
            len(names),
            edges_before=self.edges,
            edges_after=edges,
            ops={**self.ops, **ops},
        )

    def _cut(self, edit: CompactTensor) -> None:
        name = edit.paths[0]
        for axis, index in edit.selections:
            before = self.cuts.setdefault(name, [])
            size = self._size(name, axis, before)
            if size is not None:
                kept = tuple(index.flatten().tolist())
                before.append(AxisCut(axis, size, kept, tuple(index.shape)))

    def _size(self, name: str, axis: int, cuts: list[AxisCut]) -> int | None:
        for cut in reversed(cuts):
            if cut.axis == axis:
                return cut.layout[axis] if len(cut.layout) > 1 else cut.layout[0]
        found = self.tensors.get(self.origins.get(name, name))
        return found.shape[axis] if found is not None and axis < len(found.shape) else None

    def _pinned(self, source: str, facts: FactTable) -> None:
        """One note for every refusal and for every pin that holds classes nothing else demands.

        Only classes that a value carries count: positions in a kernel are no channels.
        """
        rep, flowing = facts.classes.representative, _flowing(facts)
        live = live_labels(facts)
        pins: dict[tuple[str, str], list[Tensor]] = {}
        for pin in facts.labeller.table.pins:
            pins.setdefault((pin.site, pin.reason), []).append(pin.labels)
        held = {key: rep[torch.cat(labels)].unique() for key, labels in pins.items()}
        held = {key: classes[flowing[classes]] for key, classes in held.items()}
        for r in facts.refusals:
            classes = held.pop((r.node, r.reason.name), None)
            n = 0 if classes is None else classes.numel()
            self.notes.append(RefusalNote(r.node, r.reason.name, r.reason.value, r.detail, n, source))
        for (site, reason), classes in held.items():
            n = int((~live[classes]).sum())
            if n:
                text = Reason[reason].value if reason in Reason.__members__ else reason
                self.notes.append(RefusalNote(site, reason, text, "", n, source))

    def _tensor_plans(self, gm: fx.GraphModule) -> list[TensorPlan]:
        after = inventory(gm)
        by_name = {name: t for t in after.values() for name in (t.name, *t.aliases)}
        plans: list[TensorPlan] = []
        known: set[str] = set()
        for name, before in self.tensors.items():
            names = (name, *before.aliases)
            found = next((by_name[n] for n in names if n in by_name), None)
            known.update(names)
            plans.append(
                dataclasses.replace(
                    before,
                    status="kept" if found is not None else "removed",
                    kept_shape=found.shape if found is not None else None,
                    cuts=tuple(self.cuts.get(name, ())) if found is not None else (),
                )
            )
        created = [t for t in after.values() if not known & {t.name, *t.aliases}]
        return plans + [self._created(t) for t in created]

    def _created(self, made: TensorPlan) -> TensorPlan:
        name = next((n for n in (made.name, *made.aliases) if self.origins.get(n) in self.tensors), None)
        if name is None:
            return dataclasses.replace(made, status="created")
        cuts = tuple(self.cuts[name])
        return dataclasses.replace(made, status="created", cuts=cuts, origin=self.origins[name])


def _merged(notes: Iterable[RefusalNote]) -> list[RefusalNote]:
    """Each refusal once, with the largest number of channels."""
    found: dict[tuple[str, str, str, str], RefusalNote] = {}
    for note in notes:
        key = (note.node, note.reason, note.detail, note.source)
        if key not in found or found[key].n_channels < note.n_channels:
            found[key] = note
    return list(found.values())


def _flowing(facts: FactTable) -> Tensor:
    """Classes that some value of the graph carries, [labels] bool by representative."""
    found = torch.zeros(facts.labeller.table.size, dtype=torch.bool)
    for value, fields in facts.labeller.fields.items():
        if isinstance(value, fx.Node):
            for part in fields if isinstance(fields, tuple) else (fields,):
                for labels in part.values():
                    found[facts.classes.representative[labels]] = True
    return found


def revived(facts: FactTable) -> Counter[str]:
    """Classes that stay although nothing demands them, by the constraint that keeps them."""
    assert facts.demanded is not None
    classes, found = facts.classes, Counter[str]()
    pinned = int(dataclasses.replace(classes, blocks=()).close(facts.demanded).sum())
    in_blocks = int(dataclasses.replace(classes, multiple_of=1).close(facts.demanded).sum())
    if in_blocks > pinned:
        found[Reason.BLOCK_COUNT.name] = in_blocks - pinned
    if classes.multiple_of > 1 and int(facts.kept.sum()) > in_blocks:
        found[Reason.MULTIPLE_OF.name] = int(facts.kept.sum()) - in_blocks
    return found


def inventory(gm: nn.Module) -> dict[str, TensorPlan]:
    """Every parameter and buffer once, by its first name."""
    by_id: dict[int, TensorPlan] = {}
    named = [
        *((n, t, "parameter") for n, t in gm.named_parameters(remove_duplicate=False)),
        *((n, t, "buffer") for n, t in gm.named_buffers(remove_duplicate=False)),
    ]
    for name, tensor, role in named:
        known = by_id.get(id(tensor))
        if known is not None:
            by_id[id(tensor)] = dataclasses.replace(known, aliases=(*known.aliases, name))
        else:
            dtype, shape = str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape)
            by_id[id(tensor)] = TensorPlan(name, (), role, dtype, "kept", shape, shape)
    return {t.name: t for t in by_id.values()}


def _unread(source: nn.Module, gm: fx.GraphModule) -> list[TensorPlan]:
    """Tensors of the user's module that the captured graph has no use for; not masks, not single numbers."""
    read = {id(t) for t in (*gm.parameters(), *gm.buffers())}
    names = {
        n
        for n, _ in (*gm.named_parameters(remove_duplicate=False), *gm.named_buffers(remove_duplicate=False))
    }
    tensors = {**dict(source.named_parameters()), **dict(source.named_buffers())}
    found = []
    for plan in inventory(source).values():
        if not plan.shape or id(tensors.get(plan.name)) in read or {plan.name, _unmasked(plan.name)} & names:
            continue
        found.append(dataclasses.replace(plan, status="unread", kept_shape=None))
    return found


def _unmasked(name: str) -> str:
    parent, last = split_path(name)
    if ".parametrizations." in f".{name}":
        owner, _, tensor = f".{name}".rpartition(".parametrizations.")
        return f"{owner}.{tensor.split('.')[0]}".lstrip(".")
    for suffix in _MASK_SUFFIXES:
        if last.endswith(suffix):
            last = last.removesuffix(suffix)
            break
    return f"{parent}.{last}" if parent else last


def _layers(gm: fx.GraphModule, survey: Survey) -> tuple[dict[str, str], dict[str, int]]:
    """Class or op of each layer, and its FLOPs; a layer is a module, or where the tensors of an op live."""
    kinds: dict[str, str] = {}
    flops: Counter[str] = Counter()
    modules = dict(gm.named_modules(remove_duplicate=False))
    paths: dict[fx.Node, str] = {}
    for node in gm.graph.nodes:
        if node.op == "get_attr":
            paths[node] = split_path(str(node.target))[0]
        elif node.op == "call_module":
            paths[node] = str(node.target)
            kinds.setdefault(str(node.target), type(modules[str(node.target)]).__name__)
        elif node.op in ("call_function", "call_method"):
            read = [paths[n] for n in node.all_input_nodes if n.op == "get_attr"]
            paths[node] = read[0] if read else node.name
            if read or node in survey.flops:
                kinds.setdefault(paths[node], op_name(node))
        if node in survey.flops:
            flops[paths.get(node, node.name)] += survey.flops[node]
    return kinds, dict(flops)


def _edges(gm: fx.GraphModule) -> tuple[dict[str, list[str]], dict[str, str]]:
    """Who reads whom, and what each node does; stored tensors are no nodes here."""
    nodes = [n for n in gm.graph.nodes if n.op != "get_attr"]
    edges = {n.name: [s.name for s in n.all_input_nodes if s.op != "get_attr"] for n in nodes}
    modules = dict(gm.named_modules(remove_duplicate=False))
    ops = {
        n.name: type(modules[str(n.target)]).__name__
        if n.op == "call_module"
        else op_name(n)
        if n.op.startswith("call")
        else n.op
        for n in nodes
    }
    return edges, ops


def _digest(gm: fx.GraphModule) -> str:
    lines = [
        f"{n.op} {n.name} {_target_text(n.target)} {[s.name for s in n.all_input_nodes]}"
        for n in gm.graph.nodes
    ]
    lines += [f"{t.name} {t.shape} {t.dtype}" for t in inventory(gm).values()]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def _target_text(target: Any) -> str:
    """The same in every process (``repr`` of a function holds its address)."""
    if isinstance(target, (str, torch._ops.OpOverload)):
        return str(target)
    return f"{getattr(target, '__module__', '')}.{getattr(target, '__qualname__', type(target).__name__)}"


def _missing(names: Sequence[str], others: Sequence[str]) -> tuple[str, ...]:
    known = set(others)
    return tuple(n for n in names if n not in known)


def _spec(tensor: Tensor) -> TensorSpec:
    return TensorSpec(tuple(tensor.shape), tensor.dtype, str(tensor.device))
