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
from srfx.analysis.order import channel_ranks
from srfx.analysis.weights import class_bytes
from srfx.ir.clone import clone_graph
from srfx.ir.plan import Edit, Plan, Reason, Refusal
from srfx.ir.shapes import propagate
from srfx.ops.facts import FactTable
from srfx.ops.port import port
from srfx.passes._costed import CostedPass
from srfx.passes._machine_costs import MachineCosts
from srfx.passes._port_costs import (
    MARGIN,
    Cut,
    Shapes,
    class_seconds,
    cut_at,
    index_bytes,
    port_seconds,
    savings,
)
from srfx.passes.base import register_pass


@dataclass(frozen=True)
class OpenPort(Edit):
    """``node`` reads ``operand`` through a port along ``axis``."""

    operand: str = ""
    axis: int = 0
    absorbs: bool = False
    is_bound: bool = False


@register_pass("ragged-reads-writes")
class RaggedReadsWrites(CostedPass):
    """Put ports where they make stored tensors smaller by more than their indices, or a run faster.

    Args:
        hints: one example or fake value for each placeholder; None takes metadata or probes.
        multiple_of: as for compaction.
        machine: open only ports that are predicted to save time on this machine; None: those that save bytes.
        shapes: with ``machine``, the shapes to predict for, by the name of the node; None takes those of the hints.

    After a run ``predicted_s`` says how many seconds all ports together are predicted to save for the hints (only
    with ``machine``).

    Refuses: GROWS where a port costs more than it saves; BLOCK_COUNT where heads keep different channels;
    MUTATION where the operand is written in place.
    """

    def __init__(
        self,
        hints: Sequence[Any] | None = None,
        multiple_of: int = 1,
        machine: MachineCosts | None = None,
        shapes: Shapes | None = None,
    ) -> None:
        super().__init__(hints, multiple_of, machine)
        self.shapes = shapes or {}

    def plan(self, gm: fx.GraphModule) -> Plan:
        values = propagate(gm, self.hints)
        facts, sites = analyse(gm, values, self.multiple_of)
        found = Plan()
        ports = _candidates(facts, sites, found)
        while ports:
            judged, refused = self._judge(gm, values, ports)
            if refused:
                found.refusals += refused.values()
                ports = [e for e in ports if e not in refused]
                continue
            wasted = [e for e, (cut, gain) in judged.items() if not cut.is_trivial and gain <= 0]
            found.refusals += [_refusal(e, judged[e][0]) for e in wasted]
            if not wasted:
                useful = [e for e, (cut, _) in judged.items() if not cut.is_trivial]
                if len(useful) in (0, len(ports)):
                    found.edits += useful
                    break
                wasted = [
                    e for e in ports if e not in useful
                ]  # what is opened is judged as it will stand, without them
            ports = [e for e in ports if e not in wasted]
        return found

    def _judge(
        self, gm: fx.GraphModule, values: dict[fx.Node, Any], edits: list[OpenPort]
    ) -> tuple[dict[OpenPort, tuple[Cut, float]], dict[OpenPort, Refusal]]:
        """Both sides of each port when all of them are open, and what it gains; or those that cannot be open so."""
        trial = fx.GraphModule(gm, clone_graph(gm.graph))
        opened = {open_port(trial, e): e for e in edits}
        by_name = {n.name: v for n, v in values.items()}
        hints = {n: by_name[opened[n].operand if n in opened else n.name] for n in trial.graph.nodes}
        facts, sites = analyse(trial, hints, self.multiple_of)
        refused = {e: _refusal_beside(facts, node, e) for node, e in opened.items()}
        blocked = {e: refusal for e, refusal in refused.items() if refusal is not None}
        if blocked:
            return {}, blocked
        facts.ranks = channel_ranks(facts, sites)
        cuts = [cut_at(facts, node, e.axis) for node, e in opened.items()]
        if self.machine is None:
            saved, spent = savings(cuts, class_bytes(facts)), [index_bytes(facts, c) for c in cuts]
        else:
            shapes = dict(self.shapes)
            shapes |= {n.name: shapes[e.operand] for n, e in opened.items() if e.operand in shapes}
            saved = savings(cuts, class_seconds(facts, sites, self.machine, shapes))
            spent = [port_seconds(facts, c, self.machine, shapes) for c in cuts]
            self.predicted_s = sum(saved) - sum(spent)
            spent = [MARGIN * s for s in spent]
        return {e: (c, s - t) for e, c, s, t in zip(edits, cuts, saved, spent, strict=True)}, {}

    def apply(self, gm: fx.GraphModule, edit: Edit) -> None:
        assert isinstance(edit, OpenPort)
        open_port(gm, edit)


def open_port(gm: fx.GraphModule, edit: OpenPort) -> fx.Node:
    """Insert the port; returns its node."""
    nodes = {n.name: n for n in gm.graph.nodes}
    reader, operand = nodes[edit.node], nodes[edit.operand]
    name = f"{reader.name}_{operand.name}_port"
    args = (operand, edit.axis, edit.absorbs, edit.is_bound)
    with gm.graph.inserting_before(reader):
        node = gm.graph.create_node("call_function", port, args, {}, name)
    reader.replace_input_with(operand, node)
    return node


def _candidates(facts: FactTable, sites: list[Site], plan: Plan) -> list[OpenPort]:
    """A port for every operand whose reader may select, where its channels form one vector."""
    found: dict[tuple[str, str], OpenPort] = {}
    for site in sites:
        for p in site.rule.ports(site.call, facts):
            if not _is_one_vector(facts, p.operand, p.axis):
                plan.refusals.append(
                    Refusal(site.node.name, Reason.BLOCK_COUNT, f"{p.operand.name} has blocks")
                )
                continue
            edit = OpenPort(site.node.name, p.operand.name, p.axis, p.absorbs, p.is_bound)
            found.setdefault((edit.node, edit.operand), edit)
    return list(found.values())


def _is_one_vector(facts: FactTable, node: fx.Node, axis: int) -> bool:
    """Whether the axis has one set of channels, alike along every other axis.

    Channels that are there several times (heads of every picture of a batch) stand on an axis of run-time size.
    """
    fields = facts.fields(node)
    if axis in fields and fields[axis].unique().numel() != facts.program.shape(node)[axis]:
        return False
    if axis in fields and fields[axis].numel() != fields[axis].shape[axis]:
        return False
    return all(f.shape[axis] == 1 for a, f in fields.items() if a != axis)


def _refusal_beside(facts: FactTable, node: fx.Node, edit: OpenPort) -> Refusal | None:
    """Why a port cannot be open beside the others: it is followed no more, or its operand has several vectors then."""
    operand = node.args[0]
    assert isinstance(operand, fx.Node)
    if edit.axis not in facts.fields(node):
        return Refusal(edit.node, Reason.MUTATION, f"{edit.operand} is written in place")
    if not _is_one_vector(facts, operand, edit.axis):
        return Refusal(edit.node, Reason.BLOCK_COUNT, f"{edit.operand} has blocks behind another port")
    return None


def _refusal(edit: OpenPort, cut: Cut) -> Refusal:
    n = int((cut.inside != cut.outside).sum())
    return Refusal(edit.node, Reason.GROWS, f"{n} channels of {edit.operand} are not worth an index")
