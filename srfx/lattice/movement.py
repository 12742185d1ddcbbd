"""Structural ops as four steps on *layout tensors*: permute, regroup (view), take along an axis, concatenate.

A layout tensor has the rank of the value it describes; an axis along which nothing differs has size 1.  Labels,
constants and liveness of a value are all layout tensors, so one step moves them all the same way (theory: Lemma M1).
A step also carries *fields* (axis -> labels along that axis), which needs the constraints of split and merged axes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from srfx.lattice.labels import LabelTable

Fields = dict[int, Tensor]
"""Channel axis -> labels along it, a layout tensor; axes without channels are absent."""

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Permute:
    """Reorder axes: output axis i is input axis ``order[i]``."""

    order: Shape

    def apply(self, t: Tensor, fill: float | int | bool = 0) -> Tensor:
        return t.permute(self.order)

    def carry(self, fields: Fields, table: LabelTable, site: str) -> tuple[Fields, list[Tensor]]:
        return {self.order.index(a): f.permute(self.order) for a, f in fields.items()}, []


@dataclass(frozen=True)
class Take:
    """Pick positions ``source`` along one axis; -1 makes a new position holding the fill value."""

    axis: int
    source: Tensor
    extent: int

    def apply(self, t: Tensor, fill: float | int | bool = 0) -> Tensor:
        fresh = self.source < 0
        if t.shape[self.axis] == 1 and self.extent != 1:
            if not bool(fresh.any()):
                return t
            t = t.expand(*t.shape[: self.axis], self.extent, *t.shape[self.axis + 1 :])
        taken = t.index_select(self.axis, self.source.clamp(min=0).to(t.device))
        if bool(fresh.any()):
            shape = [1] * t.dim()
            shape[self.axis] = -1
            taken = taken.masked_fill(fresh.view(shape).to(t.device), fill)
        return taken

    def carry(self, fields: Fields, table: LabelTable, site: str) -> tuple[Fields, list[Tensor]]:
        moved: Fields = {}
        for a, f in fields.items():
            if a == self.axis and f.shape[a] == self.extent:
                moved[a] = self._along(f, fields, table, site)
            elif f.shape[self.axis] > 1:
                moved[a] = f.index_select(self.axis, self.source.clamp(min=0))
            else:
                moved[a] = f
        return moved, []

    def _along(self, f: Tensor, fields: Fields, table: LabelTable, site: str) -> Tensor:
        f = self._packable(f, fields, table, site)
        taken = f.index_select(self.axis, self.source.clamp(min=0))
        fresh = (self.source < 0).nonzero().flatten()
        if fresh.numel():
            shape = list(taken.shape)
            shape[self.axis] = fresh.numel()
            taken = taken.index_copy(self.axis, fresh, table.fresh(*shape))
        return taken

    def _packable(self, f: Tensor, fields: Fields, table: LabelTable, site: str) -> Tensor:
        """Rows that differ can be cut at one place, or where they keep whole periods (theory: Lemma C5)."""
        outer = [d for d in range(f.dim()) if d != self.axis and f.shape[d] > 1]
        if not outer or torch.equal(self.source, torch.arange(self.extent)):
            return f
        steps = self.source.diff()
        if self.source.numel() and bool((steps == 1).all()) and int(self.source[0]) >= 0:
            start = int(self.source[0])
            if start:  # what lies before a slice keeps equal counts as well
                table.rectangular(f.narrow(self.axis, 0, start), self.axis, fields, site)
            return f
        period = self._period()
        if period is not None:
            first = torch.arange(self.extent) // period * period
            table.tie(f, f.index_select(self.axis, first))
            return f
        for d in outer:  # any other pattern needs the same kept set in every row
            table.tie(f, f.narrow(d, 0, 1))
            f = f.narrow(d, 0, 1)
        return f

    def _period(self) -> int | None:
        """The step of a slice that takes one position of each period of the axis."""
        n = self.source.numel()
        if n < 2 or self.extent % n:
            return None
        period = self.extent // n
        whole = torch.arange(n) * period
        return (
            period if torch.equal(self.source - self.source[0], whole) and int(self.source[0]) >= 0 else None
        )


@dataclass(frozen=True)
class Regroup:
    """view / reshape / flatten / squeeze / unsqueeze: row-major refactoring of the axes."""

    before: Shape
    after: Shape

    def groups(self) -> list[tuple[Shape, Shape]]:
        """Minimal groups (input axes, output axes) with equal products, in order; unit axes may stand alone."""
        found: list[tuple[Shape, Shape]] = []
        i = j = 0
        n, m = len(self.before), len(self.after)
        while i < n or j < m:
            if i < n and j < m and self.before[i] == self.after[j]:
                found.append(((i,), (j,)))
                i, j = i + 1, j + 1
            elif i < n and self.before[i] == 1:
                found.append(((i,), ()))
                i += 1
            elif j < m and self.after[j] == 1:
                found.append(((), (j,)))
                j += 1
            else:
                i0, j0 = i, j
                left, right = self.before[i], self.after[j]
                i, j = i + 1, j + 1
                while left != right:
                    if left < right:
                        left, i = left * self.before[i], i + 1
                    else:
                        right, j = right * self.after[j], j + 1
                found.append((tuple(range(i0, i)), tuple(range(j0, j))))
        return found

    def apply(self, t: Tensor, fill: float | int | bool = 0) -> Tensor:
        wide, shape = list(t.shape), [1] * len(self.after)
        for ins, outs in self.groups():
            if any(t.shape[i] > 1 for i in ins):
                for i in ins:
                    wide[i] = self.before[i]
                for o in outs:
                    shape[o] = self.after[o]
        return t.expand(wide).reshape(shape)

    def carry(self, fields: Fields, table: LabelTable, site: str) -> tuple[Fields, list[Tensor]]:
        moved: Fields = {}
        required: list[Tensor] = []
        for ins, outs in self.groups():
            axes = [a for a in ins if a in fields]
            if not axes:
                continue
            if len(ins) == 1 and len(outs) == 1:
                moved[outs[0]] = self.apply(fields[axes[0]])
                continue
            merged = self.apply(self._merge(fields, axes, ins, table))
            split = _split(merged, outs, table)
            if split:
                moved.update(split)
            else:
                required.append(merged.reshape(-1)[:1])
        return moved, required

    def _merge(self, fields: Fields, axes: list[int], ins: Shape, table: LabelTable) -> Tensor:
        parts = []
        for a in axes:
            f = fields[a]
            for later in ins:
                if later > a and f.shape[later] > 1:  # the packed order would depend on a later axis
                    table.tie(f, f.narrow(later, 0, 1))
                    f = f.narrow(later, 0, 1)
            parts.append(f)
        inner = parts[-1]
        if all(inner.shape[a] == self.before[a] for a in axes):
            return inner
        joint = torch.broadcast_shapes(*(p.shape for p in parts))
        whole = table.fresh(*joint)
        table.equate(whole, parts)
        return whole


def _split(merged: Tensor, outs: Shape, table: LabelTable) -> Fields:
    """Finest labels on the innermost axis that differs, block labels on the outer ones; {} when all are one."""
    merged = squeeze_uniform(merged)
    varying = [o for o in outs if merged.shape[o] > 1]
    if not varying:
        return {}
    fields: Fields = {varying[-1]: merged}
    for o in varying[:-1]:
        inner = [d for d in varying if d > o]
        rows = [d for d in range(merged.dim()) if d not in inner]
        flat = merged.permute(*rows, *inner).reshape(math.prod(merged.shape[d] for d in rows), -1)
        _, which = torch.unique(flat, dim=0, return_inverse=True)
        shape = [1 if d in inner else merged.shape[d] for d in range(merged.dim())]
        n_rows = int(which.max()) + 1
        fields[o] = table.fresh(n_rows)[which].view(shape)
        if (
            n_rows < which.numel()
        ):  # rows that are copies share a label, which a block of lanes does not ask for
            table.imply(merged, fields[o])
    return fields


def squeeze_uniform(t: Tensor) -> Tensor:
    """Size 1 on every axis along which the layout tensor does not differ."""
    for axis in range(t.dim()):
        if t.shape[axis] > 1:
            first = t.narrow(axis, 0, 1)
            if bool((t == first).all()):
                t = first
    return t


Step = Permute | Take | Regroup


def walk(steps: Sequence[Step], t: Tensor, fill: float | int | bool = 0) -> Tensor:
    """Apply the steps in order to one layout tensor."""
    for step in steps:
        t = step.apply(t, fill)
    return t


def pull_back(steps: Sequence[Step], out: Tensor, shape: Shape) -> Tensor:
    """Which input positions some marked output position copies: the adjoint of `walk`, bool of layout ``shape``."""
    if all(isinstance(step, Permute) for step in steps):
        return _permuted_back(steps, out, shape)
    source = walk(steps, torch.arange(math.prod(shape)).view(shape), fill=-1)
    source, out = torch.broadcast_tensors(source, out)
    hit = source[out]
    found = torch.zeros(math.prod(shape), dtype=torch.bool)
    found[hit[hit >= 0]] = True
    return found.view(shape)


def _permuted_back(steps: Sequence[Step], out: Tensor, shape: Shape) -> Tensor:
    """`pull_back` where axes are only reordered (the transpose of a large weight)."""
    for step in reversed(steps):
        assert isinstance(step, Permute)
        out = out.permute([step.order.index(a) for a in range(len(step.order))])
    for axis, n in enumerate(shape):
        if n == 1 and out.shape[axis] > 1:
            out = out.any(axis, keepdim=True)
    return out.expand(shape)


def follow(steps: Sequence[Step], axis: int) -> int | None:
    """Where an axis goes if the steps leave it whole and in order; None if they split, merge or pick along it."""
    for step in steps:
        if isinstance(step, Permute):
            axis = step.order.index(axis)
        elif isinstance(step, Take):
            if step.axis == axis:
                return None
        else:
            alone = [outs for ins, outs in step.groups() if ins == (axis,) and len(outs) == 1]
            if not alone:
                return None
            axis = alone[0][0]
    return axis
