"""What heads cost, and how to sort them into groups of one width (docs/ragged.md)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, fx

from srfx.analysis.calls import Site
from srfx.ir.program import Param
from srfx.ops.attention import Attention, Product
from srfx.ops.contraction import Contraction
from srfx.ops.facts import FactTable
from srfx.passes._head_regions import HEADS, Region, Sites
from srfx.passes._machine_costs import MachineCosts

MAX_GROUPS = 4
"""Into how many groups the heads of one attention are sorted at most."""

ROUNDING = 1e-9
"""Sums that differ by less are the same: then fewer groups are better."""

Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True)
class HeadCosts:
    """Seconds of a call, of a multiplication, and of a weight that is read; the numbers are those of a common core.

    Attributes:
        has_fill: whether projections compute the lanes that only fill heads up; else zeros are put there.
    """

    call_s: float = 5e-6
    mac_s: float = 2e-11
    weight_s: float = 2e-10
    has_fill: bool = False

    @classmethod
    def of(cls, machine: MachineCosts | None) -> HeadCosts:
        """Those of a machine, where no index needs to be worth its bytes; None: those of a common one."""
        return cls() if machine is None else cls(machine.call_s, machine.mac_s, machine.weight_s, True)

    def of_groups(self, n_calls: int) -> float:
        """Seconds that one group more takes."""
        return self.call_s * n_calls


@dataclass(frozen=True)
class Lanes:
    """The lanes along one axis of a product: q and k have theirs, v its own.

    Attributes:
        labels: [heads, D].
        each_s: seconds that one lane of one head takes, with the rows and columns of projections that are computed for it.
    """

    labels: Tensor
    each_s: float


def lanes_of(facts: FactTable, region: Region, sites: Sites, costs: HeadCosts, shapes: Shapes) -> list[Lanes]:
    """Every axis of lanes that differ from head to head."""
    found: list[Lanes] = []
    for site in region.products:
        for value, macs in _lane_axes(facts, site, shapes):
            labels = _by_head(facts, value, region.n_heads)
            if labels is not None:
                found.append(Lanes(labels, costs.mac_s * macs))
    for site in (*(sites[n] for n in region.nodes), region.reader):
        rule, call = site.rule, site.call
        if costs.has_fill and isinstance(rule, Contraction) and rule.refused(call) is None:
            inner, outer = (rule.x(call), site.node) if site is region.reader else (site.node, rule.x(call))
            axis = rule.channel_axis(call)
            n_others = _size(facts, outer, axis, shapes) / rule.groups(call)
            each_s = n_others * (costs.mac_s * _positions(facts, site, shapes) + costs.weight_s)
            found = [_with(facts, lanes, facts.fields(inner).get(axis), each_s) for lanes in found]
    return found


def _with(facts: FactTable, lanes: Lanes, labels: Tensor | None, each_s: float) -> Lanes:
    """Lanes that a projection makes or reads take a row or column of it, too."""
    if labels is None:
        return lanes
    rep = facts.classes.representative
    is_of = bool(torch.isin(rep[lanes.labels].flatten(), rep[labels].flatten()).any())
    return replace(lanes, each_s=lanes.each_s + each_s) if is_of else lanes


def _lane_axes(facts: FactTable, site: Site, shapes: Shapes) -> list[tuple[fx.Node, float]]:
    """Values whose last axis are lanes of this product, and the multiplications that one lane of one head takes."""
    rule, call = site.rule, site.call
    shape = shapes.get(site.node.name, call.out_shape)
    rows = math.prod(shape[:HEADS]) * shape[-2]
    if isinstance(rule, Attention):
        q, k, _ = rule.operands(call)
        assert isinstance(q, fx.Node)
        macs = rows * _size(facts, k, len(call.shape(k)) - 2, shapes)
        return [(q, macs), (site.node, macs)]
    assert isinstance(rule, Product)
    a, _ = rule.operands(call)
    assert isinstance(a, fx.Node)
    contracted = _size(facts, a, len(call.shape(a)) - 1, shapes)
    return [(a, rows * shape[-1]), (site.node, rows * contracted)]


def _by_head(facts: FactTable, value: fx.Node, n_heads: int) -> Tensor | None:
    """Labels of the last axis by head, [heads, D], where they differ."""
    rank = len(facts.program.shape(value))
    labels = facts.fields(value).get(rank - 1)
    if labels is None or labels.shape[HEADS] != n_heads or labels.numel() != n_heads * labels.shape[-1]:
        return None
    return labels.reshape(n_heads, -1)


def widths(facts: FactTable, found: Sequence[Lanes], multiple_of: int) -> Tensor:
    """How many lanes each head needs, were it alone, [axes, heads]; 0 for a head that goes."""
    assert facts.demanded is not None
    alone = replace(facts.classes, blocks=()).close(facts.demanded)
    rep = facts.classes.representative
    if not found:
        return torch.zeros(1, 1, dtype=torch.long)
    counts = torch.stack([alone[rep[lanes.labels]].sum(1) for lanes in found])
    full = torch.tensor([lanes.labels.shape[1] for lanes in found]).view(-1, 1)
    return torch.minimum((counts + multiple_of - 1) // multiple_of * multiple_of, full)


def sort_into_groups(counts: Tensor, each_s: Sequence[float], call_s: float, room: int) -> list[list[int]]:
    """Groups of heads that together take the least time, the widest first.

    In the order of what a head takes by itself, runs of heads are groups; a group takes what its widest heads take for
    each of its heads, and one more call.

    Args:
        counts: lanes of each head, [axes, heads].
        each_s: seconds that one lane takes, for each axis.
        call_s: seconds that one more group takes.
        room: at most so many groups.
    """
    each = torch.tensor(list(each_s), dtype=torch.float64).view(-1, 1)
    order = (counts * each).sum(0).argsort(descending=True, stable=True).tolist()
    in_order, n = counts[:, order].double(), len(order)
    # by the end of the last group, and by the number of groups: seconds, and where the last group begins
    best: list[dict[int, tuple[float, int]]] = [{0: (0.0, 0)}]
    for end in range(1, n + 1):
        here: dict[int, tuple[float, int]] = {}
        for start in range(end):
            widest = in_order[:, start:end].amax(1, keepdim=True)
            group_s = float((widest * each).sum()) * (end - start) + call_s
            for k, (before, _) in best[start].items():
                if k < room and (k + 1 not in here or before + group_s < here[k + 1][0]):
                    here[k + 1] = (before + group_s, start)
        best.append(here)
    least_s = min(cost for cost, _ in best[n].values())
    k = min(k for k, (cost, _) in best[n].items() if cost <= least_s * (1 + ROUNDING))
    groups: list[list[int]] = []
    end = n
    while end:
        start = best[end][k][1]
        groups.append(sorted(order[start:end]))
        end, k = start, k - 1
    return groups[::-1]


def seconds(facts: FactTable, sites: Sequence[Site], costs: HeadCosts, shapes: Shapes) -> float:
    """Seconds that the products and, where they compute what fills heads up, the projections among these calls take."""
    total = 0.0
    for site in sites:
        rule, call = site.rule, site.call
        if not isinstance(call.output, Tensor):
            continue
        shape = [_size(facts, site.node, a, shapes) for a in range(len(call.out_shape))]
        if costs.has_fill and isinstance(rule, Contraction) and rule.refused(call) is None:
            axis, w = rule.channel_axis(call), rule.w(call)
            columns = _size(facts, rule.x(call), axis, shapes) / rule.groups(call)
            n_weights = shape[axis] * columns * math.prod(call.shape(w)[2:])
            total += n_weights * (costs.mac_s * _positions(facts, site, shapes) + costs.weight_s)
        elif isinstance(rule, Attention):
            q, k, _ = rule.operands(call)
            n_keys = _size(facts, k, len(call.shape(k)) - 2, shapes)
            lanes = _size(facts, q, len(call.shape(q)) - 1, shapes) + shape[-1]
            total += costs.mac_s * math.prod(shape[:-1]) * n_keys * lanes
        elif isinstance(rule, Product):
            a, _ = rule.operands(call)
            total += costs.mac_s * math.prod(shape) * _size(facts, a, len(call.shape(a)) - 1, shapes)
    return total


def size_bytes(facts: FactTable, sites: Sequence[Site]) -> float:
    """Bytes of the stored tensors that these calls read, at what is kept."""
    params = {v: None for site in sites for v in site.call.values() if isinstance(v, Param)}
    return sum(
        math.prod(_size(facts, p, a, {}) for a in range(len(p.shape))) * p.tensor.element_size()
        for p in params
    )


def _positions(facts: FactTable, site: Site, shapes: Shapes) -> int:
    """Positions at which a contraction is computed."""
    axis = site.rule.channel_axis(site.call)  # type: ignore[attr-defined]
    return math.prod(_size(facts, site.node, a, shapes) for a in range(len(site.call.out_shape)) if a != axis)


def _size(facts: FactTable, value: object, axis: int, shapes: Shapes) -> int:
    """Kept channels along an axis, or how long it is for the examples."""
    fields = facts.fields(value)  # type: ignore[arg-type]
    if axis in fields:
        return facts.count(fields, axis)
    shape = shapes.get(value.name) if isinstance(value, fx.Node) else None
    return (shape or facts.program.shape(value))[axis]  # type: ignore[arg-type]
