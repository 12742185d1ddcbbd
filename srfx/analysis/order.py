"""Channel order: which channels of a value stand side by side, so that many selections are slices.

Readers that take different channels of one value, and branches that write different channels of one sum, take them by
an index.  Where they stand side by side a slice does: a view, no copy.  Channels that only weights number may stand
in any order (theory: Lemma G8).

A *stream* is a vector of channels that is in one and the same order wherever any of them appears.  For each, the sets
that ports take, the most expensive first, are made runs as long as that is possible; what is left is sorted by a
Gray code, so that a channel's neighbour is in nearly the same sets.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from srfx.analysis.calls import Site
from srfx.ir.program import Value
from srfx.lattice.classes import connected_components
from srfx.lattice.movement import Fields
from srfx.ops.facts import FactTable
from srfx.ops.port import Port, Rewired


@dataclass(frozen=True)
class Wanted:
    """Channels [C] that a port takes of those that are ``there`` [C], and how much that copies."""

    channels: Tensor
    there: Tensor
    cost: float

    def n_runs(self, order: Tensor) -> int:
        """How many slices it takes when the channels stand in this order."""
        found = self.channels[order][self.there[order]].int()
        return int((found.diff(prepend=found.new_zeros(1)) > 0).sum())


def channel_ranks(facts: FactTable, sites: Sequence[Site]) -> Tensor:
    """``facts.ranks`` with an order for the channels of every stream that gains slices by it; [labels].

    Statistics that a norm emits stay behind all channels.
    """
    ports = [s for s in sites if isinstance(s.rule, Port)]
    if not ports:
        return facts.ranks
    classes = _joined(facts, sites)
    streams = _streams(facts, sites, classes)
    wanted: dict[bytes, list[Wanted]] = {}
    for site in ports:
        key = _key(classes, facts.fields(site.node)[site.rule.axis(site.call)])  # type: ignore[attr-defined]
        found = _wanted(facts, site) if key in streams else None
        if found is not None:
            wanted.setdefault(key, []).append(found)
    ranks = facts.ranks.int()
    for key, sets in wanted.items():
        order = arranged(sets)
        if order is None:
            continue
        rank = torch.empty_like(order).index_copy(0, order, torch.arange(order.numel())).int()
        for labels in streams[key]:
            own = facts.classes.representative[labels.flatten()]
            behind = facts.ranks[own].int()
            ranks[own] = torch.where(behind > 0, behind + order.numel(), rank)
    return ranks


# ---------------------------------------------------------------------- streams
def _joined(facts: FactTable, sites: Sequence[Site]) -> Tensor:
    """Classes [labels] of channels that have to have the same place: tied, implied, or moved by a port or a spread."""
    rep = facts.classes.representative
    pairs = [
        (g[g != 0], target[g != 0])
        for guards, target in zip(facts.classes.guards, facts.classes.targets, strict=True)
        for g in guards
    ]
    for site in sites:
        if isinstance(site.rule, Rewired):
            axis, source = site.rule.axis(site.call), site.rule.source(site.call)
            s, fields = site.rule.sources(site.call), facts.fields(source)
            if axis in fields:
                own = rep[facts.fields(site.node)[axis].flatten()]
                pairs.append((own[s >= 0], rep[fields[axis].flatten()[s[s >= 0]]]))
    return connected_components(rep.numel(), pairs)[rep]


def _streams(facts: FactTable, sites: Sequence[Site], classes: Tensor) -> dict[bytes, list[Tensor]]:
    """Labels of all places of every vector of channels that may be put in another order, by its classes."""
    owner, is_fixed = torch.full_like(classes, -1), torch.zeros(classes.numel(), dtype=torch.bool)
    is_fixed[classes[0]] = True
    places: dict[bytes, list[Tensor]] = {}
    numbers: dict[bytes, int] = {}
    for fields in _all_fields(facts):
        for axis, labels in fields.items():
            found = classes[labels.flatten()]
            if labels.numel() != labels.shape[axis] or found.unique().numel() != found.numel():
                is_fixed[found] = True
                continue
            key = _key(classes, labels)
            number = numbers.setdefault(key, len(numbers))
            is_fixed[found[(owner[found] >= 0) & (owner[found] != number)]] = True
            owner[found] = number
            places.setdefault(key, []).append(labels)
    for labels in _fixed(facts, sites):
        is_fixed[classes[labels.flatten()]] = True
    return {k: v for k, v in places.items() if not bool(is_fixed[classes[v[0].flatten()]].any())}


def _key(classes: Tensor, labels: Tensor) -> bytes:
    found: bytes = classes[labels.flatten()].numpy().tobytes()
    return found


def _all_fields(facts: FactTable) -> Iterator[Fields]:
    for found in (*facts.labeller.fields.values(), *facts.labeller.slots.values()):
        yield from found if isinstance(found, tuple) else (found,)


def _fixed(facts: FactTable, sites: Sequence[Site]) -> Iterator[Tensor]:
    """Labels of channels whose place matters.

    They are pinned, in heads or of heads, selected by number, an output's, taken of a value that no weight numbers, or met by an op
    that does not treat all positions alike (a literal tensor too).
    """
    program, table = facts.program, facts.labeller.table
    yield from (pin.labels for pin in table.pins)
    for block in table.blocks:
        if block.rows.shape[0] > 1:
            yield block.rows
            yield block.guards  # a row of another number would have to take its lanes along
    for required in facts.labeller.required.values():
        yield from required
    for node in program.gm.graph.output_node().all_input_nodes:
        yield from _labels(facts, program.value(node))
    for site in sites:
        if not site.rule.is_even(site.call):
            for value in (site.node, *site.call.values()):
                yield from _labels(facts, value)
        if isinstance(site.rule, Rewired):
            axis = site.rule.axis(site.call)
            if axis not in facts.fields(site.rule.source(site.call)):
                yield facts.fields(site.node)[axis]


def _labels(facts: FactTable, value: Value) -> Iterator[Tensor]:
    found = facts.labeller.fields.get(value, {})
    for fields in found if isinstance(found, tuple) else (found,):
        yield from fields.values()


def _wanted(facts: FactTable, site: Site) -> Wanted | None:
    """What a port takes or brings; None when it takes all that is there."""
    assert isinstance(site.rule, Port)
    axis, source = site.rule.axis(site.call), site.rule.source(site.call)
    inside = facts.is_kept(facts.fields(site.node)[axis]).flatten()
    outside = facts.is_kept(facts.fields(source)[axis]).flatten()
    both = inside & outside
    there = inside if bool((inside & ~outside).any()) else outside
    if torch.equal(both, there) or not bool(both.any()):
        return None
    shape = facts.program.shape(site.node)
    n_positions = facts.program.hints[site.node].numel() / shape[axis]
    return Wanted(both, there, n_positions * float(both.sum()))


# ---------------------------------------------------------------------- order
def arranged(sets: Sequence[Wanted]) -> Tensor | None:
    """An order of the channels, [C], in which more of the sets are runs, by cost; None when there is none."""
    distinct: dict[bytes, Wanted] = {}
    for s in sets:
        key = s.channels.numpy().tobytes()
        cost = s.cost + (distinct[key].cost if key in distinct else 0.0)
        distinct[key] = Wanted(s.channels, s.there, cost)
    ordered = sorted(distinct.values(), key=lambda s: -s.cost)
    n = ordered[0].channels.numel()
    block, rest = torch.full((n,), -1), []
    for s in ordered:
        refined = _refined(block, s.channels)
        if refined is None:
            rest.append(s.channels)
        else:
            block = refined
    block = torch.where(block < 0, int(block.max()) + 1, block)
    order = _sorted(block, rest)
    return order if _sliced(ordered, order) > _sliced(ordered, torch.arange(n)) else None


def _sliced(sets: Sequence[Wanted], order: Tensor) -> float:
    return sum(s.cost for s in sets if s.n_runs(order) == 1)


def _refined(block: Tensor, s: Tensor) -> Tensor | None:
    """Numbered blocks [C] that stand in a row, -1 outside, refined so that s is a run; None where they forbid it.

    Members of s that no block holds yet become a block at one end, or one of their own beside all others.
    """
    held, n = s & (block >= 0), int(block.max()) + 1
    is_new = s & (block < 0)
    if not bool(held.any()):
        return torch.where(is_new, n, block)
    hit = block[held].unique()
    first, last = int(hit[0]), int(hit[-1])
    sizes = block[block >= 0].bincount(minlength=n)
    is_full = block[held].bincount(minlength=n) == sizes
    inner = is_full[first + 1 : last]
    if hit.numel() != last - first + 1 or not bool(inner.all()):
        return None
    place = block.double()
    if not bool(is_new.any()):
        to_right, to_left = first, last
    elif last == n - 1 and (first == last or bool(is_full[last])):
        to_right, to_left = first, n
        place[is_new] = n
    elif first == 0 and (first == last or bool(is_full[first])):
        to_right, to_left = n, last
        place[is_new] = -0.5
    else:
        return None
    place[held & (block == to_right)] += 0.25
    if to_left != to_right:
        place[held & (block == to_left)] -= 0.25
    inside = (block >= 0) | is_new
    found = torch.full_like(block, -1)
    found[inside] = place[inside].unique(return_inverse=True)[1]
    return found


def _sorted(block: Tensor, sets: Sequence[Tensor]) -> Tensor:
    """By block, and within a block by the rank of the pattern of sets in the reflected Gray code."""
    keys, parity = [block], block % 2
    for s in sets:
        parity = parity ^ s.long()
        keys.append(parity)
    order = torch.arange(block.numel())
    for key in reversed(keys):
        order = order[key[order].argsort(stable=True)]
    return order
