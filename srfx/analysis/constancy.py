"""Constancy analysis: which channels are one known number for every input (forward, one sweep)."""

from __future__ import annotations

import torch

from srfx.analysis.calls import Site
from srfx.lattice.constancy import Constancy
from srfx.lattice.movement import Fields
from srfx.ops.facts import FactTable


def constancy(facts: FactTable, sites: list[Site]) -> None:
    """Fill ``facts.constants``.  A channel is constant only if it is uniform along every axis without channels."""
    for node in facts.program.nodes:
        hint = facts.program.hints.get(node)
        if node.op == "placeholder" and isinstance(hint, torch.Tensor):
            facts.constants[node] = Constancy.top(hint.dim())
    for site in sites:
        found = site.rule.forward(site.call, facts)
        fields = facts.labeller.fields[site.node]
        if isinstance(found, tuple):
            assert isinstance(fields, tuple)
            facts.constants[site.node] = tuple(_settled(c, f) for c, f in zip(found, fields, strict=True))
        elif isinstance(site.call.output, torch.Tensor):
            assert isinstance(fields, dict)
            facts.constants[site.node] = _settled(found, fields)


def _settled(found: Constancy, fields: Fields) -> Constancy:
    rank = found.value.dim()
    spread = {d for d in range(rank) for f in fields.values() if f.shape[d] > 1} | set(fields)
    return found.settle(spread)
