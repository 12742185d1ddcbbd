"""All that computes the heads of one attention: from its projections to the value in which they are merged."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor, fx

from srfx.analysis.calls import Site
from srfx.ir.plan import Reason
from srfx.ir.program import Param, Program
from srfx.lattice.movement import walk
from srfx.ops.attention import Attention, Product
from srfx.ops.contraction import Contraction
from srfx.ops.elementwise import Elementwise
from srfx.ops.facts import FactTable
from srfx.ops.join import Concat
from srfx.ops.movement import Movement

HEADS = -3
"""The axis of heads of every operand of a product, counted from the right."""

Sites = Mapping[fx.Node, Site]


@dataclass(frozen=True)
class Region:
    """The calls that nothing but one attention's output projection has a use for.

    Attributes:
        merged: the value [.., heads x lanes, ..] that they end in.
        nodes: the calls in graph order, ``merged`` last.
        products: those of them that are products of computed values.
        reader: the projection that reads ``merged``, alone or joined with other values.
        first: where the channels of ``merged`` begin among those that it reads.
        n_parts: how many values it reads, joined.
        head_of: the head of each channel of ``merged``.
        n_heads: how many there are.
    """

    merged: fx.Node
    nodes: tuple[fx.Node, ...]
    products: tuple[Site, ...]
    reader: Site
    first: int
    n_parts: int
    head_of: Tensor
    n_heads: int


def regions(facts: FactTable, sites: Sites) -> Iterator[Region]:
    """Every attention whose heads go through one output projection, in graph order, each once."""
    seen: set[fx.Node] = set()
    for site in sites.values():
        if not _is_product(site, facts):
            continue
        path = _path(facts.program, site.node, sites)
        if path is None or path[-1] in seen:
            continue
        seen.add(path[-1])
        found = _region(facts, sites, path)
        if found is not None:
            yield found


def _is_product(site: Site, facts: FactTable) -> bool:
    """Whether a call multiplies computed values, with heads of their own along the third axis from the right."""
    if not isinstance(site.rule, (Attention, Product)) or not facts.program.is_tensor(site.node):
        return False
    shape = site.call.out_shape
    if len(shape) < 3 or shape[HEADS] < 2 or not _multiplies(site):
        return False
    labels = facts.fields(site.node).get(len(shape) + HEADS)
    return labels is not None and labels.unique().numel() == shape[HEADS] == labels.numel()


def _multiplies(site: Site) -> bool:
    operands = site.rule.operands(site.call)  # type: ignore[attr-defined]
    return all(isinstance(v, fx.Node) and len(site.call.shape(v)) >= 3 for v in operands)


def _path(program: Program, start: fx.Node, sites: Sites) -> list[fx.Node] | None:
    """The values from a product to the one that a projection reads; each has one reader."""
    path = [start]
    while True:
        readers = [u for u in path[-1].users if holds_tensors(program, u)]
        if len(readers) != 1 or readers[0] not in sites:
            return None
        site = sites[readers[0]]
        if isinstance(site.rule, (Contraction, Concat)):
            return path
        path.append(site.node)


def _region(facts: FactTable, sites: Sites, path: list[fx.Node]) -> Region | None:
    merged, program = path[-1], facts.program
    joined = next(u for u in merged.users if u in sites and isinstance(sites[u].rule, (Contraction, Concat)))
    reader = sites[joined]
    parts: list[fx.Node] = [merged]
    if isinstance(reader.rule, Concat):
        readers = [u for u in joined.users if holds_tensors(program, u)]
        parts = list(reader.call["tensors"])
        if len(readers) != 1 or readers[0] not in sites or parts.count(merged) != 1:
            return None
        axis, reader = reader.rule.axis(reader.call), sites[readers[0]]
        if not isinstance(reader.rule, Contraction) or reader.rule.channel_axis(reader.call) != axis:
            return None
    if not _may_widen(reader, joined, merged):
        return None
    axis = reader.rule.channel_axis(reader.call)  # type: ignore[attr-defined]
    last = max(i for i, n in enumerate(path) if n in sites and _is_product(sites[n], facts))
    head_of = _heads_of_channels(sites, path[last:], axis)
    nodes = _exclusive(facts, sites, merged)
    if head_of is None or nodes is None:
        return None
    products = tuple(sites[n] for n in nodes if _is_product(sites[n], facts))
    first = sum(program.shape(p)[axis] for p in parts[: parts.index(merged)])
    n_heads = sites[path[last]].call.out_shape[HEADS]
    return Region(merged, nodes, products, reader, first, len(parts), head_of, n_heads)


def _may_widen(reader: Site, joined: fx.Node, merged: fx.Node) -> bool:
    """Whether the weight of a contraction may get columns: it is a parameter of this one call."""
    rule, call = reader.rule, reader.call
    operand = merged if reader.node is joined else joined
    if not isinstance(rule, Contraction) or rule.refused(call) is not None or rule.x(call) is not operand:
        return False
    w = rule.w(call)
    return rule.groups(call) == 1 and isinstance(w, Param) and w.n_sites == 1 and bool(w.names)


def _heads_of_channels(sites: Sites, path: list[fx.Node], axis: int) -> Tensor | None:
    """The head that each channel of the last value belongs to, [C]; the first has heads along their own axis."""
    shape = sites[path[0]].call.out_shape
    heads = torch.arange(shape[HEADS]).view([-1 if a == len(shape) + HEADS else 1 for a in range(len(shape))])
    for before, node in pairwise(path):
        rule, call = sites[node].rule, sites[node].call
        if isinstance(rule, Movement) and rule.source(call) is before:
            heads = walk(rule.steps(call), heads, -1)
        elif not isinstance(rule, Elementwise) or call.out_shape != call.shape(before):
            return None
    extent = sites[path[-1]].call.out_shape[axis]
    if heads.numel() != heads.shape[axis] or heads.numel() != extent or bool((heads < 0).any()):
        return None
    return heads.flatten()


def _exclusive(facts: FactTable, sites: Sites, merged: fx.Node) -> tuple[fx.Node, ...] | None:
    """``merged`` and all calls with channels that lead to it alone; projections end the search."""
    found, stack = {merged}, [merged]
    while stack:
        reader = stack.pop()
        for (
            node
        ) in reader.all_input_nodes:  # asked again from each of its readers, until all of them are there
            if node in sites and node not in found and _leads_here(facts, sites, node, found):
                found.add(node)
                stack.append(node)
    order = {n: i for i, n in enumerate(sites)}
    nodes = tuple(sorted(found, key=order.__getitem__))
    return None if any(sites[n].is_unknown for n in nodes) else nodes


def _leads_here(facts: FactTable, sites: Sites, node: fx.Node, found: set[fx.Node]) -> bool:
    program = facts.program
    readers = [u for u in node.users if holds_tensors(program, u)]
    if not holds_tensors(program, node) or not all(u in found for u in readers):
        return False
    is_of_heads = _has_channels(facts, node) and not _is_picked(sites, node, readers)
    return is_of_heads and not any(_is_projected(sites[u], node) for u in readers)


def _has_channels(facts: FactTable, node: fx.Node) -> bool:
    fields = facts.labeller.fields.get(node, {})
    return any(bool(f) for f in (fields if isinstance(fields, tuple) else (fields,)))


def _is_projected(site: Site, node: fx.Node) -> bool:
    """Whether a call mixes all channels of ``node``."""
    rule, call = site.rule, site.call
    is_whole = isinstance(rule, Contraction) and rule.refused(call) is None and rule.groups(call) == 1
    return is_whole and rule.x(call) is node  # type: ignore[attr-defined]


def _is_picked(sites: Sites, node: fx.Node, readers: list[fx.Node]) -> bool:
    """Whether ``node`` is a table of which each reader picks what it needs."""
    return node in sites[node].call.program.tables and all(
        isinstance(sites[u].rule, Elementwise) for u in readers
    )


def holds_tensors(program: Program, node: fx.Node) -> bool:
    """Whether a node yields a tensor or several, and no sizes; an output counts as a reader of tensors."""
    hint = program.hints.get(node)
    if node.op == "output" or isinstance(hint, Tensor):
        return True
    return isinstance(hint, (tuple, list)) and any(isinstance(leaf, Tensor) for leaf in program.leaves(node))


def own_tensors_of(region: Region, facts: FactTable, sites: Sites) -> dict[str, None] | Reason:
    """Paths of the stored tensors of which each group of heads needs a copy; SHARED_WEIGHT where others read one too."""
    program, inside = facts.program, set(region.nodes)
    found: dict[str, None] = {}
    for node in region.nodes:
        for param in sites[node].call.values():
            if not isinstance(param, Param) or not param.names:
                continue
            is_shared = any(u not in inside for u in program.readers(param))
            if isinstance(param.tensor, torch.nn.Parameter):
                if is_shared:
                    return Reason.SHARED_WEIGHT
            elif is_shared or (isinstance(sites[node].rule, Elementwise) and param in program.tables):
                continue
            found[param.names[0]] = None
    return found
