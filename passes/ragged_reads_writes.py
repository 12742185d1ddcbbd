"""Let each reader of a value take, and each writer of a sum bring, channels of its own.

Before: y1 = f(x);  y2 = g(x);  z = x + w         every tensor keeps the channels that any of its neighbours needs
After:  y1 = f(port(x));  y2 = g(port(x));  z = port(x) + port(w)

A port is the identity, with channels numbered anew (`srfx.ops.port`).  Compaction that follows cuts both sides of
it apart, and makes of it what is needed: nothing, a selection, a spread among constants.  A port stays only where
it saves more than it costs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from srfx.analysis import analyse
from srfx.ir.clone import clone_graph
from srfx.ir.plan import Edit, Plan
from srfx.ir.program import Param
from srfx.ir.shapes import hint_inputs, propagate
from srfx.ops.facts import FactTable
from srfx.ops.port import port
from srfx.passes.base import Pass, register_pass


@dataclass(frozen=True)
class OpenPort(Edit):
    """``node`` reads ``operand`` through a port along ``axis``."""

    operand: str = ""
    axis: int = 0
    absorbs: bool = False


@register_pass("ragged-reads-writes")
class RaggedReadsWrites(Pass):
    """Put ports where they make tensors smaller by more than their indices.

    Args:
        hints: one example or fake value for each placeholder; None takes metadata or probes.
        multiple_of: as for compaction.
    """

    takes_hints = True

    def __init__(self, hints: Sequence[Any] | None = None, multiple_of: int = 1) -> None:
        self.hints = hints
        self.multiple_of = multiple_of

    def plan(self, gm: fx.GraphModule) -> Plan:
        values = propagate(gm, self.hints if self.hints is not None else hint_inputs(gm))
        facts, sites = analyse(gm, values, self.multiple_of)
        edits: list[OpenPort] = []
        for site in sites:
            taken: set[fx.Node] = set()
            for p in site.rule.ports(site.call, facts.labeller):
                if p.operand not in taken and _is_one_vector(facts, p.operand, p.axis):
                    taken.add(p.operand)
                    edits.append(OpenPort(site.node.name, p.operand.name, p.axis, p.absorbs))
        while edits:
            paying = self._paying(gm, values, edits)
            if len(paying) == len(edits):
                break
            edits = paying
        return Plan(list(edits))

    def _paying(self, gm: fx.GraphModule, values: dict[fx.Node, Any], edits: list[OpenPort]) -> list[OpenPort]:
        """Those of the ports that save something when all of them are open."""
        trial = fx.GraphModule(gm, clone_graph(gm.graph))
        by_name = {n.name: v for n, v in values.items()}
        ports = {open_port(trial, e): e for e in edits}
        hints = {n: by_name[ports[n].operand if n in ports else n.name] for n in trial.graph.nodes}
        facts, _ = analyse(trial, hints, self.multiple_of)
        costs = class_bytes(facts)
        return [e for node, e in ports.items() if _saves(facts, node, e.axis, costs)]

    def apply(self, gm: fx.GraphModule, edit: Edit) -> None:
        assert isinstance(edit, OpenPort)
        open_port(gm, edit)


def open_port(gm: fx.GraphModule, edit: OpenPort) -> fx.Node:
    """Insert the port; returns its node."""
    nodes = {n.name: n for n in gm.graph.nodes}
    reader, operand = nodes[edit.node], nodes[edit.operand]
    with gm.graph.inserting_before(reader):
        node = gm.graph.create_node(
            "call_function", port, (operand, edit.axis, edit.absorbs), {}, f"{reader.name}_{operand.name}_port"
        )
    reader.replace_input_with(operand, node)
    return node


def _is_one_vector(facts: FactTable, node: fx.Node, axis: int) -> bool:
    """Whether the axis has one set of channels, alike along every other axis."""
    fields = facts.fields(node)
    if axis in fields and fields[axis].numel() != fields[axis].shape[axis]:
        return False
    return all(f.shape[axis] == 1 for a, f in fields.items() if a != axis)


def class_bytes(facts: FactTable) -> Tensor:
    """What one more channel of each class would cost in stored bytes, [labels] by representative."""
    found = torch.zeros(facts.labeller.table.size, dtype=torch.float64)
    rep = facts.classes.representative
    for param in facts.program.params():
        fields = facts.labeller.fields.get(param)
        if not isinstance(fields, dict) or not param.names:
            continue
        counts = [facts.count(fields, a) if a in fields else n for a, n in enumerate(param.shape)]
        for labels in fields.values():
            each = param.tensor.element_size()
            for d, n in enumerate(labels.shape):
                each *= counts[d] if n == 1 else 1
            found.index_add_(0, rep[labels].flatten(), torch.full((labels.numel(),), float(each), dtype=torch.float64))
    return found


def _saves(facts: FactTable, node: fx.Node, axis: int, costs: Tensor) -> bool:
    source = facts.program.value(node.args[0])  # type: ignore[arg-type]
    rep = facts.classes.representative
    here = rep[facts.fields(node)[axis].flatten()]
    has_here = facts.kept[here]
    fields = facts.fields(source)
    if axis in fields:
        there = rep[fields[axis].flatten()]
        has_there = facts.kept[there]
        saved = float(costs[there[has_here & ~has_there].unique()].sum())
    else:
        has_there = torch.ones_like(has_here)
        saved = 0.0
    if torch.equal(has_here, has_there):
        return False
    saved += float(costs[here[has_there & ~has_here].unique()].sum())
    n_index, is_spread = int(has_here.sum()), bool((has_here & ~has_there).any())
    spent = 4 * n_index + (facts.program.hints[node].element_size() * n_index if is_spread else 0)
    return saved > spent
