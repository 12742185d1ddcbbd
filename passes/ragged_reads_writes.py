"""Let each reader of a value take, and each operand of a sum bring, channels of its own.

Before: y1 = f(x);  y2 = g(x);  z = x + w         every tensor keeps the channels that any of its neighbours needs
After:  y1 = f(port(x));  y2 = g(port(x));  z = port(x) + port(w)

A port is the identity, with channels numbered anew (`srfx.ops.port`).  Compaction, which follows, cuts both sides of
it apart, and makes of it what is needed: nothing, a selection, a spread among constants.  A port is opened only where
it saves more bytes than its index takes (theory: Lemmas G1 to G4).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import fx

from srfx.analysis import analyse
from srfx.analysis.calls import Site
from srfx.ir.clone import clone_graph
from srfx.ir.plan import Edit, Plan, Reason, Refusal
from srfx.ir.shapes import hint_inputs, propagate
from srfx.ops.facts import FactTable
from srfx.ops.port import port
from srfx.passes._port_costs import Cut, class_bytes, cut_at
from srfx.passes.base import Pass, register_pass


@dataclass(frozen=True)
class OpenPort(Edit):
    """``node`` reads ``operand`` through a port along ``axis``."""

    operand: str = ""
    axis: int = 0
    absorbs: bool = False


@register_pass("ragged-reads-writes")
class RaggedReadsWrites(Pass):
    """Put ports where they make stored tensors smaller by more than their indices.

    Args:
        hints: one example or fake value for each placeholder; None takes metadata or probes.
        multiple_of: as for compaction.
        values: values of all nodes of the graph as it is now, when they are known already.

    Refuses: GROWS where the index takes more than the channels; BLOCK_COUNT where heads keep different channels.
    """

    takes_hints = True

    def __init__(
        self,
        hints: Sequence[Any] | None = None,
        multiple_of: int = 1,
        values: dict[fx.Node, Any] | None = None,
    ) -> None:
        self.hints = hints
        self.multiple_of = multiple_of
        self.values = values

    def plan(self, gm: fx.GraphModule) -> Plan:
        values, self.values = self.values, None  # true of the first round only
        if values is None:
            values = propagate(gm, self.hints if self.hints is not None else hint_inputs(gm))
        facts, sites = analyse(gm, values, self.multiple_of)
        found = Plan()
        ports = _candidates(facts, sites, found)
        while ports:
            cuts = self._solve(gm, values, ports)
            wasted = [e for e, (cut, is_paying) in cuts.items() if not (cut.is_trivial or is_paying)]
            found.refusals += [_refusal(e, cuts[e][0]) for e in wasted]
            ports = [e for e in ports if e not in wasted]
            if not wasted:
                found.edits += [e for e in ports if cuts[e][1]]
                break
        return found

    def _solve(
        self, gm: fx.GraphModule, values: dict[fx.Node, Any], edits: list[OpenPort]
    ) -> dict[OpenPort, tuple[Cut, bool]]:
        """Both sides of each port when all of them are open, and whether it saves anything."""
        trial = fx.GraphModule(gm, clone_graph(gm.graph))
        opened = {open_port(trial, e): e for e in edits}
        by_name = {n.name: v for n, v in values.items()}
        hints = {n: by_name[opened[n].operand if n in opened else n.name] for n in trial.graph.nodes}
        facts, _ = analyse(trial, hints, self.multiple_of)
        costs = class_bytes(facts)
        found = {}
        for node, e in opened.items():
            cut = cut_at(facts, node, e.axis)
            constants = facts.constancy(node)
            spent = cut.size_bytes
            if cut.n_supplied() and bool(constants.nonzero().any()):
                spent += facts.program.hints[node].element_size() * int(cut.inside.sum())
            found[e] = (cut, not cut.is_trivial and cut.saved(costs) > spent)
        return found

    def apply(self, gm: fx.GraphModule, edit: Edit) -> None:
        assert isinstance(edit, OpenPort)
        open_port(gm, edit)


def open_port(gm: fx.GraphModule, edit: OpenPort) -> fx.Node:
    """Insert the port; returns its node."""
    nodes = {n.name: n for n in gm.graph.nodes}
    reader, operand = nodes[edit.node], nodes[edit.operand]
    name = f"{reader.name}_{operand.name}_port"
    with gm.graph.inserting_before(reader):
        node = gm.graph.create_node("call_function", port, (operand, edit.axis, edit.absorbs), {}, name)
    reader.replace_input_with(operand, node)
    return node


def _candidates(facts: FactTable, sites: list[Site], plan: Plan) -> list[OpenPort]:
    """A port for every operand whose reader may select, where its channels form one vector."""
    found: dict[tuple[str, str], OpenPort] = {}
    for site in sites:
        for p in site.rule.ports(site.call, facts.labeller):
            if not _is_one_vector(facts, p.operand, p.axis):
                plan.refusals.append(
                    Refusal(site.node.name, Reason.BLOCK_COUNT, f"{p.operand.name} has blocks")
                )
                continue
            edit = OpenPort(site.node.name, p.operand.name, p.axis, p.absorbs)
            found.setdefault((edit.node, edit.operand), edit)
    return list(found.values())


def _is_one_vector(facts: FactTable, node: fx.Node, axis: int) -> bool:
    """Whether the axis has one set of channels, alike along every other axis."""
    fields = facts.fields(node)
    if axis in fields and fields[axis].numel() != fields[axis].shape[axis]:
        return False
    return all(f.shape[axis] == 1 for a, f in fields.items() if a != axis)


def _refusal(edit: OpenPort, cut: Cut) -> Refusal:
    n = int((cut.inside != cut.outside).sum())
    return Refusal(
        edit.node, Reason.GROWS, f"an index to leave out {n} channels of {edit.operand} takes more"
    )
