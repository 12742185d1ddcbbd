"""Sort the heads of an attention into a few groups of one width, each with projections and a product of its own.

Before: y = o_proj(heads(x))                              every head is as wide as the widest
After:  y = o_proj'(cat([heads_0(x), heads_1(x)], -1))    heads_i computes all heads, and o_proj' reads those of group i

Everything from the projections of q, k and v to the value in which the heads are merged is written once more for each
group, with parameters of its own, and the weight of the output projection is written once for each group, with zeros
in the columns of other groups' heads.  So nothing reads these, and compaction, which follows, cuts them with all that
is theirs: rows of projections, keys and values of a group, rotary tables, masks (theory: Lemma A9).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from srfx.analysis import analyse
from srfx.analysis.calls import Site
from srfx.ir.attrs import free_path, get_attr, set_attr, split_path
from srfx.ir.clone import clone_structure
from srfx.ir.editor import put_tensor, take
from srfx.ir.edits import CompactTensor
from srfx.ir.plan import Edit, Plan, Reason, Refusal
from srfx.ir.program import Param, named_tensors
from srfx.ir.shapes import hint_inputs, propagate
from srfx.ops.attention import Attention, Product
from srfx.ops.contraction import Contraction
from srfx.ops.facts import FactTable
from srfx.ops.registry import rule_of
from srfx.passes._costed import CostedPass
from srfx.passes._head_costs import (
    MAX_GROUPS,
    HeadCosts,
    Shapes,
    lanes_of,
    seconds,
    size_bytes,
    sort_into_groups,
    widths,
)
from srfx.passes._head_regions import Region, own_tensors_of, regions
from srfx.passes._machine_costs import MachineCosts
from srfx.passes._port_costs import MARGIN
from srfx.passes.base import register_pass

Sites = dict[fx.Node, Site]


@dataclass(frozen=True)
class GroupHeads(Edit):
    """The heads that the projection ``node`` reads are computed group by group.

    Attributes:
        merged: the value in which they are merged.
        inside: the calls that are written once for each group, ``merged`` last.
        groups: the channels of ``merged`` that each group has; the first group keeps the calls that are there.
        copied: paths of the tensors of which each group has its own.
        weight: names of the projection's weight.
        column_axis: the axis of that weight along which it reads.
        first: the column that reads the first channel of ``merged``.
        dim: the axis of the channels of ``merged``, counted from the right.
    """

    merged: str = ""
    inside: tuple[str, ...] = ()
    groups: tuple[tuple[int, ...], ...] = ()
    copied: tuple[str, ...] = ()
    weight: tuple[str, ...] = ()
    column_axis: int = 1
    first: int = 0
    dim: int = -1

    @property
    def n_channels(self) -> int:
        """Channels of ``merged``."""
        return sum(map(len, self.groups))

    def columns(self, n_before: int) -> CompactTensor:
        """Where the columns of the new weight come from."""
        own = list(range(self.first, self.first + self.n_channels)) * len(self.groups)
        index = [*range(self.first), *own, *range(self.first + self.n_channels, n_before)]
        return CompactTensor(self.node, self.weight, ((self.column_axis, torch.tensor(index)),))

    def is_read(self, n_before: int) -> Tensor:
        """Columns of the new weight that are not 0: each group's own, and those of other values."""
        found = torch.ones(n_before + (len(self.groups) - 1) * self.n_channels, dtype=torch.bool)
        for i, group in enumerate(self.groups):
            start = self.first + i * self.n_channels
            found[start : start + self.n_channels] = False
            found[start + torch.tensor(group)] = True
        return found


@register_pass("group-heads")
class GroupHeadsPass(CostedPass):
    """Give heads of other widths calls of their own, where that takes less time than multiplying zeros.

    Args:
        hints: one example or fake value for each placeholder; None takes metadata or probes.
        multiple_of: as for compaction.
        machine: what calls and multiplications cost; None takes the numbers of a common core.
        examples: inputs whose shapes to predict for; None takes the hints, which may be of other sizes.

    After a run ``predicted_s`` says how many seconds the groups are predicted to save, and ``widened`` where the columns of
    output projections have gone, ``copied`` which tensors are copies of which, by their paths.

    Refuses: GROWS where calls cost more than they save, or a group would keep heads of another; SHARED_WEIGHT where a
    projection is used elsewhere too.
    """

    def __init__(
        self,
        hints: Sequence[Any] | None = None,
        multiple_of: int = 1,
        machine: MachineCosts | None = None,
        examples: list[Any] | None = None,
    ) -> None:
        super().__init__(hints, multiple_of, machine)
        self.costs = HeadCosts.of(machine)
        self.examples = examples
        self.widened: list[CompactTensor] = []
        self.copied: dict[str, str] = {}
        self.shapes: Shapes = {}

    def plan(self, gm: fx.GraphModule) -> Plan:
        """Every attention whose heads differ, in graph order."""
        self.predicted_s, self.widened, self.copied, self.shapes = 0.0, [], {}, {}
        if not has_products(gm):
            return Plan()
        hints = self.hints if self.hints is not None else hint_inputs(gm)
        facts, sites = self._analyse(gm, hints)
        plan, taken = Plan(), set[fx.Node]()
        found: list[tuple[GroupHeads, Region]] = []
        for region in regions(facts, sites):
            calls = {*region.nodes, region.reader.node}
            edit = self._sorted(gm, facts, sites, region)
            if isinstance(edit, Refusal):
                plan.refusals.append(edit)
            elif edit is not None and not calls & taken:  # else it waits for the next round
                taken |= calls
                found.append((edit, region))
        gains = self._gains(gm, list(hints), facts, sites, found) if found else []
        for (edit, _), gain in zip(found, gains, strict=True):
            if gain > 0:
                plan.edits.append(edit)
            else:
                plan.refusals.append(Refusal(edit.node, Reason.GROWS, f"groups of heads of {edit.merged}"))
        return plan

    def apply(self, gm: fx.GraphModule, edit: Edit) -> None:
        """Write the groups of one attention."""
        assert isinstance(edit, GroupHeads)
        n_before = get_attr(gm, edit.weight[0]).shape[edit.column_axis]
        write_groups(gm, edit, paths=self.copied)
        self.widened.append(edit.columns(n_before))

    def _analyse(self, gm: fx.GraphModule, hints: Sequence[Any]) -> tuple[FactTable, Sites]:
        facts, found = analyse(gm, propagate(gm, hints), self.multiple_of)
        return facts, {site.node: site for site in found}

    def _shapes(self, gm: fx.GraphModule) -> Shapes:
        """The shapes to predict for; asked for only where heads differ."""
        if self.examples is None:
            return {}
        values = propagate(gm, self.examples)
        return {n.name: tuple(v.shape) for n, v in values.items() if isinstance(v, Tensor)}

    def _sorted(
        self, gm: fx.GraphModule, facts: FactTable, sites: Sites, region: Region
    ) -> GroupHeads | Refusal | None:
        """The groups of one attention; None where all heads need the same."""
        lanes = lanes_of(facts, region, sites, self.costs, {})
        counts = widths(facts, lanes, self.multiple_of)
        is_read = torch.isin(torch.arange(region.n_heads), region.head_of)  # a port may have left heads out
        alive = (is_read & (counts > 0).any(0)).nonzero().flatten()
        room = MAX_GROUPS + 1 - region.n_parts
        if room < 2 or alive.numel() < 2 or bool((counts[:, alive] == counts[:, alive[:1]]).all()):
            return None
        self.shapes = self.shapes or self._shapes(gm)
        lanes = lanes_of(facts, region, sites, self.costs, self.shapes)
        call_s = MARGIN * self.costs.of_groups(len(region.nodes))
        runs = sort_into_groups(counts[:, alive], [axis.each_s for axis in lanes], call_s, room)
        name = region.reader.node.name
        if len(runs) == 1:
            detail = f"heads of {_range(counts[:, alive])} lanes are not worth a call of their own"
            return Refusal(name, Reason.GROWS, detail)
        copied = own_tensors_of(region, facts, sites)
        if isinstance(copied, Reason):
            return Refusal(name, copied, f"projections of {region.merged.name}")
        return _edit(region, [alive[run].tolist() for run in runs], tuple(copied))

    def _gains(
        self,
        gm: fx.GraphModule,
        hints: list[Any],
        facts: FactTable,
        sites: Sites,
        found: Sequence[tuple[GroupHeads, Region]],
    ) -> list[float]:
        """Seconds that each edit saves with a margin, by what is kept when all of them are carried out; 0 if it grows."""
        trial = clone_structure(gm)
        assert isinstance(trial, fx.GraphModule)
        names = [write_groups(trial, edit, shares=True) for edit, _ in found]
        shapes = dict(self.shapes)
        for copies in names:
            shapes |= {new: shapes[old] for copy in copies for old, new in copy.items() if old in shapes}
        after, sites_after = self._analyse(trial, hints)
        by_name = {n.name: site for n, site in sites_after.items()}
        gains: list[float] = []
        for (edit, region), copies in zip(found, names, strict=True):
            inside = [sites[n] for n in region.nodes] + [region.reader]
            written = [*edit.inside, edit.node, *(new for copy in copies for new in copy.values())]
            now = [by_name[name] for name in written]
            saved_s = seconds(facts, inside, self.costs, self.shapes) - seconds(
                after, now, self.costs, shapes
            )
            spent_s = len(copies) * self.costs.of_groups(len(region.nodes))
            is_smaller = size_bytes(after, now) <= size_bytes(facts, inside)
            gains.append(saved_s - MARGIN * spent_s if is_smaller else 0.0)
            self.predicted_s += saved_s - spent_s if gains[-1] > 0 else 0.0
        return gains


def has_products(gm: fx.GraphModule) -> bool:
    """Whether a graph may have heads at all."""
    modules = dict(gm.named_modules(remove_duplicate=False))
    calls = (n for n in gm.graph.nodes if n.op.startswith("call"))
    return any(isinstance(rule_of(n, modules), (Attention, Product)) for n in calls)


def _range(counts: Tensor) -> str:
    return " and ".join(f"{int(c.min())} to {int(c.max())}" for c in counts)


def _edit(region: Region, groups: list[list[int]], copied: tuple[str, ...]) -> GroupHeads:
    """Heads that nobody needs are the first group's."""
    reader = region.reader
    rule, call = reader.rule, reader.call
    assert isinstance(rule, Contraction)
    weight = rule.w(call)
    assert isinstance(weight, Param)
    others = torch.tensor([h for group in groups[1:] for h in group])
    channels = [~torch.isin(region.head_of, others)]
    channels += [torch.isin(region.head_of, torch.tensor(group)) for group in groups[1:]]
    return GroupHeads(
        reader.node.name,
        region.merged.name,
        tuple(n.name for n in region.nodes),
        tuple(tuple(c.nonzero().flatten().tolist()) for c in channels),
        copied,
        tuple(weight.names),
        1 - rule.row_axis(call),
        region.first,
        rule.channel_axis(call) - len(call.out_shape),
    )


# ---------------------------------------------------------------------- writing
def write_groups(
    gm: fx.GraphModule, edit: GroupHeads, shares: bool = False, paths: dict[str, str] | None = None
) -> list[dict[str, str]]:
    """Carry out an edit.

    Args:
        gm: the graph module.
        edit: planned for it.
        shares: whether the groups' tensors may share memory, where nobody is going to write.
        paths: gets the path of each copied tensor, and the one that it is a copy of.

    Returns:
        For each group but the first the names of its calls, by those of the first.
    """
    nodes = {n.name: n for n in gm.graph.nodes}
    reader, merged = nodes[edit.node], nodes[edit.merged]
    inside = [nodes[name] for name in edit.inside]
    copied = {id(get_attr(gm, path)) for path in edit.copied}
    before = merged.next
    written = [_Copy(gm, copied, shares) for _ in edit.groups[1:]]
    copies = [copy.write(inside, before) for copy in written]
    _join(reader, merged, [copy[merged] for copy in copies], edit.dim)
    _widen(gm, reader, edit)
    if paths is not None:
        for copy in written:
            paths |= copy.paths
    return [{old.name: new.name for old, new in copy.items()} for copy in copies]


class _Copy:
    """One more of some calls, with tensors of its own."""

    def __init__(self, gm: fx.GraphModule, copied: set[int], shares: bool) -> None:
        self.gm, self.copied, self.shares = gm, copied, shares
        self._parents: dict[str, str] = {}
        self._modules: dict[str, str] = {}
        self._tensors: dict[int, Tensor] = {}
        self.paths: dict[str, str] = {}

    def write(self, inside: list[fx.Node], before: fx.Node) -> dict[fx.Node, fx.Node]:
        """New calls in front of ``before``, by the old ones."""
        new: dict[fx.Node, fx.Node] = {}
        read: dict[fx.Node, fx.Node] = {}
        with self.gm.graph.inserting_before(before):
            for node in inside:
                for source in node.all_input_nodes:
                    if source.op == "get_attr" and source not in read:
                        read[source] = self._read(source)
                new[node] = self.gm.graph.node_copy(node, lambda n: new.get(n, read.get(n, n)))
                if node.op == "call_module":
                    new[node].target = self._module(str(node.target))
        return new

    def _read(self, source: fx.Node) -> fx.Node:
        tensor = get_attr(self.gm, str(source.target))
        if id(tensor) not in self.copied:
            return source
        parent, name = split_path(str(source.target))
        if parent not in self._parents:
            self._parents[parent] = free_path(self.gm, parent) if parent else ""
        path = free_path(self.gm, f"{self._parents[parent]}.{name}" if parent else name)
        set_attr(self.gm, path, self._own(tensor))
        self.paths[path] = str(source.target)
        return self.gm.graph.get_attr(path)

    def _module(self, path: str) -> str:
        module = self.gm.get_submodule(path)
        if not any(id(t) in self.copied for t in (*module.parameters(), *module.buffers())):
            return path
        if path not in self._modules:
            own = clone_structure(module, lambda t: self._own(t) if id(t) in self.copied else t)
            self._modules[path] = free_path(self.gm, path)
            set_attr(self.gm, self._modules[path], own)
            for name, tensor in named_tensors(module):
                if id(tensor) in self.copied:
                    self.paths[f"{self._modules[path]}.{name}"] = f"{path}.{name}"
        return self._modules[path]

    def _own(self, tensor: Tensor) -> Tensor:
        """The group's own copy, one for all sites of the tensor."""
        if id(tensor) not in self._tensors:
            new = tensor.detach() if self.shares else tensor.detach().clone()
            is_parameter = isinstance(tensor, nn.Parameter)
            self._tensors[id(tensor)] = nn.Parameter(new, tensor.requires_grad) if is_parameter else new
        return self._tensors[id(tensor)]


def _join(reader: fx.Node, merged: fx.Node, copies: list[fx.Node], dim: int) -> None:
    """The reader reads the groups side by side: beside what it reads already, or joined here."""
    joined = next((n for n in reader.all_input_nodes if merged in n.all_input_nodes), None)
    if merged in reader.all_input_nodes:
        is_aten = isinstance(reader.target, torch._ops.OpOverload)
        with reader.graph.inserting_before(reader):
            target = torch.ops.aten.cat.default if is_aten else torch.cat
            cat = reader.graph.call_function(target, ([merged, *copies], dim))
        reader.replace_input_with(merged, cat)
        return
    assert joined is not None

    def wider(argument: Any) -> Any:
        if not isinstance(argument, (list, tuple)) or merged not in argument:
            return argument
        return [part for old in argument for part in ([old, *copies] if old is merged else [old])]

    joined.args = tuple(wider(a) for a in joined.args)
    joined.kwargs = {k: wider(v) for k, v in joined.kwargs.items()}


def _widen(gm: fx.GraphModule, reader: fx.Node, edit: GroupHeads) -> None:
    """The weight has the columns of each group, and zeros beside them."""
    old = get_attr(gm, edit.weight[0])
    n_before = old.shape[edit.column_axis]
    ((axis, index),) = edit.columns(n_before).selections
    is_read = edit.is_read(n_before).to(old.device)
    layout = [-1 if a == axis else 1 for a in range(old.dim())]
    new = torch.where(is_read.view(layout), take(old.detach(), axis, index), 0)
    put_tensor(gm, edit.weight, new.contiguous(), like=old)
    if reader.op == "call_module":
        module = gm.get_submodule(str(reader.target))
        for name in ("in_features", "in_channels"):
            if hasattr(module, name):
                setattr(module, name, index.numel())
