"""What a port saves and what it costs, in bytes of stored tensors."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, fx

from srfx.ops.facts import FactTable

INDEX_BYTES = 4


@dataclass(frozen=True)
class Cut:
    """The channels on both sides of a port, bool [C], and the classes they belong to, [C]."""

    inside: Tensor
    outside: Tensor
    inner: Tensor
    outer: Tensor | None  # None: the operand's axis carries no channels, all of them are there

    @property
    def is_trivial(self) -> bool:
        """Whether both sides keep the same channels."""
        return torch.equal(self.inside, self.outside)

    @property
    def size_bytes(self) -> int:
        """What the index costs that tells the sides apart."""
        return INDEX_BYTES * int(self.inside.sum())

    def n_supplied(self) -> int:
        """Channels of the reader that a stored tensor supplies."""
        return int((self.inside & ~self.outside).sum())

    def saved(self, costs: Tensor) -> float:
        """What would come back, in units of ``costs`` [labels], were both sides to keep the same channels."""
        found = float(costs[self.inner[self.outside & ~self.inside].unique()].sum())
        if self.outer is not None:
            found += float(costs[self.outer[self.inside & ~self.outside].unique()].sum())
        return found


def cut_at(facts: FactTable, node: fx.Node, axis: int) -> Cut:
    """The two sides of the port ``node``."""
    source = facts.program.value(node.args[0])  # type: ignore[arg-type]
    rep = facts.classes.representative
    inner = rep[facts.fields(node)[axis].flatten()]
    fields = facts.fields(source)
    if axis not in fields:
        return Cut(facts.kept[inner], torch.ones_like(facts.kept[inner]), inner, None)
    outer = rep[fields[axis].flatten()]
    return Cut(facts.kept[inner], facts.kept[outer], inner, outer)


def class_bytes(facts: FactTable) -> Tensor:
    """Bytes of stored tensors that one more channel of each class would take, [labels] by representative."""
    found = torch.zeros(facts.labeller.table.size, dtype=torch.float64)
    rep = facts.classes.representative
    for param in facts.program.params():
        fields = facts.labeller.fields.get(param)
        if not isinstance(fields, dict) or not param.names:
            continue
        counts = [facts.count(fields, a) if a in fields else n for a, n in enumerate(param.shape)]
        for labels in fields.values():
            each = float(param.tensor.element_size())
            for d, n in enumerate(labels.shape):
                each *= counts[d] if n == 1 else 1
            found.index_add_(
                0, rep[labels].flatten(), torch.full((labels.numel(),), each, dtype=torch.float64)
            )
    return found
