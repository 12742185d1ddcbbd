"""What a port saves and what it costs: bytes of stored tensors, or seconds of a run."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from srfx.analysis.calls import Site
from srfx.analysis.liveness import executed
from srfx.analysis.weights import add_to_classes
from srfx.ops.contraction import Contraction
from srfx.ops.facts import FactTable
from srfx.ops.port import selection_before
from srfx.ops.sizes import is_range
from srfx.passes._machine_costs import MachineCosts

INDEX_BYTES = 4
MARGIN = 1.5
"""A port has to save this many times the seconds that it is predicted to take."""


@dataclass(frozen=True)
class Cut:
    """The channels on both sides of a port, bool [C], and the classes they belong to, [C]."""

    node: fx.Node
    axis: int
    inside: Tensor
    outside: Tensor
    inner: Tensor
    outer: Tensor | None  # None: the operand's axis carries no channels, all of them are there
    is_slice: bool = False  # what is selected or spread stands side by side (srfx.analysis.order)

    @property
    def is_trivial(self) -> bool:
        """Whether both sides keep the same channels."""
        return torch.equal(self.inside, self.outside)

    @property
    def n_supplied(self) -> int:
        """Channels of the reader that a stored tensor supplies."""
        return int((self.inside & ~self.outside).sum())

    @property
    def n_selected(self) -> int:
        """Channels that an index_select takes; 0 when the operand is taken whole."""
        return int((self.inside & self.outside).sum()) if bool((self.outside & ~self.inside).any()) else 0

    def returning(self) -> Tensor:
        """Classes that would be kept again, were both sides to keep the same channels."""
        found: Tensor = self.inner[self.outside & ~self.inside]
        if self.outer is not None:
            found = torch.cat([found, self.outer[self.inside & ~self.outside]])
        classes: Tensor = found.unique()
        return classes


def cut_at(facts: FactTable, node: fx.Node, axis: int) -> Cut:
    """The two sides of the port ``node``."""
    source = facts.program.value(node.args[0])  # type: ignore[arg-type]
    rep = facts.classes.representative
    inner = rep[facts.fields(node)[axis].flatten()]
    fields = facts.fields(source)
    if axis not in fields:
        inside = facts.kept[inner]
        return Cut(
            node, axis, inside, torch.ones_like(inside), inner, None, is_range(inside.nonzero().flatten())
        )
    outer = rep[fields[axis].flatten()]
    inside, outside = facts.kept[inner], facts.kept[outer]
    is_filled = bool((inside & ~outside).any())
    places = facts.index(facts.fields(node), axis) if is_filled else facts.index(fields, axis)
    is_slice = is_range((inside & outside)[places].nonzero().flatten())
    return Cut(node, axis, inside, outside, inner, outer, is_slice)


def savings(cuts: Sequence[Cut], costs: Tensor) -> list[float]:
    """What each port saves, in units of ``costs`` [labels]; a class that several ports leave out is shared among them."""
    returning = [cut.returning() for cut in cuts]
    n_ports = torch.zeros_like(costs)
    for classes in returning:
        n_ports[classes] += 1
    share = costs / n_ports.clamp(min=1)
    return [float(share[classes].sum()) for classes in returning]


# ---------------------------------------------------------------------- bytes
def index_bytes(facts: FactTable, cut: Cut) -> float:
    """Bytes of the indices and numbers that the port becomes."""
    size = 0 if cut.is_slice else INDEX_BYTES * cut.n_selected
    if cut.n_supplied:
        size += 0 if cut.is_slice else INDEX_BYTES * int((cut.inside & cut.outside).sum())
        if bool(facts.constancy(cut.node).nonzero().any()):
            size += facts.program.hints[cut.node].element_size() * int(cut.inside.sum())
    operand = cut.node.args[0]
    assert isinstance(operand, fx.Node)
    if len(operand.users) == 1 and selection_before(operand, cut.axis, facts) is not None:
        size -= INDEX_BYTES * cut.inside.numel()  # the index that is there already goes
    return size


# ---------------------------------------------------------------------- seconds
Shapes = Mapping[str, tuple[int, ...]]
"""Shapes of values for the examples, by the name of the node; the analysis may see other sizes."""


def class_seconds(facts: FactTable, sites: list[Site], machine: MachineCosts, shapes: Shapes) -> Tensor:
    """Seconds that one more channel of each class would take at least, [labels] by representative.

    What holds eagerly and compiled: products, and their results, which are written and read once.  A compiler fuses the
    elementwise ops that stand between two products.
    """
    found = torch.zeros(facts.labeller.table.size, dtype=torch.float64)
    present = set(executed(facts, sites))
    for site in sites:
        fields, hint = facts.labeller.fields.get(site.node), facts.program.hints.get(site.node)
        if site.node not in present or not isinstance(hint, Tensor) or not isinstance(fields, dict):
            continue
        if not isinstance(site.rule, Contraction):
            continue
        if site.rule.refused(site.call) is None:
            _add_products(facts, site, found, machine, shapes)
        for axis, labels in fields.items():
            n_bytes = hint.element_size() * _others(facts, site.node, axis, shapes)
            each = 2 * machine.byte_s * n_bytes * labels.shape[axis] / labels.numel()
            add_to_classes(facts, found, labels, each)
    return found


def _add_products(facts: FactTable, site: Site, found: Tensor, machine: MachineCosts, shapes: Shapes) -> None:
    rule, call = site.rule, site.call
    assert isinstance(rule, Contraction)
    x, w, axis = rule.x(call), rule.w(call), rule.channel_axis(call)
    rows = facts.fields(site.node).get(axis)
    columns = facts.fields(x).get(axis)
    n_positions = _others(facts, site.node, axis, shapes)
    is_conv = len(call.shape(w)) > 2
    each = (machine.conv_mac_s if is_conv else machine.mac_s) * n_positions  # seconds for one weight
    each += machine.conv_weight_s if is_conv else machine.weight_s
    n_taps, groups = math.prod(call.shape(w)[2:]), rule.groups(call)
    n_rows = facts.count(facts.fields(site.node), axis) if rows is not None else call.out_shape[axis]
    n_columns = facts.count(facts.fields(x), axis) if columns is not None else call.shape(x)[axis]
    if rows is not None:
        add_to_classes(facts, found, rows, each * n_taps * n_columns / groups)
    if columns is not None and groups == 1:
        add_to_classes(facts, found, columns, each * n_taps * n_rows)


def port_seconds(facts: FactTable, cut: Cut, machine: MachineCosts, shapes: Shapes) -> float:
    """Seconds that the port takes at most as what it becomes: a slice copies, a spread into a slice fills first."""
    if cut.is_trivial:
        return 0.0
    hint, copy_s = facts.program.hints[cut.node], 2 * machine.byte_s
    channel_bytes = hint.element_size() * _others(facts, cut.node, cut.axis, shapes)
    spent = 0.0
    if cut.n_selected or not cut.n_supplied:
        rate = copy_s if cut.is_slice else machine.select_s
        spent += machine.call_s + rate * channel_bytes * int((cut.inside & cut.outside).sum())
    if cut.n_supplied:
        rate = 2 * copy_s if cut.is_slice else machine.spread_s
        spent += 2 * machine.call_s + rate * channel_bytes * int(cut.inside.sum())
    return spent


def _others(facts: FactTable, node: fx.Node, axis: int, shapes: Shapes) -> int:
    """Elements of a value for each channel of this axis."""
    fields, shape = facts.fields(node), shapes.get(node.name, facts.program.shape(node))
    return math.prod(facts.count(fields, a) if a in fields else n for a, n in enumerate(shape) if a != axis)
