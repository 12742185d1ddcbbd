"""The fixpoint: labels once, constancy once, then liveness and the kept set by turns until nothing grows.

    K_0 = {}            K_{n+1} = close(live(K_n) + present(K_n))

Both maps are monotone in K, so the sequence ends.  It runs again whenever a choice is made that adds a demand: which
channel carries the constants that meet a border, where a norm's statistics travel.  What only has to be present for
a tensor to have a shape comes last: any of these may be enough.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from srfx.analysis.calls import Site, sites
from srfx.analysis.constancy import constancy
from srfx.analysis.labels import label
from srfx.analysis.liveness import executed, live_labels, liveness
from srfx.analysis.weights import class_bytes
from srfx.ir.program import Program
from srfx.lattice.classes import Classes
from srfx.ops.contraction import Contraction
from srfx.ops.facts import FactTable
from srfx.ops.norm import LayerNorm
from srfx.ops.sharing import siblings

WEIGHTS_PER_CHANNEL = 16
"""So many weights have to go for each channel that a norm selects.

Selecting an element takes a CPU as long as 20 to 40 multiplications in a large product; bytes saved count as well.
"""


def analyse(
    gm: fx.GraphModule, hints: dict[fx.Node, Any], multiple_of: int = 1
) -> tuple[FactTable, list[Site]]:
    """Everything there is to know before a graph is rewritten; reads only.

    Args:
        gm: an owned, functional graph.
        hints: concrete fake values of its nodes (`srfx.ir.shapes.propagate`).
        multiple_of: keep counts of block lanes and of parameter axes a multiple of this, where there are enough.
    """
    program = Program(gm, hints)
    found = sites(program)
    with torch.no_grad():
        labels = label(program, found)
        if multiple_of > 1:
            _count_in_multiples(program, labels)
        facts = FactTable(program, labels, Classes.of(labels.table, multiple_of))
        facts.kept = torch.zeros(labels.table.size, dtype=torch.bool)
        facts.refusals = list(labels.refusals)
        facts.siblings = siblings((site.rule, site.call) for site in found)
        facts.ranks = torch.zeros(labels.table.size, dtype=torch.int8)
        constancy(facts, found)
        liveness(facts, found)
        for has_presence in (False, True):  # the statistics of a norm may be all that an axis needs to keep
            _settle(facts, found, has_presence)
            while (
                _choose_carriers(facts, found) or _choose_emitted(facts, found) or _choose_whole(facts, found)
            ):
                liveness(facts, found)
                _settle(facts, found, has_presence)
    return facts, found


def _settle(facts: FactTable, found: list[Site], has_presence: bool) -> None:
    """Let the kept set grow to its fixpoint; liveness is that of the kept set before and after."""
    while True:
        seed = live_labels(facts) | facts.kept
        if facts.demanded is None:
            facts.demanded = seed
        present = _present(facts, found, seed) if has_presence else seed
        kept = facts.classes.close(seed | present | _sustained(facts, found))
        if torch.equal(kept, facts.kept):
            return
        facts.kept = kept
        liveness(facts, found)


def _present(facts: FactTable, found: list[Site], seed: Tensor) -> Tensor:
    """What a value that is still computed needs to have a shape: one channel along each axis, selected positions."""
    wanted, rep = torch.zeros_like(seed), facts.classes.representative
    for value in executed(facts, found):
        for labels in facts.labeller.required.get(value, ()) if isinstance(value, fx.Node) else ():
            wanted[rep[labels]] = True
        fields = facts.labeller.fields.get(value)
        if not isinstance(fields, dict):
            continue
        for labels in fields.values():
            held = rep[labels]
            if held.numel() and not bool((facts.kept | seed)[held].any()):
                wanted[held.reshape(-1)[0]] = True
    return wanted


def _sustained(facts: FactTable, found: list[Site]) -> Tensor:
    """What rules keep because something else is kept."""
    wanted = torch.zeros_like(facts.kept)
    for site in found:
        labels = site.rule.sustain(site.call, facts)
        if labels is not None:
            wanted[facts.classes.representative[labels]] = True
    return wanted


def _choose_emitted(facts: FactTable, found: list[Site]) -> bool:
    """For every norm that loses channels: which statistics its readers need, and where these travel.

    They take the places of removed channels.  When a place turns out to be kept, or there are fewer removed channels
    than statistics (and a new bias, if some reader needs one), the choice is made again; each round keeps more, so
    this ends.
    """
    readers: dict[fx.Node, list[tuple[Site, Tensor]]] = {}
    for site in found:
        taken = site.rule.taken(site.call, facts) if isinstance(site.rule, Contraction) else None
        if taken is not None:
            readers.setdefault(taken[0], []).append((site, taken[1]))
    again = False
    for site in found:
        if isinstance(site.rule, LayerNorm):
            gone, names, makes_bias = torch.zeros(0, dtype=torch.bool), set[str](), False
            if site.node in readers:
                gone = torch.stack([part for _, part in readers[site.node]]).any(0)
                site.rule.choose_shift(site.call, facts, gone)
            for reader, part in readers.get(site.node, ()):
                assert isinstance(reader.rule, Contraction)
                if reader.rule.is_bound(reader.call) and not reader.rule.pays(reader.call, facts, part):
                    facts.declined.add(reader.node)
                    again = True
                    continue
                names |= reader.rule.statistics(reader.call, facts, part)
                makes_bias |= reader.rule.makes_bias(reader.call, facts, part)
            again = site.rule.place(site.call, facts, names, gone, makes_bias) or again
    return again


def _choose_carriers(facts: FactTable, found: list[Site]) -> bool:
    """For every value whose nonzero constants meet a border: the channel that carries them all; True when one is new.

    Any of them would do.  One that is kept anyway costs nothing, a large one loses no digits.  A carrier that is
    kept may make further readers live, and these meet further constants (theory: Lemma V3).
    """
    wanted: dict[Any, Tensor] = {}
    axes: dict[Any, int] = {}
    for site in found:
        if isinstance(site.rule, Contraction):
            border = site.rule.border_constants(site.call, facts)
            if border is not None:
                x = site.rule.x(site.call)
                axes[x] = site.rule.channel_axis(site.call)
                wanted[x] = wanted[x] | border if x in wanted else border
    again = False
    for x, border in wanted.items():
        axis = axes[x]
        if axis not in facts.fields(x) or x in facts.carriers:
            continue
        again = True
        size = facts.constancy(x).value.abs().flatten().cpu()
        score = torch.where(border, size, 0.0)
        kept = facts.is_kept(facts.fields(x)[axis]).flatten() & border & (score >= 0.1 * score.max())
        facts.carriers[x] = int((torch.where(kept, score, 0.0) if bool(kept.any()) else score).argmax())
    return again


def _choose_whole(facts: FactTable, found: list[Site]) -> bool:
    """Norms whose result had better be as wide as their operand; True when one is new.

    Where readers have no use for some channels of its result, a norm selects the others.  That is worth while if the
    weights that go are many: an element selected takes as long as some multiplications (theory: Lemma N7).
    """
    again, costs = False, None
    for site in found:
        if not isinstance(site.rule, LayerNorm) or facts.live.get(site.node) is None:
            continue
        left_out = site.rule.left_out(site.call, facts)
        if left_out is None or not left_out.numel():
            continue
        costs = class_bytes(facts) if costs is None else costs
        saved = float(costs[facts.classes.representative[left_out].unique()].sum())
        n_selected = facts.count(facts.fields(site.node), len(site.call.out_shape) - 1)
        if saved < WEIGHTS_PER_CHANNEL * n_selected * site.call.output.element_size():
            facts.whole.add(site.node)
            again = True
    return again


def _count_in_multiples(program: Program, labels: Any) -> None:
    for param in program.params():
        fields = labels.fields.get(param)
        if not isinstance(fields, dict) or param in labels.followers:
            continue
        for axis, found in fields.items():
            if found.numel() == found.shape[axis] > 1:
                labels.table.block(found.reshape(1, -1), [], param.names[0])
