"""Layers with several sites: which calls share a weight and may change it together (theory: Lemma L7)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from torch import fx

from srfx.ir.call import Call
from srfx.ir.program import Param
from srfx.ops.contraction_facts import ContractionFacts
from srfx.ops.rule import OpRule


def siblings(sites: Iterable[tuple[OpRule, Call]]) -> Mapping[fx.Node, tuple[Call, ...]]:
    """For every contraction whose weight has several sites, all of them; none where they take weight or bias otherwise.

    Args:
        sites: rule and call of every call of the graph, in graph order.
    """
    found: dict[Param, list[tuple[ContractionFacts, Call]]] = {}
    for rule, call in sites:
        if isinstance(rule, ContractionFacts) and rule.refused(call) is None:
            weight = rule.w(call)
            if isinstance(weight, Param) and weight.n_sites > 1:
                found.setdefault(weight, []).append((rule, call))
    return {
        call.node: tuple(call for _, call in group)
        for weight, group in found.items()
        if len(group) == weight.n_sites and _are_alike(group)
        for _, call in group
    }


def _are_alike(group: list[tuple[ContractionFacts, Call]]) -> bool:
    """Whether all sites lay the weight out alike and have one bias, or one place for it."""
    rule, first = group[0]
    bias = first.value("bias")
    if "bias" not in rule.signature or not isinstance(bias, Param | None):
        return False
    if bias is not None and (bias.n_sites != len(group) or len(bias.shape) != 1):
        return False
    return all(
        type(other) is type(rule)
        and other.groups(call) == rule.groups(first)
        and call.value("bias") is bias
        and call.slot("bias") == first.slot("bias")
        for other, call in group
    )
