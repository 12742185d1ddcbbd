"""Write a channel shuffle that is spelled by views as the one op it is.

Before: y = x.view(N, G, C // G, H, W).transpose(1, 2).contiguous().view(N, C, H, W)
After:  y = channel_shuffle(x, G)

Followed literally, the view is a block of G rows that must stay rectangular and the transposed merge
reorders them: whole classes are tied, 26 % of the parameters of shufflenet_v2.  As one op with a fixed
permutation every channel keeps its own label.  `channel_shuffle` was preferred to an index_select with the
permutation: a network that loses nothing there keeps a view and a copy and needs no index; only a shuffle that
does lose channels becomes an index_select (rule `srfx.ops.shuffle.ChannelShuffle`).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, fx

from srfx.ir.aliases import mutation_barriers
from srfx.ir.dead_code import remove_dead_nodes
from srfx.ir.effects import op_name
from srfx.ir.plan import Edit, Plan, Reason, Refusal
from srfx.ir.program import Program
from srfx.ir.shapes import propagate
from srfx.lattice.movement import Permute, Regroup, Step, walk
from srfx.ops.movement import Copy
from srfx.ops.permute import MoveDim, PermuteAxes, Transpose
from srfx.ops.registry import resolve
from srfx.ops.views import Reshaping
from srfx.passes._channels import holds_channels
from srfx.passes.base import HintedPass, register_pass

_COPIES = ("contiguous", "clone")  # of all copies the ones that leave dtype, device and gradients alone


@dataclass(frozen=True)
class RaiseShuffle(Edit):
    """The value of ``node`` is channel_shuffle(``operand``, ``groups``)."""

    operand: str
    groups: int


@register_pass("raise-channel-shuffle")
class RaiseChannelShuffle(HintedPass):
    """Turn view, transpose (or permute), contiguous, view (or reshape, flatten) into torch.channel_shuffle.

    Matched is a chain of views, permutations and copies, each read by the next one alone, whose net effect
    is ``arange(C).view(G, C // G).t().flatten()`` along axis 1 and nothing along the others.  Axis 1 has to
    come from the rows of a weight, so that its size is the same at every call.

    Refuses: CHANNEL_MIXING when the chain permutes axis 1 in another way; MUTATION when storage is written
    in place.
    Source: Zhang et al., ShuffleNet, arXiv 1707.01083, section 3.1.
    """

    def plan(self, gm: fx.GraphModule) -> Plan:
        """Every shuffle, in graph order; one that reads another of the same plan waits for the next round."""
        program, barred, plan = Program(gm, propagate(gm, self.hints)), mutation_barriers(gm), Plan()
        taken: set[fx.Node] = set()
        replaced: set[fx.Node] = set()
        for node in gm.graph.nodes:
            if node in taken or not isinstance(_step(node, program), Regroup):
                continue
            chain, order = _shuffle(node, program)
            if order is None or not holds_channels(program, chain[0].all_input_nodes[0], 1):
                continue
            if chain[0].all_input_nodes[0] in replaced:
                continue
            taken.update(chain)
            groups = _groups(order)
            if groups is None:
                plan.refusals.append(Refusal(chain[-1].name, Reason.CHANNEL_MIXING, "no channel shuffle"))
            elif not barred.isdisjoint(chain):
                plan.refusals.append(Refusal(chain[-1].name, Reason.MUTATION))
            else:
                replaced.add(chain[-1])
                plan.edits.append(RaiseShuffle(chain[-1].name, chain[0].all_input_nodes[0].name, groups))
        return plan

    def apply(self, gm: fx.GraphModule, edit: Edit) -> None:
        """Replace one chain."""
        assert isinstance(edit, RaiseShuffle)
        nodes = {n.name: n for n in gm.graph.nodes}
        last = nodes[edit.node]
        with gm.graph.inserting_before(last):
            new = gm.graph.call_function(torch.channel_shuffle, (nodes[edit.operand], edit.groups))
        new.meta = dict(last.meta)
        last.replace_all_uses_with(new)
        gm.graph.erase_node(last)

    def finish(self, gm: fx.GraphModule) -> None:
        """Remove the rest of the chains, and the sizes only they read."""
        remove_dead_nodes(gm)


def _step(node: fx.Node, program: Program) -> Step | str | None:
    """The one step of a movement by its first operand; "copy" for a plain copy; None for anything else."""
    if node.op not in ("call_function", "call_method", "call_module") or not program.is_tensor(node):
        return None
    rule, call = resolve(node, program)
    if call.value("input") is None:
        return None
    if isinstance(rule, Copy):
        return "copy" if op_name(node) in _COPIES else None
    if not isinstance(rule, (Reshaping, PermuteAxes, Transpose, MoveDim)):
        return None
    steps = rule.steps(call)
    return steps[0] if len(steps) == 1 and isinstance(steps[0], (Permute, Regroup)) else None


def _shuffle(first: fx.Node, program: Program) -> tuple[list[fx.Node], Tensor | None]:
    """The shortest chain from ``first`` on that permutes axis 1 alone, and that permutation."""
    source = first.all_input_nodes[0]
    shape = program.shape(program.value(source))
    if len(shape) < 3:
        return [], None
    chain, node, steps, now = [first], first, list[Step](), shape
    while True:
        step = _step(node, program)
        if step is None:
            return [], None
        if not isinstance(step, str):
            steps.append(step)
            now = program.shape(node)
        if now == shape and not isinstance(step, str):  # only now are positions moved: a value may be large
            start = torch.arange(torch.Size(shape).numel()).view(shape)
            order = _order(start, walk(steps, start))
            return (chain, order) if order is not None else ([], None)
        readers = [u for u in node.users if not _reads_size(u)]
        if len(readers) != 1 or readers[0].all_input_nodes[0] is not node:
            return [], None
        node = readers[0]
        chain.append(node)


def _reads_size(node: fx.Node) -> bool:
    return node.target in ("size", getattr, torch.ops.aten.sym_size.int)


def _order(start: Tensor, moved: Tensor) -> Tensor | None:
    """The permutation of axis 1 that takes ``start`` to ``moved``, if there is one and it is not the identity."""
    rest = start[0, 0].numel()
    order = moved.flatten(2)[0, :, 0] // rest
    if bool((order >= start.shape[1]).any()) or torch.equal(order, torch.arange(order.numel())):
        return None
    return order if torch.equal(start.index_select(1, order), moved) else None


def _groups(order: Tensor) -> int | None:
    """G of ``arange(C).view(G, C // G).t().flatten()``."""
    n = order.numel()
    for groups in range(2, n):
        if n % groups == 0 and torch.equal(torch.arange(n).view(groups, -1).t().flatten(), order):
            return groups
    return None
