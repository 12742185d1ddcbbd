"""docs/ops.md says what the registry says."""

from __future__ import annotations

import torch
from torch import nn

from benchmarks.op_table import PAGE, render, spelling, table


def test_the_page_is_current() -> None:
    assert PAGE.read_text() == render(), "python -m benchmarks.op_table writes it"


def test_spellings() -> None:
    assert spelling(nn.Conv2d) == ("modules", "nn.Conv2d")
    assert spelling(nn.functional.conv2d) == ("functions", "F.conv2d")
    assert spelling(torch.flip) == ("functions", "torch.flip")
    assert spelling("view") == ("methods", ".view")
    assert spelling(torch.ops.aten.add.Tensor) == ("ATen", "aten.add.Tensor")
    assert "nn.Linear" in table()["linear", "Linear"]["modules"]
