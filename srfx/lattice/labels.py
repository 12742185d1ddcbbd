"""Channel labels and the constraints between them.

A *label* is the number of one channel.  Four kinds of constraint are recorded while a graph is labelled:

1. tie           a and b are kept or dropped together (residual add; weight column and the channel it reads)
2. implication   guards kept and a kept  =>  b kept  (a parameter broadcast over heads ties only heads that stay)
3. block         the rows of a split axis: a kept lane keeps its row, rows that stay keep equally many lanes
4. pin           kept whatever happens, with a reason

All constraints are Horn clauses or grow the kept set, so the least kept set above a seed exists; see
`srfx.lattice.classes`.  Source: docs/theory.md, section 3.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

ALWAYS = 0
"""The label that is kept in every solution; used as the neutral guard."""


@dataclass(frozen=True)
class Block:
    """Rows of lanes: ``rows`` [R, n] labels, ``guards`` [R, k] labels of the row itself (k may be 0)."""

    rows: Tensor
    guards: Tensor
    site: str


@dataclass(frozen=True)
class Pin:
    """Labels that stay, with the site and the reason that hold them."""

    labels: Tensor
    site: str
    reason: str


@dataclass
class LabelTable:
    """Allocates labels and collects constraints; nothing is solved here."""

    size: int = 1  # label 0 is ALWAYS
    ties: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    implications: list[tuple[Tensor, Tensor, Tensor]] = field(default_factory=list)
    blocks: list[Block] = field(default_factory=list)
    pins: list[Pin] = field(default_factory=list)
    _seen_blocks: set[tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]] = field(default_factory=set)

    def fresh(self, *shape: int) -> Tensor:
        """New labels, numbered in row-major order of ``shape``."""
        count = 1
        for extent in shape:
            count *= extent
        labels = torch.arange(self.size, self.size + count).view(shape)
        self.size += count
        return labels

    def tie(self, a: Tensor, b: Tensor) -> None:
        """Keep or drop a and b together, elementwise after broadcasting."""
        a, b = torch.broadcast_tensors(a, b)
        self.ties.append((a.reshape(-1), b.reshape(-1)))

    def imply(self, a: Tensor, b: Tensor, guards: list[Tensor] | None = None) -> None:
        """Whenever a and all its guards are kept, b is kept; elementwise after broadcasting."""
        a, b, *rest = torch.broadcast_tensors(a, b, *(guards or []))
        columns = [g.reshape(-1) for g in rest] or [torch.full((a.numel(),), ALWAYS)]
        self.implications.append((torch.stack([*columns, a.reshape(-1)]), a.reshape(-1), b.reshape(-1)))

    def equate(self, whole: Tensor, parts: list[Tensor]) -> None:
        """``whole`` is kept iff all of ``parts`` are: whole => part each, and all parts => whole."""
        for part in parts:
            self.imply(whole, part)
        self.imply(parts[0], whole, parts[1:])

    def block(self, rows: Tensor, guards: list[Tensor], site: str) -> None:
        """Rows [R, n] keep equally many lanes each; a kept lane keeps its guards, each [R]."""
        stacked = torch.stack(guards, 1) if guards else rows.new_empty(rows.shape[0], 0)
        key = (tuple(rows.shape), tuple(rows.flatten().tolist()), tuple(stacked.flatten().tolist()))
        if key not in self._seen_blocks:
            self._seen_blocks.add(key)
            self.blocks.append(Block(rows, stacked, site))

    def rectangular(self, lanes: Tensor, axis: int, fields: Mapping[int, Tensor], site: str) -> None:
        """Lanes that differ along other axes: rows that exist keep equally many (theory: Lemma C4).

        Args:
            lanes: labels along ``axis``, a layout tensor; nothing is recorded where they differ along no other axis.
            axis: the axis of the lanes.
            fields: labels of the value's channel axes; those of the axes along which the lanes differ guard the rows.
            site: the node's name.
        """
        outer = [d for d in range(lanes.dim()) if d != axis and lanes.shape[d] > 1]
        if not outer:
            return
        guards = [self._agreed(fields[d], axis) for d in outer if d in fields]
        flat = [1 if d == axis else n for d, n in enumerate(lanes.shape)]
        joint = list(torch.broadcast_shapes(*(g.shape for g in guards), flat))
        wide = lanes.expand([lanes.shape[axis] if d == axis else n for d, n in enumerate(joint)])
        rows = wide.movedim(axis, -1).reshape(-1, lanes.shape[axis])
        self._block_of_distinct(rows, [g.expand(joint).reshape(-1) for g in guards], site)

    def _block_of_distinct(self, rows: Tensor, guards: list[Tensor], site: str) -> None:
        """Rows that share all their lanes (those of one convolution group) may go one by one while lanes stay."""
        distinct, which = torch.unique(rows, dim=0, return_inverse=True)
        if not guards or distinct.shape[0] == rows.shape[0]:
            self.block(rows, guards, site)
            return
        group = self.fresh(distinct.shape[0])
        self.imply(guards[0], group[which], guards[1:])
        self.block(distinct, [group], site)

    def _agreed(self, labels: Tensor, axis: int) -> Tensor:
        """Labels that have to agree along an axis: of two axes only one may differ along the other."""
        first = labels.narrow(axis, 0, 1)
        if labels.shape[axis] > 1:
            self.tie(labels, first)
        return first

    def pin(self, labels: Tensor, site: str, reason: str) -> None:
        """Keep these labels in every solution."""
        self.pins.append(Pin(labels.reshape(-1), site, reason))
