"""What a channel weighs: bytes of stored tensors, class by class."""

from __future__ import annotations

import torch
from torch import Tensor

from srfx.ops.facts import FactTable


def class_bytes(facts: FactTable) -> Tensor:
    """Bytes of stored tensors that one more channel of each class would take, [labels] by representative."""
    found = torch.zeros(facts.labeller.table.size, dtype=torch.float64)
    for param in facts.program.params():
        fields = facts.labeller.fields.get(param)
        if not isinstance(fields, dict) or not param.names:
            continue
        counts = [facts.count(fields, a) if a in fields else n for a, n in enumerate(param.shape)]
        for labels in fields.values():
            each = float(param.tensor.element_size())
            for d, n in enumerate(labels.shape):
                each *= counts[d] if n == 1 else 1
            add_to_classes(facts, found, labels, each)
    return found


def add_to_classes(facts: FactTable, found: Tensor, labels: Tensor, each: float) -> None:
    """Add ``each`` to the class of every label."""
    classes = facts.classes.representative[labels].flatten()
    found.index_add_(0, classes, torch.full((classes.numel(),), each, dtype=torch.float64))
