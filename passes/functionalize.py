"""Replace in-place ops by functional ones, and let later readers of the written storage read the new value.

Before: y = x[:, :4]; y.mul_(2); return x + 1
After:  y = x[:, :4]; y' = y * 2; x' = slice_scatter(x, y', 1, 0, 4); return x' + 1

Exact: the same numbers in the same order (theory: Lemmas W1 to W3).
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn

from srfx.ir.aliases import AliasClasses, Kind, Link, alias_link, written_operand
from srfx.ir.attrs import free_path, get_attr, set_attr
from srfx.ir.clone import clone_structure
from srfx.ir.effects import is_mutating, op_name, updates_statistics
from srfx.ir.in_place import make_functional, mark
from srfx.ir.plan import Edit, Plan, Reason, Refusal
from srfx.ir.twins import (
    aten,
    can_scatter,
    fill_like,
    functional_target,
    has_plain_twin,
    is_fill,
    is_metadata_op,
    may_change_dtype,
    out_twin_exists,
    replace_call,
    scatter_back,
    split_getitem,
)
from srfx.passes.base import Pass, register_pass


@dataclass(frozen=True)
class Functionalize(Edit):
    """Replace one in-place op by its functional twin.

    Attributes:
        written: the operand it writes.
        chain: views from the storage's first node to the written operand, by sure links.
        stale: older names of the storage that are read later; these reads get the new value.
        casts: whether the twin's result must be cast back to the written tensor's dtype.
        is_written_again: whether the storage is written later: then the result must stay a view of it.
        own_module: whether the call gets a module of its own (other calls of the module stay in place).
        copies: whether what is copied must not lend its storage, since one of the two is written later.
    """

    written: str = ""
    chain: tuple[str, ...] = ()
    stale: tuple[str, ...] = ()
    casts: bool = False
    is_written_again: bool = False
    own_module: bool = False
    copies: bool = False


@register_pass("functionalize")
class FunctionalizePass(Pass):
    """Make in-place ops functional: ``add_``, ``+=``, ``inplace=True``, ``out=``, ``x[i] = y`` ...

    A write through a view (slice, select, transpose, view ...) becomes a scatter into its base; other views
    of the base that are read later are taken anew.  Storage is followed by alias classes, so a later reader
    under any name gets what the in-place program would give it.  A pass over a graph with several writes to
    one storage resolves them in program order, over several rounds.  What is copied over a tensor stands for it, and is
    copied for that if either is written later on: a write that has to stay must not reach the other.

    Refuses: MUTATION when the storage may be a graph input's or a parameter's (the write is observable), when
    a later reader may or may not share it (reshape, contiguous), when the view has no inverse here (expand,
    chunk), and when the op has no functional twin (random fills, resize_).
    """

    def __init__(self) -> None:
        self._classes: AliasClasses | None = None  # of the graph planned last, until its edits are applied

    def plan(self, gm: fx.GraphModule) -> Plan:
        """The writes that can be made functional now; see the class."""
        writers = [n for n in gm.graph.nodes if is_mutating(n) and not updates_statistics(n)]
        if not writers:
            return Plan()
        planner = _Planner(gm, writers)
        self._classes = planner.classes
        return planner.plan()

    def apply(self, gm: fx.GraphModule, edit: Edit) -> None:
        """Make one write functional."""
        assert isinstance(edit, Functionalize)
        assert self._classes is not None
        _apply(gm, edit, self._classes)

    def finish(self, gm: fx.GraphModule) -> None:
        """Forget what the plan knew."""
        self._classes = None


class _Refused(Exception):
    """Why a write stays."""


class _Planner:
    """Decides for every write of one graph."""

    def __init__(self, gm: fx.GraphModule, writers: list[fx.Node]) -> None:
        self.gm = gm
        self.writers = writers
        self.classes = AliasClasses(gm.graph)
        self.dtypes = _dtypes(gm)

    def plan(self) -> Plan:
        plan = Plan()
        waiting: set[fx.Node] = set()  # classes with a redirecting edit: later writes wait for the next round
        touched: set[fx.Node] = set()
        closed: dict[fx.Node, str] = {}  # classes with a refused write
        for node in self.writers:
            written = written_operand(node)
            top = self.classes.top(written) if written is not None else node
            if top in waiting:
                continue
            try:
                if top in closed:
                    raise _Refused(f"{closed[top]} writes the same storage in place")
                if written is None:
                    raise _Refused("it writes several tensors or none")
                edit = self.edit(node, written)
            except _Refused as refused:
                closed.setdefault(top, node.name)
                plan.refusals.append(Refusal(node.name, Reason.MUTATION, str(refused)))
                continue
            if edit.stale:
                waiting.add(top)
                if top in touched:
                    continue
            touched.add(top)
            plan.edits.append(edit)
        _share_modules(self.gm, self.writers, plan)
        return plan

    def edit(self, node: fx.Node, written: fx.Node) -> Functionalize:
        self.check_target(node)
        members = self.classes.members(written)
        for member in members:
            if member.op in ("placeholder", "get_attr"):
                what = "input" if member.op == "placeholder" else "parameter or buffer"
                raise _Refused(f"it may write {member.target}, a graph {what}")
        position = self.classes.position
        now = position[node]
        stale = [m for m in members if position[m] < now and any(position[u] > now for u in m.users)]
        stale = [m for m in stale if not self.classes.are_disjoint(m, written)]
        is_setitem = _is_setitem(node)
        chain = [written]
        if stale or is_setitem:
            if self.classes.kinds[written] is Kind.UNKNOWN and set(stale) - {written}:
                raise _Refused(f"{written.name} may be a number or a tensor")
            chain = self.shared_chain(written, stale)
            if is_metadata_op(node):
                raise _Refused(f"{op_name(node)} changes the shape under other names of the tensor")
            for view in chain[1:]:
                link = self.classes.link[view]
                if link is not None and link[1] is Link.VIEW and not can_scatter(view):
                    raise _Refused(f"the view {view.name} ({op_name(view)}) cannot be undone")
        casts = may_change_dtype(node, self.dtypes, self.classes.kinds)
        names = tuple(n.name for n in chain)
        later = [w for w in self.writers if position[w] > now]
        is_written_again = any(written_operand(w) in members for w in later)
        return Functionalize(
            node.name, written.name, names, tuple(n.name for n in stale), casts, is_written_again,
            copies=self.must_copy(node, written, later),
        )  # fmt: skip

    def must_copy(self, node: fx.Node, written: fx.Node, later: list[fx.Node]) -> bool:
        """Whether a later write (which may have to stay) concerns the tensor written, or one copied into it (Lemma W2)."""
        if not _is_setitem(node) and not is_fill(node):
            return False
        fields = {m for operand in {written, *node.all_input_nodes} for m in self.classes.members(operand)}
        return any(operand in fields for writer in later for operand in writer.all_input_nodes)

    def shared_chain(self, written: fx.Node, stale: list[fx.Node]) -> list[fx.Node]:
        """The views from the last node that ``written`` and all of ``stale`` come from, to ``written``."""
        chain = self.classes.chain(written)
        n_shared = len(chain)
        for member in stale:
            other = self.classes.chain(member)
            pairs = zip(chain, other, strict=False)
            n_shared = min(
                n_shared,
                next((i for i, (a, b) in enumerate(pairs) if a is not b), min(len(chain), len(other))),
            )
            if not n_shared:
                raise _Refused(f"{member.name}, read later, may or may not share storage with {written.name}")
        return chain[n_shared - 1 :]

    def check_target(self, node: fx.Node) -> None:
        if node.op == "call_module":
            return
        if _is_setitem(node):
            self.check_index(node.args[1])
        elif node.kwargs.get("out") is not None:
            if not out_twin_exists(node):
                raise _Refused(f"{node.target} has no form without out=")
        elif functional_target(node) is None:
            raise _Refused(f"{op_name(node)} has no functional twin")

    def check_index(self, index: Any) -> None:
        items = index if isinstance(index, (tuple, list)) else (index,)
        has_tensor = False
        for item in items:
            if isinstance(item, fx.Node):
                if self.classes.kinds[item] is Kind.UNKNOWN:
                    raise _Refused(f"the index {item.name} may be a number or a tensor")
                has_tensor |= self.classes.kinds[item] is Kind.TENSOR
            elif isinstance(item, bool) or not isinstance(item, (int, slice, type(None), type(Ellipsis))):
                raise _Refused(f"index {item!r} is not followed")
        if has_tensor and not all(isinstance(i, fx.Node) or i == slice(None) for i in items):
            raise _Refused("the index mixes tensors and slices")
        if has_tensor and any(isinstance(i, fx.Node) and self.classes.kinds[i] is Kind.SCALAR for i in items):
            raise _Refused("the index mixes tensors and numbers")


def _is_setitem(node: fx.Node) -> bool:
    return node.target is operator.setitem or (node.op == "call_method" and node.target == "__setitem__")


def _share_modules(gm: fx.GraphModule, writers: list[fx.Node], plan: Plan) -> None:
    """A module is switched only when all its calls go functional in this round; else each gets a copy."""
    planned = {edit.node for edit in plan.edits}
    partly = {get_attr(gm, str(n.target)) for n in writers if n.op == "call_module" and n.name not in planned}
    by_name = {n.name: n for n in writers if n.op == "call_module"}
    for i, edit in enumerate(plan.edits):
        node = by_name.get(edit.node)
        if node is not None and get_attr(gm, str(node.target)) in partly:
            plan.edits[i] = Functionalize(**{**vars(edit), "own_module": True})


def _apply(gm: fx.GraphModule, edit: Functionalize, classes: AliasClasses) -> None:
    nodes = {node.name: node for node in gm.graph.nodes}
    node = nodes[edit.node]
    # Not edit.written: an earlier edit of this round may have replaced it.  A module may be switched already.
    written = node.all_input_nodes[0] if node.op == "call_module" else written_operand(node)
    assert written is not None
    if node.op == "call_module":
        new = _functional_module(gm, node, edit.own_module)
    elif not (_is_setitem(node) or edit.casts) and has_plain_twin(node):
        node.meta = dict(written.meta) | {k: v for k, v in node.meta.items() if v is not None}
        make_functional(node, functional_target(node))
        new = node
    elif _is_setitem(node):
        new = _functional_setitem(gm.graph, node, classes.kinds)
    else:
        new = replace_call(node)
    if edit.copies and (new in node.all_input_nodes or alias_link(new, classes.kinds) is not None):
        with gm.graph.inserting_before(node):
            new = gm.graph.call_function(aten.clone.default, (new,))
    if new is not node:
        new.meta = dict(written.meta) | {k: v for k, v in node.meta.items() if v is not None}
        if edit.casts:
            with gm.graph.inserting_before(node):
                new = gm.graph.call_function(aten.type_as.default, (new, written))
            new.meta = dict(written.meta)
        node.replace_all_uses_with(new)
    if edit.stale:
        _Redirection(gm.graph, node, new, classes).run(edit, nodes)
    if new is not node:
        gm.graph.erase_node(node)


def _functional_module(gm: fx.GraphModule, node: fx.Node, needs_own: bool) -> fx.Node:
    module: Any = get_attr(gm, str(node.target))
    if needs_own:
        path = free_path(gm, f"{node.target}_functional")
        module = clone_structure(module)
        set_attr(gm, path, module)
        node.target = path
    assert isinstance(module, nn.Module)
    module.inplace = False  # type: ignore[assignment]
    mark(node, node.target)
    return node


def _functional_setitem(graph: fx.Graph, node: fx.Node, kinds: dict[fx.Node, Kind]) -> fx.Node:
    target, index, value = node.args
    assert isinstance(target, fx.Node)
    items = index if isinstance(index, (tuple, list)) else (index,)
    with graph.inserting_before(node):
        if any(isinstance(item, fx.Node) and kinds[item] is Kind.TENSOR for item in items):
            indices = [item if isinstance(item, fx.Node) else None for item in items]
            if not isinstance(value, fx.Node):
                value = graph.call_function(aten.new_full.default, (target, [], value))
            else:
                value = graph.call_function(aten.type_as.default, (value, target))
            return graph.call_function(aten.index_put.default, (target, indices, value))
        chain = split_getitem(graph, target, index)
        new = fill_like(graph, chain[-1] if chain else target, value)
        for view, parent in zip(reversed(chain), reversed([target, *chain[:-1]]), strict=True):
            new = scatter_back(graph, view, parent, new)
        return new


class _Redirection:
    """Gives every later reader of a storage its value after the write at ``node``."""

    def __init__(self, graph: fx.Graph, node: fx.Node, new: fx.Node, classes: AliasClasses) -> None:
        self.graph = graph
        self.node = node
        self.new = new
        self.classes = classes
        self.end = node if new is not node else node.next  # new nodes go before it
        self.renewed: dict[fx.Node, fx.Node] = {}

    def run(self, edit: Functionalize, nodes: dict[str, fx.Node]) -> None:
        chain = [nodes[name] for name in edit.chain]
        position = {
            n: i for i, n in enumerate(self.graph.nodes)
        }  # edits before this one may have added nodes
        now = position[self.node]
        readers = {
            old: [u for u in old.users if position[u] > now] for old in map(nodes.__getitem__, edit.stale)
        }
        own_readers = list(self.new.users)
        value = self.renewed[chain[-1]] = self.new
        for view, parent in zip(reversed(chain[1:]), reversed(chain[:-1]), strict=True):
            if self.classes.link[view] != (parent, Link.SAME):
                with self.graph.inserting_before(self.end):
                    value = scatter_back(self.graph, view, parent, value)
                value.meta = dict(parent.meta)
            self.renewed[parent] = value
        if (
            edit.is_written_again
        ):  # what the op returned must see the next write, so it is a view of the new base
            self.renewed = {chain[0]: value}
            view = self.renew(chain[-1])
            for user in own_readers:
                user.replace_input_with(self.new, view)
        for old, users in readers.items():
            for user in users:
                user.replace_input_with(old, self.renew(old))

    def renew(self, old: fx.Node) -> fx.Node:
        """The view ``old`` taken again on the renewed storage."""
        if old not in self.renewed:
            link = self.classes.link[old]
            assert link is not None
            source = self.renew(link[0])
            if link[1] is not Link.SAME:
                with self.graph.inserting_before(self.end):
                    source = self.graph.node_copy(old, lambda n: source if n is link[0] else n)
            self.renewed[old] = source
        return self.renewed[old]


def _dtypes(gm: fx.GraphModule) -> dict[fx.Node, torch.dtype | None]:
    """The dtype of every value, where metadata or the layers tell."""
    dtypes: dict[fx.Node, torch.dtype | None] = {}
    for node in gm.graph.nodes:
        dtypes[node] = _dtype(gm, node, dtypes)
    return dtypes


_SAME_DTYPE = frozenset(
    [
        "add", "sub", "mul", "truediv", "div", "relu", "relu6", "silu", "gelu", "tanh", "sigmoid",
        "hardswish", "hardtanh", "leaky_relu", "elu", "iadd", "isub", "imul", "itruediv", "add_", "sub_",
        "mul_", "div_", "relu_", "clone", "contiguous", "view", "reshape", "flatten", "permute",
        "transpose", "cat", "dropout", "max_pool2d", "avg_pool2d", "adaptive_avg_pool2d", "interpolate",
        "pad", "getitem", "slice", "select", "neg", "stack", "chunk", "split", "unsqueeze", "squeeze",
        "expand",
    ]
)  # fmt: skip


def _dtype(
    gm: fx.GraphModule, node: fx.Node, dtypes: dict[fx.Node, torch.dtype | None]
) -> torch.dtype | None:
    value = node.meta.get("val")
    if isinstance(value, torch.Tensor):
        return value.dtype
    operands = {dtypes[source] for source in node.all_input_nodes}
    common = operands.pop() if len(operands) == 1 else None
    if node.op == "get_attr":
        attribute = get_attr(gm, str(node.target))
        return attribute.dtype if isinstance(attribute, torch.Tensor) else None
    if node.op == "call_module":
        module = get_attr(gm, str(node.target))
        if not type(module).__module__.startswith("torch.nn.modules"):
            return None
        weight = next(module.parameters(), None)
        return weight.dtype if weight is not None else common
    if (
        node.op in ("call_function", "call_method")
        and op_name(node) in _SAME_DTYPE
        and "dtype" not in node.kwargs
    ):
        return common if common is not None and common.is_floating_point else None
    return None
