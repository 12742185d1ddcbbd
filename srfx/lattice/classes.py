"""Classes of tied channels, and the least kept set that satisfies every constraint.

The solver only ever grows the kept set, and each step is forced (clauses 1, 2, 4) or needed to make a block
rectangular (clause 3), so it ends after at most as many rounds as there are labels; in practice two or three.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from srfx.lattice.labels import Block, LabelTable


def connected_components(size: int, pairs: list[tuple[Tensor, Tensor]]) -> Tensor:
    """The smallest label of each label's class, [size]; hooking and pointer jumping, O(m log n) vectorised."""
    parent = torch.arange(size)
    if not pairs:
        return parent
    a = torch.cat([p[0] for p in pairs])
    b = torch.cat([p[1] for p in pairs])
    while True:
        root_a, root_b = parent[a], parent[b]
        apart = root_a != root_b
        if not bool(apart.any()):
            return parent
        a, b, root_a, root_b = a[apart], b[apart], root_a[apart], root_b[apart]
        parent.scatter_reduce_(0, torch.maximum(root_a, root_b), torch.minimum(root_a, root_b), "amin")
        while True:
            grand = parent[parent]
            if torch.equal(grand, parent):
                break
            parent = grand


@dataclass(frozen=True)
class Classes:
    """A label table with its ties resolved; ``close`` grows a seed to the least kept set above it."""

    representative: Tensor  # [labels]
    guards: tuple[Tensor, ...]  # implications by number of guards: [k + 1, m] of representatives
    targets: tuple[Tensor, ...]
    blocks: tuple[Block, ...]
    pinned: Tensor  # [labels] bool, by representative
    multiple_of: int = 1

    @classmethod
    def of(cls, table: LabelTable, multiple_of: int = 1) -> Classes:
        """Resolve the ties of a table; block counts are rounded up to ``multiple_of`` where there are enough lanes."""
        rep = connected_components(table.size, table.ties)
        by_arity: dict[int, list[tuple[Tensor, Tensor]]] = {}
        for guards, _, target in table.implications:
            by_arity.setdefault(guards.shape[0], []).append((rep[guards], rep[target]))
        arities = sorted(by_arity)
        blocks: dict[tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]], Block] = {}
        for b in table.blocks:
            rows, guards = rep[b.rows], rep[b.guards]
            blocks.setdefault(
                (tuple(rows.shape), tuple(rows.flatten().tolist()), tuple(guards.flatten().tolist())),
                Block(rows, guards, b.site),
            )
        pinned = torch.zeros(table.size, dtype=torch.bool)
        pinned[0] = True
        for pin in table.pins:
            pinned[rep[pin.labels]] = True
        return cls(
            rep,
            tuple(torch.cat([g for g, _ in by_arity[k]], 1) for k in arities),
            tuple(torch.cat([t for _, t in by_arity[k]]) for k in arities),
            tuple(blocks.values()),
            pinned,
            multiple_of,
        )

    def close(self, seed: Tensor, first: Tensor | None = None) -> Tensor:
        """The kept set, [labels] bool by representative.

        Args:
            seed: representatives that have to stay.
            first: those that are revived before others where equal counts leave a choice.
        """
        kept = seed | self.pinned
        order = torch.arange(kept.numel())
        if first is not None:
            order = order + torch.where(first, 0, kept.numel())
        while True:
            before = int(kept.sum())
            self._imply(kept)
            for block in self.blocks:
                self._fill(kept, block, order)
            if int(kept.sum()) == before:
                return kept

    def _imply(self, kept: Tensor) -> None:
        while True:
            changed = False
            for guards, target in zip(self.guards, self.targets, strict=True):
                forced = target[kept[guards].all(0) & ~kept[target]]
                if forced.numel():
                    kept[forced] = True
                    changed = True
            if not changed:
                return

    def _fill(self, kept: Tensor, block: Block, order: Tensor) -> None:
        lanes = kept[block.rows]  # [R, n]
        if block.guards.shape[1]:
            kept[block.guards[lanes.any(1)].reshape(-1)] = True
            present = kept[block.guards].all(1)
        else:  # rows of an untracked axis: all there as soon as one lane is
            present = lanes.any().expand(lanes.shape[0])
        if not bool(present.any()):
            return
        counts = lanes.sum(1)
        wanted = max(1, int(counts[present].max()))
        wanted = min(lanes.shape[1], -(-wanted // self.multiple_of) * self.multiple_of)
        short = present & (counts < wanted)
        if not bool(short.any()):
            return
        rows = block.rows[short]
        kept[rows[_chosen(order[rows], ~lanes[short], (wanted - counts[short]).unsqueeze(1))]] = True


def _chosen(rows: Tensor, dead: Tensor, missing: Tensor) -> Tensor:
    """Dead lanes to revive in each row, [R, n] bool: whole classes, as many as fit into ``missing`` [R, 1].

    A class may hold several lanes of a row (a rotary pair), and reviving one revives them all: classes are taken in
    the order of the numbers in ``rows`` while they fit; when the first does not fit, the first that does, else the first.
    """
    last = torch.iinfo(rows.dtype).max
    ordered, order = torch.where(dead, rows, last).sort(dim=1, stable=True)  # lanes of a class stand together
    begin = torch.searchsorted(ordered, ordered)
    end = torch.searchsorted(ordered, ordered, right=True)
    valid = ordered != last
    taken = valid & (end <= missing)
    fitting = valid & (end - begin <= missing)
    first = torch.where(fitting.any(1), fitting.int().argmax(1), 0).unsqueeze(1)
    alone = valid & (ordered == ordered.gather(1, first))
    taken = torch.where(taken.any(1, keepdim=True), taken, alone)
    return torch.zeros_like(dead).scatter(1, order, taken)
