"""Inputs whose sizes say no more than they must: no run-time axis of size 1, none that equals another by chance.

Rules read sizes from hints.  A hint of size 1 on an axis that may be longer at run time hides what the op does there:
`[1, C] -> [C]` may merge the batch into the channels, a sum over one position is no sum over many.  Two axes of equal
size hide in which order a view takes them.  So a graph in which that may matter is surveyed at other sizes as well, on
fake tensors, and analysed at those (theory: section 12).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from itertools import count
from typing import Any

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensorMode

from srfx.errors import CaptureError
from srfx.ir.fake_run import Survey, quiet_fakes
from srfx.ir.shapes import survey
from srfx.ops.registry import rule_of
from srfx.ops.views import View

Axis = tuple[int, int]
"""A placeholder's place and an axis of its tensor."""


def generic_survey(gm: fx.GraphModule, known: Survey) -> Survey:
    """The survey to analyse a graph by: ``known``, or one at sizes that hide less.

    An axis of an input is of run-time size if the graph runs with another size there; axes of exported graphs are
    if their size is symbolic.  Axes that only change together (the batch of two inputs) are tried together.

    Args:
        gm: a captured graph; only read.
        known: its survey at the sizes that the user gave.  The values in it are only read.

    Cost: nothing when no size is in doubt; else one survey for each axis that is tried, and one for all.
    """
    ones, rest = _axes(gm, known)
    doubtful = ones + rest if _is_ambiguous(gm, known) else ones
    if not doubtful:
        return known
    taken = {n for value in known.inputs if isinstance(value, Tensor) for n in value.shape}
    free: dict[Axis, int] = {}
    for axes in _together(doubtful, known):
        size = _other_size(_size(known, axes[0]), taken)
        changing = _changing(gm, known, axes, size)
        free |= changing
        taken |= set(changing.values())
    while free:
        found = _try(gm, known, free)
        if found is not None:
            return found
        free.popitem()  # each may change, but not all at once: the first ones count most
    return known


def _axes(gm: fx.GraphModule, known: Survey) -> tuple[list[Axis], list[Axis]]:
    """Input axes that may be of run-time size: those of size 1, and the others."""
    ones: list[Axis] = []
    rest: list[Axis] = []
    for i, (node, value) in enumerate(zip(gm.graph.find_nodes(op="placeholder"), known.inputs, strict=True)):
        if not isinstance(value, Tensor) or value.layout is not torch.strided:
            continue
        declared = node.meta["val"].shape if isinstance(node.meta.get("val"), Tensor) else None
        for axis, size in enumerate(value.shape):
            if declared is not None and not isinstance(declared[axis], torch.SymInt):
                continue
            (ones if size == 1 else rest).append((i, axis))
    return ones, rest


def _size(known: Survey, axis: Axis) -> int:
    return int(known.inputs[axis[0]].shape[axis[1]])


def _is_ambiguous(gm: fx.GraphModule, known: Survey) -> bool:
    """Whether some op shrinks an axis to size 1, or some view has two axes of one size."""
    modules = dict(gm.named_modules(remove_duplicate=False))
    for node in gm.graph.nodes:
        value = known.values.get(node)
        if not node.op.startswith("call") or not isinstance(value, Tensor):
            continue
        rule = rule_of(node, modules)
        operand = next((known.values.get(n) for n in node.all_input_nodes), None)
        if not isinstance(operand, Tensor) or not (rule.shrinks_axes or isinstance(rule, View)):
            continue
        before, after = list(operand.shape), list(value.shape)
        if rule.shrinks_axes:
            if len(before) == len(after) and any(
                a == 1 < b for b, a in zip(before[2:], after[2:], strict=True)
            ):
                return True
        elif _repeats(before):
            return True
    return False


def _repeats(sizes: list[int]) -> bool:
    longer = [n for n in sizes if n > 1]
    return len(set(longer)) < len(longer)


def _together(axes: Iterable[Axis], known: Survey) -> Iterator[list[Axis]]:
    """Axes of different inputs that stand at the same place with the same size."""
    groups: dict[tuple[int, int], list[Axis]] = {}
    for axis in axes:
        groups.setdefault((axis[1], _size(known, axis)), []).append(axis)
    yield from groups.values()


def _changing(gm: fx.GraphModule, known: Survey, axes: list[Axis], size: int) -> dict[Axis, int]:
    """Those of the axes that may all have this size: all, else as many as fit one by one, else all but one."""
    if _try(gm, known, dict.fromkeys(axes, size)) is not None:
        return dict.fromkeys(axes, size)
    found: dict[Axis, int] = {}
    for axis in axes if len(axes) > 1 else ():
        if _try(gm, known, {**found, axis: size}) is not None:
            found[axis] = size
    for axis in axes if not found and len(axes) > 2 else ():
        rest = {a: size for a in axes if a != axis}
        if _try(gm, known, rest) is not None:
            return rest
    return found


def _other_size(size: int, taken: set[int]) -> int:
    """A multiple of the size (windows and patches still fit) that no input has so far."""
    return next(size * k for k in count(2) if size * k not in taken)


def _try(gm: fx.GraphModule, known: Survey, sizes: dict[Axis, int]) -> Survey | None:
    """The survey with these input sizes changed, None where the graph does not run then."""
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    inputs: list[Any] = list(known.inputs)
    for i in {i for i, _ in sizes}:
        value = inputs[i]
        shape = [sizes.get((i, axis), n) for axis, n in enumerate(value.shape)]
        order = sorted(range(value.dim()), key=lambda axis: -value.stride(axis))
        with mode:
            inputs[i] = torch.empty_permuted(shape, order, dtype=value.dtype, device=value.device)
    try:
        with quiet_fakes():
            found = survey(gm, inputs)
    except CaptureError:
        return None
    if any(axis == 0 for _, axis in sizes):
        return found  # the batch: what is in front of a merged axis moves no position of it
    return found if _views_alike(gm, known, found) and not _picks_of_merged(gm, known, found) else None


def _views_alike(gm: fx.GraphModule, known: Survey, other: Survey) -> bool:
    """Whether no view that keeps some axes apart at the known sizes mixes all of them at the other ones.

    A view with literal sizes may take a larger picture for more pictures: ``reshape(-1, C, 16)`` of [N, C, 8, 8] runs,
    and mixes channels into the batch.  Such a size is no size of the model.
    """
    modules = dict(gm.named_modules(remove_duplicate=False))
    for node in gm.graph.nodes:
        operand = next(iter(node.all_input_nodes), None)
        if operand is None or not isinstance(rule_of(node, modules), View):
            continue
        shapes = [
            tuple(getattr(run.values.get(n), "shape", ())) for run in (known, other) for n in (operand, node)
        ]
        before = _cuts(shapes[0], shapes[1])
        if before and not before & _cuts(shapes[2], shapes[3]):
            return False
    return True


def _picks_of_merged(gm: fx.GraphModule, known: Survey, other: Survey) -> bool:
    """Whether positions that do not depend on a size are picked from an axis that a view merged of several.

    ``flatten(1)[:, 1:8]`` of [N, 8, 1, 1] picks channels, of a larger picture positions of the first one.  An axis that is
    merged in front of another one is of samples and tokens, not of channels.
    """
    merged: dict[fx.Node, None] = {}
    for node in gm.graph.nodes:
        before = next((x for x in node.all_input_nodes if x in merged), None)
        now, then = _shapes(node, known, other)
        sizes = _shapes(node.all_input_nodes[0], known, other)[1] if node.all_input_nodes else ()
        places = [i for i, (a, b) in enumerate(zip(now, then, strict=False)) if a != b and b not in sizes]
        if len(now) < len(sizes) and any(i > 0 or len(now) == 1 for i in places):
            merged[node] = None
        elif before is not None and len(now) == len(_shapes(before, known, other)[0]):
            was, were = _shapes(before, known, other)
            is_picked = any(a == b > 1 and c != d for a, b, c, d in zip(now, then, was, were, strict=True))
            if is_picked and math.prod(then) < math.prod(were):  # else it is turned
                return True
            merged[node] = None
    return False


def _shapes(node: fx.Node, known: Survey, other: Survey) -> tuple[tuple[int, ...], tuple[int, ...]]:
    one, two = (tuple(getattr(run.values.get(node), "shape", ())) for run in (known, other))
    return one, two


def _cuts(before: Sequence[int], after: Sequence[int]) -> set[tuple[int, int]]:
    """Places (i, j) such that the first i axes become the first j ones; at neither end."""
    left = [math.prod(before[:i]) for i in range(1, len(before))]
    right = [math.prod(after[:j]) for j in range(1, len(after))]
    return {(i, j) for i, a in enumerate(left, 1) for j, b in enumerate(right, 1) if a == b}
