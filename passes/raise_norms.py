"""Write norms that are spelled by other ops as the one op they are.

1. native      native_layer_norm(x, ..)[0]                            ->  layer_norm(x, ..)
               native_group_norm(x, w, b, N, C, HxW, G, eps)[0]       ->  group_norm(x, G, w, b, eps)
               view, _native_batch_norm_legit, view                   ->  instance_norm(x, ..)   (`_instance_norm`)
2. RMS norm    x * rsqrt(mean(x^2, -1) + eps), then times a weight    ->  rms_norm(x, [C], weight, eps)
               (also x / sqrt(..), x * (1 / sqrt(..)), and powers 0.5 and -0.5)
3. layer norm  the same of x - mean(x, -1), or with var(x, -1), then  ->  layer_norm(x, [C], weight, bias, eps)
               a weight and a bias

Decomposed exports spell norms the first way, language models the second.  Spelled out, a channel that is a
constant other than 0 varies as soon as it is multiplied by the varying 1/rms, and stays; as one op it goes, and
linear readers take 1/rms in its place.  Casts in between are dropped where rms_norm makes them itself (it
computes at least in float32).                                                          [exact in real arithmetic]
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from srfx.ir.aliases import mutation_barriers
from srfx.ir.dead_code import remove_dead_nodes
from srfx.ir.plan import Edit, Plan, Reason, Refusal
from srfx.ir.program import Program
from srfx.ir.shapes import propagate
from srfx.passes import _instance_norm
from srfx.passes._spelled_norm import Named, RaiseNorm, SpelledNorm, raised, root_power
from srfx.passes.base import HintedPass, register_pass

aten = torch.ops.aten
_NATIVE = {
    torch.native_layer_norm: aten.layer_norm.default,
    aten.native_layer_norm.default: aten.layer_norm.default,
    torch.native_group_norm: aten.group_norm.default,
    aten.native_group_norm.default: aten.group_norm.default,
}


@register_pass("raise-norms")
class RaiseNorms(HintedPass):
    """Turn native norms and spelled-out RMS and layer norms into layer_norm, group_norm, instance_norm and rms_norm.

    What is spelled out has to run over the last axis, which has to be as long as its weight or to come from the rows of
    another one, so that its size is the same at every call.

    Refuses: OTHER_READERS when the statistics of a native norm are read too; UNSUPPORTED_DTYPE when a spelled-out
        norm is computed in less precision than its operand has, or its weight has another dtype; MUTATION when
        storage is written in place.
    """

    def __init__(self, hints: Sequence[Any] | None = None) -> None:
        super().__init__(hints)
        self._raised: dict[str, fx.Node] = {}  # by what they replaced: a norm may read another one

    def plan(self, gm: fx.GraphModule) -> Plan:
        """Every norm, in graph order; propagates shapes only where there is a candidate."""
        spelled = (*_NATIVE, *_instance_norm.NATIVE)
        candidates = [n for n in gm.graph.nodes if n.target in spelled or root_power(n) is not None]
        plan = Plan()
        if not candidates:
            return plan
        program, barred = Program(gm, propagate(gm, self.hints)), mutation_barriers(gm)
        for node in candidates:
            if node.target in _NATIVE:
                found = _native(node)
            else:
                is_batch = node.target in _instance_norm.NATIVE
                found = _instance(program, node) if is_batch else SpelledNorm(program, node).found()
            if isinstance(found, Refusal):
                plan.refusals.append(found)
            elif found is not None and not barred.isdisjoint(_spelling(gm, found)):
                plan.refusals.append(Refusal(found.node, Reason.MUTATION))
            elif found is not None:
                plan.edits.append(found)
        return plan

    def apply(self, gm: fx.GraphModule, edit: Edit) -> None:
        """Replace one norm."""
        assert isinstance(edit, RaiseNorm)
        nodes = {n.name: n for n in gm.graph.nodes} | self._raised
        old = nodes[edit.node]
        args = tuple(nodes[a.name] if isinstance(a, Named) else a for a in edit.args)
        with gm.graph.inserting_before(old):
            new = gm.graph.call_function(edit.target, args)
        new.meta = dict(old.meta)
        old.replace_all_uses_with(new)
        gm.graph.erase_node(old)
        self._raised[edit.node] = new

    def finish(self, gm: fx.GraphModule) -> None:
        """Remove what spelled the norms."""
        self._raised = {}
        remove_dead_nodes(gm)


def _spelling(gm: fx.GraphModule, edit: RaiseNorm) -> set[fx.Node]:
    """All nodes of which a norm is spelled, with what it reads: writes in place between them would be seen no more."""
    nodes = {n.name: n for n in gm.graph.nodes}
    found = {nodes[a.name] for a in edit.args if isinstance(a, Named)}
    left = [nodes[edit.node]]
    while left:
        node = left.pop()
        if node not in found:
            found.add(node)
            left += node.all_input_nodes
    return found


def _native(node: fx.Node) -> RaiseNorm | Refusal | None:
    readers = [u for u in node.users if u.users or u.op == "output"]
    if not readers:
        return None
    if any(u.target is not operator.getitem or u.args[1] != 0 for u in readers) or len(readers) > 1:
        return Refusal(node.name, Reason.OTHER_READERS, "mean and 1/std are read")
    if node.kwargs:
        return Refusal(node.name, Reason.UNRECOGNISED_CALL)
    target, args = _NATIVE[node.target], tuple(node.args)
    if target is aten.group_norm.default:
        x, weight, bias, _, _, _, groups, eps = args
        args = (x, groups, weight, bias, eps)
    return raised(readers[0], target, args)


def _instance(program: Program, node: fx.Node) -> RaiseNorm | None:
    found = _instance_norm.instance_norm(program, node)
    return None if found is None else raised(found[0], _instance_norm.TARGET, found[1])
