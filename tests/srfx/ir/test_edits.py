"""Edits, carried out one by one."""

from __future__ import annotations

import torch
from torch import Tensor, fx, nn

from srfx.ir.editor import GraphEditor
from srfx.ir.edits import ReplaceOperand


class Choice(nn.Module):
    def forward(self, seen: Tensor, x: Tensor, y: Tensor) -> Tensor:
        return torch.where(seen, x, y)


def test_constants_of_two_operands_of_one_call_have_paths_of_their_own() -> None:
    """Found by fuzzing (seed 0, decomposed): the second constant took the path of the first."""
    gm = fx.symbolic_trace(Choice())
    editor = GraphEditor(gm)
    seen, x = torch.tensor([True, False]), torch.tensor([1.0, 2.0])
    ReplaceOperand("where", "seen", "where_constant", seen).apply(editor)
    ReplaceOperand("where", "x", "where_constant", x).apply(editor)
    gm.recompile()
    y = torch.tensor([3.0, 4.0])
    assert torch.equal(gm(None, None, y), torch.where(seen, x, y))
