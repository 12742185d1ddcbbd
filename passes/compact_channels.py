"""Fold constants into their readers and cut dead channels out of every tensor of the graph.

The analysis (`srfx.analysis`) says what is kept; each op's rule says what that means for a call of it.  Edits are
carried out in four groups, and the graph computes the same after each:

1. fold      new weights and biases at the original sizes: nothing that is not live is read any more
2. compact   parameters lose rows and columns, arguments get their new sizes
3. restore   an output that lost constant channels gets them back
4. freeze    numbers read from shapes keep their original values
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx

from srfx.analysis import analyse
from srfx.analysis.calls import Site
from srfx.analysis.liveness import executed
from srfx.analysis.order import channel_ranks
from srfx.ir.attrs import drop_unused_attributes
from srfx.ir.editor import GraphEdit, GraphEditor
from srfx.ir.edits import Bypass, CompactTensor, FreezeSize, RestoreOutput, SetTensor
from srfx.ir.effects import is_mutating, updates_statistics
from srfx.ir.plan import Edit, Plan
from srfx.ir.program import Param
from srfx.ir.shapes import propagate
from srfx.lattice.movement import Fields
from srfx.ops.facts import FactTable
from srfx.passes.base import HintedPass, register_pass


@register_pass("compact-channels")
class CompactChannels(HintedPass):
    """Remove every dead channel; see the module's docstring.

    Args:
        hints: one example or fake value for each placeholder; None takes metadata or probes.
        multiple_of: keep channel counts a multiple of this where there are enough channels.
        values: values of all nodes of the graph as it is now, when they are known already.
    """

    def __init__(
        self,
        hints: Sequence[Any] | None = None,
        multiple_of: int = 1,
        values: dict[fx.Node, Any] | None = None,
    ) -> None:
        super().__init__(hints)
        self.multiple_of = multiple_of
        self.values = values
        self.facts: FactTable | None = None
        self._editor: GraphEditor | None = None

    def plan(self, gm: fx.GraphModule) -> Plan:
        values, self.values = self.values, None  # true of the first round only
        if values is None:
            values = propagate(gm, self.hints)
        facts, sites = analyse(gm, values, self.multiple_of)
        facts.ranks = channel_ranks(facts, sites)
        self.facts, self._editor = facts, GraphEditor(gm)
        with torch.no_grad():
            edits = plan_edits(facts, sites)
        facts.cache.clear()
        return Plan(list(edits), facts.refusals)

    def apply(self, gm: fx.GraphModule, edit: Edit) -> None:
        assert isinstance(edit, GraphEdit) and self._editor is not None
        edit.apply(self._editor)

    def finish(self, gm: fx.GraphModule) -> None:
        fold_integers(gm.graph)
        gm.graph.eliminate_dead_code(_is_impure)
        drop_unused_attributes(gm)


def plan_edits(facts: FactTable, sites: list[Site]) -> list[GraphEdit]:
    """All edits for the kept set in ``facts``, in the order in which they have to be applied."""
    present = set(executed(facts, sites))
    computed = [s for s in sites if s.node in present]
    fields = _fields_by_path(facts)
    fold = [_cut(facts, edit, fields) for s in computed for edit in s.rule.fold(s.call, facts)]
    written = {path: edit for edit in fold if isinstance(edit, SetTensor) for path in edit.paths}
    compact = _compact_tensors(facts, fields, written)
    # sizes are read of values that are not computed any more; what else is not computed may have lost everything
    counted = [s for s in sites if s.node in present or not isinstance(s.call.output, Tensor)]
    arguments = [
        e
        for s in counted
        for e in s.rule.compact(s.call, facts)
        if s.node in present or isinstance(e, FreezeSize)
    ]
    frozen = [e for e in arguments if isinstance(e, FreezeSize)]
    bypassed = [e for e in arguments if isinstance(e, Bypass)]  # else a call that reads both reads one twice
    edits = [
        *fold,
        *compact,
        *(e for e in arguments if not isinstance(e, (FreezeSize, Bypass))),
        *_restore(facts),
        *frozen,
        *bypassed,
    ]
    return edits + [e for s in computed for e in s.rule.loosen(s.call)] if edits else []


def _fields_by_path(facts: FactTable) -> dict[str, Fields]:
    """Labels of every stored tensor, and of those that folding may create, by attribute path."""
    found = dict(facts.labeller.slots)
    for param in facts.program.params():
        fields = facts.labeller.fields.get(param)
        if isinstance(fields, dict):
            found.update(dict.fromkeys(param.names, fields))
    return found


def _cut(facts: FactTable, edit: GraphEdit, fields: dict[str, Fields]) -> GraphEdit:
    """A new value is cut as soon as it is made, so that only one layer at a time stands at its original size."""
    if not isinstance(edit, SetTensor):
        return edit
    return replace(edit, tensor=facts.compact(edit.tensor, fields[edit.paths[0]], tuple(edit.tensor.shape)))


def _compact_tensors(
    facts: FactTable, fields: dict[str, Fields], written: dict[str, SetTensor]
) -> list[GraphEdit]:
    found: list[GraphEdit] = []
    for param in facts.program.params():
        names = tuple(param.names)
        if names and names[0] in fields:
            found += _selection(facts, names, fields[names[0]], param.shape, names[0] in written)
    for path, edit in written.items():
        if edit.creates:
            shape = facts.labeller.slots[path][0].shape
            found += _selection(facts, (path,), fields[path], tuple(shape), True)
    return found


def _selection(
    facts: FactTable, paths: tuple[str, ...], fields: Fields, shape: tuple[int, ...], is_done: bool
) -> list[GraphEdit]:
    steps = facts.steps(fields, shape)
    return [CompactTensor("", paths, tuple(steps), is_done)] if steps else []


def _restore(facts: FactTable) -> list[GraphEdit]:
    """Outputs that lost channels: where the kept ones go, and the constants of the others."""
    output = facts.program.gm.graph.output_node()
    found: list[GraphEdit] = []
    for node in output.all_input_nodes:
        value = facts.program.value(node)
        if isinstance(value, Param) or not facts.program.is_tensor(node):
            continue
        fields, shape = facts.fields(node), facts.program.shape(node)
        for axis in fields:
            if facts.changed(fields, axis, shape[axis]):
                found.append(_restore_axis(facts, output, node, axis))
    return found


def _restore_axis(facts: FactTable, output: fx.Node, node: fx.Node, axis: int) -> RestoreOutput:
    shape, hint = facts.program.shape(node), facts.program.hints[node]
    kept = facts.is_kept(facts.fields(node)[axis]).flatten()
    c = facts.constancy(node)
    varies = c.varies.expand([shape[axis] if a == axis else 1 for a in range(len(shape))]).flatten()
    layout = [-1 if a == axis else 1 for a in range(len(shape))]
    place = kept.cumsum(0) - 1
    # whatever the template covers reads one varying channel: a constant that stays for another reader may go later
    index = torch.where(varies, place, place[varies][:1] if bool(varies.any()) else 0)
    template = (
        c.value.double().expand([shape[axis] if a == axis else 1 for a in range(len(shape))]).to(hint.dtype)
    )
    device: Any = hint.device
    return RestoreOutput(
        output.name,
        node.name,
        axis,
        index.to(device),
        varies.view(layout).to(device),
        template.contiguous().to(device),
    )


def fold_integers(graph: fx.Graph) -> None:
    """Compute size arithmetic that has only literal operands left."""
    for node in list(graph.nodes):
        if node.op != "call_function" or node.kwargs or getattr(node.target, "__module__", "") != "_operator":
            continue
        if node.args and all(isinstance(a, int) for a in node.args):
            value = node.target(*node.args)
            replace_by_value(node, value)
        elif node.target is operator.getitem and isinstance(node.args[0], (tuple, list)):
            found: list[fx.Node] = []
            fx.node.map_arg(node.args[1], found.append)
            if not found:
                replace_by_value(node, node.args[0][node.args[1]])


def replace_by_value(node: fx.Node, value: Any) -> None:
    """Every use of the node becomes the value itself, and the node goes."""
    for user in list(node.users):
        user.args = fx.node.map_arg(user.args, lambda n: value if n is node else n)
        user.kwargs = fx.node.map_arg(user.kwargs, lambda n: value if n is node else n)
    node.graph.erase_node(node)


def _is_impure(node: fx.Node) -> bool:
    """Fx takes methods such as ``add_`` for pure; a write that could not be made functional stays."""
    from srfx.ops.registry import has_rule

    if is_mutating(node) and not updates_statistics(node):
        return True
    return node.op in ("placeholder", "output") or (
        (node.op.startswith("call") and not has_rule(node.target)) and node.is_impure()
    )


def all_tensors(gm: fx.GraphModule) -> dict[str, Tensor]:
    """Parameters and buffers by name, aliases included."""
    return {
        **dict(gm.named_parameters(remove_duplicate=False)),
        **dict(gm.named_buffers(remove_duplicate=False)),
    }
