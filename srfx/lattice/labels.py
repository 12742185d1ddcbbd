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

    def pin(self, labels: Tensor, site: str, reason: str) -> None:
        """Keep these labels in every solution."""
        self.pins.append(Pin(labels.reshape(-1), site, reason))
