"""The main entry: `minimize`, the pipeline in reading order."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import fx, nn
from torch.export import ExportedProgram

from srfx.ir.capture import capture
from srfx.ir.shapes import hint_inputs
from srfx.passes import Pass, PassResult, get_pass
from srfx.passes.compact_channels import CompactChannels

CANONICALISE = ("bake-masks", "functionalize", "fold-parameter-math", "drop-noops")
"""Passes that bring a captured graph into the form the analyses read, in this order."""


def minimize(
    model: nn.Module | ExportedProgram,
    example_inputs: Any = None,
    *,
    example_kwargs: Mapping[str, Any] | None = None,
    multiple_of: int = 1,
) -> fx.GraphModule:
    """Rewrite a masked network into a smaller dense one that computes the same."""
    captured = capture(model, example_inputs, example_kwargs)
    gm = captured.graph_module
    results: list[PassResult] = []
    for name in CANONICALISE:
        results.append(get_pass(name)(gm))
    hints = captured.inputs if captured.inputs is not None else hint_inputs(gm)
    compact: Pass = CompactChannels(hints, multiple_of)
    results.append(compact(gm))
    return gm
