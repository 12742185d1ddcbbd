"""The record of one run of minimize: plain data, no tensors, no nodes."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch

from srfx.record.keep_plan import KeepPlan


@dataclass(frozen=True)
class TensorSpec:
    """Shape, dtype and device of an input."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    device: str = "cpu"


@dataclass
class Record:
    """What the report and the verifier read.

    Attributes:
        plan: what was kept.
        inputs: one value per placeholder, tensors replaced by `TensorSpec` (containers kept).
        layers: path of a module (or of the tensors an op reads) -> class or op, in order of execution.
        flops_before: FLOPs of each layer at ``inputs``; those of ops without tensors stand under their node's
            name.
        flops_after: the same for the result.
        unknown_ops: ops without a rule, by name, with the number of their calls.
        revived: dead channels that stayed, by name of a `srfx.ir.plan.Reason`.
        n_nodes_before: nodes of the captured graph.
        n_nodes_after: nodes of the result.
        edges_before: for each node of the captured graph (not of stored tensors) the nodes it reads.
        edges_after: the same for the result.
        ops: what each of these nodes does.
        timing: what ``ragged="auto"`` has weighed, see `srfx.report.Report`; empty otherwise.
    """

    plan: KeepPlan
    inputs: list[Any] = field(default_factory=list)
    layers: dict[str, str] = field(default_factory=dict)
    flops_before: dict[str, int] = field(default_factory=dict)
    flops_after: dict[str, int] = field(default_factory=dict)
    unknown_ops: dict[str, int] = field(default_factory=dict)
    revived: dict[str, int] = field(default_factory=dict)
    n_nodes_before: int = 0
    n_nodes_after: int = 0
    timing: dict[str, float] = field(default_factory=dict)
    edges_before: dict[str, list[str]] = field(default_factory=dict)
    edges_after: dict[str, list[str]] = field(default_factory=dict)
    ops: dict[str, str] = field(default_factory=dict)
