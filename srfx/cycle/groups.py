"""Which slices of which parameters would leave together: the groups that a structured penalty presses on.

The labels of srfx's own analysis (`srfx.analysis.labels`) say for every parameter axis which class of tied channels
each position belongs to.  A **group** is a class together with every class that has to go when it goes: the lanes of an
attention head with the head.  In terms of the constraints (docs/theory.md, section 3): h belongs to the group of g
when "h kept => g kept" follows from implications without further guards and from blocks (a kept lane keeps its row).
A channel behind a norm is one with the channel in front of it: it can only leave with that one, and then it does,
since its readers take the norm's statistics instead (docs/norms.md).

A class that is kept in every solution (pinned, or a channel of a graph output, or implied by one) makes no group.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

from srfx.analysis.calls import Site, sites
from srfx.analysis.labels import label
from srfx.ir.capture import capture, unwrap
from srfx.ir.clone import clone_structure
from srfx.ir.live import effective_name
from srfx.ir.program import Param, Program
from srfx.ir.shapes import SharedHints, survey
from srfx.ir.surroundings import on_cpu, plain_torch
from srfx.lattice.classes import Classes
from srfx.lattice.labels import ALWAYS
from srfx.lattice.movement import Fields
from srfx.minimize import canonicalise
from srfx.ops.contraction import Contraction
from srfx.ops.facts import Labeller
from srfx.ops.norm import LayerNorm

NO_GROUP = -1
"""Group number of a position that belongs to no group."""


@dataclass(frozen=True)
class GroupSlice:
    """One parameter, seen along the axes on which its channels lie.

    Attributes:
        name: the parameter's name in the model, without the suffix of a pruning hook.
        groups: long, of the parameter's rank, size 1 on axes along which groups do not differ: the group of each
            position, or `NO_GROUP`.
        is_bias: an added vector; a channel can leave while it is not zero.
    """

    name: str
    groups: Tensor
    is_bias: bool = False


@dataclass(frozen=True)
class ChannelGroups:
    """Every group of a model, as slices of its parameters.

    Attributes:
        n_groups: how many; numbered from 0 in the order in which the graph meets them.
        slices: in the order of the parameters; a parameter has one for each axis with channels, more where a position
            belongs to several groups (a lane, and its head).
        parameters: names of the trainable parameters, shared ones once.
        biases: those of them that are added vectors.
        uncovered: those that are in no slice: all their channels stay, whatever their values are.
        replaced: those that the canonical form of the graph stores otherwise, such as a fused projection, which
            becomes three; a minimized model has none.

    Example:
        >>> net = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
        >>> found = channel_groups(net, torch.zeros(1, 4))
        >>> found.n_groups, [(s.name, s.groups.flatten().tolist()) for s in found.slices]
        (3, [('0.weight', [0, 1, 2]), ('0.bias', [0, 1, 2]), ('2.weight', [0, 1, 2])])
    """

    n_groups: int
    slices: tuple[GroupSlice, ...]
    parameters: tuple[str, ...] = ()
    biases: frozenset[str] = frozenset()
    uncovered: tuple[str, ...] = ()
    replaced: tuple[str, ...] = ()

    def members(self, group: int) -> list[tuple[str, int, list[int]]]:
        """What a group consists of: parameter, axis, positions (-1 for the axis where they differ along several)."""
        found = []
        for s in self.slices:
            hit = s.groups == group
            if not bool(hit.any()):
                continue
            axes = [a for a, n in enumerate(s.groups.shape) if n > 1] or [0]
            axis = axes[0] if len(axes) == 1 else -1
            found.append((s.name, axis, hit.flatten().nonzero().flatten().tolist()))
        return found


def channel_groups(
    model: nn.Module | ExportedProgram,
    example_inputs: Any = None,
    *,
    example_kwargs: Mapping[str, Any] | None = None,
    inputs: bool = False,
) -> ChannelGroups:
    """Find the groups of a model.  Nothing is changed, no weight is read: only shapes and the graph count.

    Args:
        model: what `srfx.minimize` takes; it may be in training mode, and pruned by hooks.
        example_inputs: as for `srfx.minimize`.
        example_kwargs: as for `srfx.minimize`.
        inputs: also make a group of each input column of the layers that read the graph's inputs.  Such a column does
            not leave when it is zero, except under ``minimize(..., ragged=True)``, which then reads fewer features.

    Returns:
        The groups; tensors on the CPU.

    Raises:
        CaptureError, MissingShapesError, UnsupportedModelError: as `srfx.minimize`.
    """
    module = model.module() if isinstance(model, ExportedProgram) else model
    with plain_torch(), torch.no_grad():
        program = _canonical(module, example_inputs, example_kwargs)
        with on_cpu():
            found = sites(program)
            labels = label(program, found)
            _join_norms(found, labels)
            columns = _input_columns(found, labels) if inputs else []
            return _collect(program, labels, found, columns, module)


def _canonical(model: nn.Module, args: Any, kwargs: Mapping[str, Any] | None) -> Program:
    """The graph as the analyses read it, in eval mode, on the model's own tensors."""
    owned = clone_structure(model)
    for module in owned.modules():
        module.training = False  # batch statistics would be a barrier; exported modules refuse eval()
    captured = capture(owned, args, kwargs)
    gm = captured.graph_module
    hints = SharedHints(survey(gm, captured.inputs))
    canonicalise(gm, hints)
    return Program(gm, survey(gm, hints).values)


def _join_norms(found: list[Site], labels: Labeller) -> None:
    """Tie the channels of each norm's result to those of its operand."""
    for site in found:
        if isinstance(site.rule, LayerNorm) and site.rule.is_separate(site.call, labels):
            sources = site.rule.sources(site.call, labels)
            behind = labels.of(site.node)[len(site.call.out_shape) - 1].flatten()
            labels.table.tie(sources, behind[: sources.numel()])


def _input_columns(found: list[Site], labels: Labeller) -> list[Tensor]:
    """Column labels of the weights whose operand has no channels there: it is (made of) a graph input."""
    columns = []
    for site in found:
        rule = site.rule
        if (
            not isinstance(rule, Contraction)
            or rule.refused(site.call) is not None
            or rule.groups(site.call) > 1
        ):
            continue
        if rule.channel_axis(site.call) not in labels.of(rule.x(site.call)):
            columns.append(labels.of(rule.w(site.call))[rule.column_axis(site.call)].reshape(-1))
    return columns


def _collect(
    program: Program, labels: Labeller, found: list[Site], columns: list[Tensor], model: nn.Module
) -> ChannelGroups:
    classes = Classes.of(labels.table)
    rep = classes.representative
    held = _held(program, labels, classes)
    for column in columns:
        held[rep[column]] = False
    members = torch.bincount(rep, minlength=rep.numel())
    for fields in (labels.fields.get(param) for param in program.params()):
        for axis, f in fields.items() if isinstance(fields, dict) else ():
            if f.shape[axis] == 1:  # an axis of size 1 that only broadcasts is no channel
                held[rep[f]] |= members[rep[f]] == 1
    live = _trainable(model)
    biases = {site.call.value("bias") for site in found}
    params: list[tuple[str, Param, Fields]] = []
    for param in program.params():
        name = next((n for n in param.names if n in live), None)
        fields = labels.fields.get(param)
        if name is not None and live[name][1] == param.shape and isinstance(fields, dict):
            params.append((live[name][0], param, fields))
    stored = torch.zeros(labels.table.size, dtype=torch.bool)
    for _, _, fields in params:
        for f in fields.values():
            stored[rep[f]] = True
    belongs = _memberships(classes, held, stored)
    number = torch.full((labels.table.size,), NO_GROUP)
    wanted = belongs[1].unique()
    number[wanted] = torch.arange(wanted.numel())
    table = _table(belongs, number, labels.table.size)
    slices = [
        GroupSlice(name, groups, param in biases)
        for name, param, fields in params
        for groups in _slices(fields, rep, table)
    ]
    names = tuple(dict.fromkeys(first for first, _ in live.values()))
    covered = {s.name for s in slices}
    present = {name for name, _, _ in params}
    return ChannelGroups(
        wanted.numel(),
        tuple(slices),
        names,
        frozenset(name for name, param, _ in params if param in biases),
        tuple(n for n in names if n in present and n not in covered),
        tuple(n for n in names if n not in present),
    )


def _trainable(model: nn.Module) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Every name that the graph may have for a trainable parameter -> its first name, and its shape."""
    found: dict[str, tuple[str, tuple[int, ...]]] = {}
    first: dict[int, str] = {}
    for name, p in unwrap(model).named_parameters(remove_duplicate=False):
        if p.requires_grad:
            name = effective_name(name)
            found[name] = first.setdefault(id(p), name), tuple(p.shape)
    return found


def _held(program: Program, labels: Labeller, classes: Classes) -> Tensor:
    """Classes that stay in every solution whatever the weights are, [labels] bool by representative."""
    seed = torch.zeros(labels.table.size, dtype=torch.bool)
    for node in program.gm.graph.output_node().all_input_nodes:
        fields = labels.fields.get(program.value(node), {})
        for part in fields if isinstance(fields, tuple) else (fields,):
            for f in part.values():
                seed[classes.representative[f]] = True
    held = dataclasses.replace(classes, blocks=()).close(seed)
    source, target = _edges(classes)
    while True:
        more = target[held[source] & ~held[target]]
        if not more.numel():
            return held
        held[more] = True


def _edges(classes: Classes) -> Tensor:
    """Pairs (h, g) of classes with "h kept => g kept" and no further guard, [2, m]."""
    pairs = [torch.zeros(2, 0, dtype=torch.long)]
    for guards, target in zip(classes.guards, classes.targets, strict=True):
        source = guards[-1]
        alone = ((guards == source) | (guards == classes.representative[ALWAYS])).all(0)
        pairs.append(torch.stack([source[alone], target[alone]]))
    for block in classes.blocks:
        n_lanes = block.rows.shape[1]
        for guard in block.guards.unbind(1):
            pairs.append(torch.stack([block.rows.reshape(-1), guard.repeat_interleave(n_lanes)]))
    found = torch.cat(pairs, 1)
    pairs_once: Tensor = torch.unique(found[:, found[0] != found[1]], dim=1)
    return pairs_once


def _memberships(classes: Classes, held: Tensor, stored: Tensor) -> Tensor:
    """Pairs (h, g): class h, which has parameters, belongs to the group of g, [2, m]; every set of members once."""
    own = torch.arange(held.numel())[classes.representative == torch.arange(held.numel())]
    own = own[~held[own]]
    edges = _edges(classes)
    edges = edges[:, ~held[edges].any(0)]
    pairs = torch.stack([own, own])
    while True:
        longer = torch.unique(torch.cat([pairs, _join(pairs, edges)], 1), dim=1)
        if longer.shape[1] == pairs.shape[1]:
            return _distinct(pairs[:, stored[pairs[0]]], held.numel())
        pairs = longer


def _join(pairs: Tensor, edges: Tensor) -> Tensor:
    """(h, g) and (g, k) give (h, k); ``edges`` is sorted by its first row."""
    begin = torch.searchsorted(edges[0].contiguous(), pairs[1].contiguous())
    count = torch.searchsorted(edges[0].contiguous(), pairs[1].contiguous(), right=True) - begin
    which = torch.arange(pairs.shape[1]).repeat_interleave(count)
    offset = torch.arange(which.numel()) - (count.cumsum(0) - count)[which]
    return torch.stack([pairs[0, which], edges[1, begin[which] + offset]])


def _distinct(pairs: Tensor, n: int) -> Tensor:
    """Of groups with the same members only the first stays; sets are told apart by the sum of random numbers."""
    generator = torch.Generator().manual_seed(0)
    marks = torch.randint(2**62, (2, n), generator=generator)
    sums = torch.zeros(n, 2, dtype=torch.long).index_add(
        0, pairs[1], marks[:, pairs[0]].t()
    )  # wraps, which is fine
    _, which = torch.unique(sums, dim=0, return_inverse=True)
    first = torch.full((n + 1,), n).scatter_reduce(0, which, torch.arange(n), "amin")
    return pairs[:, first[which[pairs[1]]] == pairs[1]]


def _table(belongs: Tensor, number: Tensor, n: int) -> Tensor:
    """Group numbers of each class, [n, most groups of one class], filled up with `NO_GROUP`."""
    belongs = belongs[:, number[belongs[1]] >= 0]
    belongs = belongs[:, belongs[0].argsort(stable=True)]
    count = torch.bincount(belongs[0], minlength=n)
    table = torch.full((n, max(1, int(count.max()))), NO_GROUP)
    rank = torch.arange(belongs.shape[1]) - (count.cumsum(0) - count)[belongs[0]]
    table[belongs[0], rank] = number[belongs[1]]
    return table


def _slices(fields: Fields, rep: Tensor, table: Tensor) -> list[Tensor]:
    """Group numbers of one parameter: layouts of its axes; equal ones (a depthwise kernel's two) count once."""
    found: list[Tensor] = []
    for axis in sorted(fields):
        groups = table[rep[fields[axis]]]  # [*layout, m]
        for layer in groups.unbind(-1):
            is_new = not any(torch.equal(layer, other) for other in found)
            if is_new and bool((layer != NO_GROUP).any()):
                found.append(layer)
    return found
