"""Liveness analysis: which channels have to exist (backward), given what is known to be kept so far."""

from __future__ import annotations

import torch
from torch import Tensor, fx

from srfx.analysis.calls import Site
from srfx.ir.program import Param, Value
from srfx.ops.facts import Demand, FactTable, collapse
from srfx.ops.rule import Effect


def liveness(facts: FactTable, sites: list[Site]) -> None:
    """Recompute ``facts.live`` against the edges.  Monotone in ``facts.kept``: it only ever grows.

    Which of its operands a sum reads is known once it is known what of it is live; so what is executed is asked for after
    each sweep, and swept again until nothing is new.
    """
    present = set(executed(facts, sites)) if facts.live else set[Value]()
    while True:
        _sweep(facts, sites, present)
        found = set(executed(facts, sites))
        if found <= present:
            return
        present |= found


def _sweep(facts: FactTable, sites: list[Site], present: set[Value]) -> None:
    facts.live = {}
    _demand_outputs(facts)
    for site in reversed(sites):
        live = facts.live.get(site.node)
        if live is None and site.rule.effect is not Effect.IMPURE:
            if not _is_kept(facts, site.node, present):
                continue
            live = _none(facts, site.node)
        if live is None:
            live = _none(facts, site.node)
        _add(facts, site.rule.backward(site.call, live, facts))


def _demand_outputs(facts: FactTable) -> None:
    """Varying channels of every output; constants are restored there, but for those that are kept anyway.

    Anything that is no float tensor stays.
    """
    for node in facts.program.gm.graph.output_node().all_input_nodes:
        value = facts.program.value(node)
        found = facts.constants.get(node)
        if isinstance(found, tuple):
            for i, c in enumerate(found):
                _add(facts, {(node, i): torch.ones_like(c.varies)})
        elif facts.program.is_tensor(node) and not isinstance(value, Param):
            c = facts.constancy(node)
            fields = facts.fields(node)
            wanted = c.varies.cpu() | facts.kept_channels(node) | restored(facts, node)
            _add(facts, {node: wanted if fields else torch.ones_like(c.varies)})


def restored(facts: FactTable, node: fx.Node) -> Tensor:
    """Positions of an output that a template fills in already: cutting them again would only restore them again."""
    nothing = torch.zeros((1,) * len(facts.program.shape(node)), dtype=torch.bool)
    if node.target not in (torch.where, torch.ops.aten.where.self) or len(node.args) != 3:
        return nothing
    mask, _, template = (facts.program.value(a) if isinstance(a, fx.Node) else None for a in node.args)
    if not isinstance(mask, Param) or not isinstance(template, Param) or mask.tensor.dtype != torch.bool:
        return nothing
    return nothing | ~mask.tensor.cpu()


def _add(facts: FactTable, demand: Demand) -> None:
    for key, live in demand.items():
        if isinstance(key, tuple):
            node, i = key
            parts = list(facts.live.get(node) or (None,) * len(facts.program.leaves(node)))
            parts[i] = live if parts[i] is None else parts[i] | live
            if bool(live.any()):
                facts.live[node] = tuple(parts)
            continue
        live = collapse(live, facts.layout(key))
        if not bool(live.any()):
            continue
        old = facts.live.get(key)
        assert old is None or isinstance(old, Tensor)
        facts.live[key] = live if old is None else old | live


def _is_kept(facts: FactTable, node: fx.Node, present: set[Value]) -> bool:
    """Whether the result exists though nothing of it is live: it has to be finite (theory: section 2, remark 2)."""
    fields = facts.labeller.fields.get(node)
    if not isinstance(fields, dict) or not facts.program.is_tensor(node):
        return False
    return bool(facts.kept_channels(node).any()) if fields else node in present


def _none(facts: FactTable, node: fx.Node) -> Tensor | tuple[Tensor | None, ...]:
    hint = facts.program.hints.get(node)
    if isinstance(hint, (tuple, list)) and not isinstance(hint, torch.Size):
        return (None,) * len(facts.program.leaves(node))
    return torch.zeros((1,) * (hint.dim() if isinstance(hint, Tensor) else 0), dtype=torch.bool)


def live_labels(facts: FactTable) -> Tensor:
    """Representatives that some live channel demands, [labels] bool."""
    marked = torch.zeros(facts.labeller.table.size, dtype=torch.bool)
    for value, live in facts.live.items():
        found = facts.labeller.fields.get(value)
        parts = live if isinstance(live, tuple) else (live,)
        for fields, part in zip(found if isinstance(found, tuple) else (found,), parts, strict=True):
            if part is not None and fields:
                _mark(marked, fields, part)
    seed = torch.zeros_like(marked)
    seed[facts.classes.representative[marked.nonzero().flatten()]] = True
    return seed


def _mark(marked: Tensor, fields: dict[int, Tensor], live: Tensor) -> None:
    for labels in fields.values():
        marked[labels[collapse(live, tuple(labels.shape)).expand(labels.shape)]] = True


def executed(facts: FactTable, sites: list[Site]) -> list[Value]:
    """Values that the rewritten graph still computes, outputs first."""
    by_node = {site.node: site for site in sites}
    stack: list[Value] = [
        facts.program.value(n) for n in facts.program.gm.graph.output_node().all_input_nodes
    ]
    stack += [s.node for s in sites if s.rule.effect is Effect.IMPURE]
    seen: dict[Value, None] = {}
    while stack:
        value = stack.pop()
        if value in seen:
            continue
        seen[value] = None
        if not isinstance(value, fx.Node):
            continue
        site = by_node.get(value)
        if site is not None:
            stack += site.rule.reads(site.call, facts)
        stack += [
            n for n in value.all_input_nodes if _is_asked(facts, n)
        ]  # and so the tensor whose size it is
    return list(seen)


def _is_asked(facts: FactTable, node: fx.Node) -> bool:
    """Whether a node is what a tensor is asked for at run time: sizes, and numbers made of them, its dtype, its device."""
    found = facts.program.hints.get(node)
    if isinstance(found, (torch.dtype, torch.device, torch.layout)):
        return True
    return isinstance(found, (int, float, torch.SymInt, torch.Size)) and node not in facts.labeller.static
