"""Numbers of a minimized model, gathered from the record that minimize left with it."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export import ExportedProgram

from srfx.errors import PlanError
from srfx.record.attach import record_of
from srfx.record.keep_plan import KeepPlan, RefusalNote, TensorPlan
from srfx.record.record import Record
from srfx.report.drawing import Runs
from srfx.report.figure import figure
from srfx.report.html import to_html
from srfx.report.latency import latency_ms
from srfx.report.page import page
from srfx.report.reasons import explained
from srfx.report.text import to_text


@dataclass(frozen=True)
class LayerRow:
    """One module, or one group of tensors with a common path, before and after.

    Attributes:
        name: its path in the model, ``""`` for the model itself.
        kind: class of the module or name of the op.
        tensor: name of its largest tensor, whose shapes stand here.
        shape_before: shape of that tensor.
        shape_after: what it is now; None when it is gone.
        params_before: elements of all parameters of the layer.
        params_after: the same now.
        flops_before: floating-point operations of the layer at the shapes of the record.
        flops_after: the same now.
        kept: for the first axes of that tensor (outputs, inputs) the positions that stay, as (first, how many).
    """

    name: str
    kind: str
    tensor: str
    shape_before: tuple[int, ...]
    shape_after: tuple[int, ...] | None
    params_before: int
    params_after: int
    flops_before: int
    flops_after: int
    kept: tuple[Runs, ...] = ()


@dataclass(frozen=True)
class Totals:
    """Sums over the model: elements of parameters, bytes with buffers, FLOPs, nodes of the graph."""

    params: int
    bytes: int
    flops: int
    nodes: int


@dataclass(frozen=True)
class Report:
    """What minimize did.  ``str()`` and notebooks show it as a table, ``to_json`` as data.

    Attributes:
        before: totals of the original (as captured: masks are no parameters, what no node reads is none
            either).
        after: totals of the result.
        layers: in order of execution.
        refusals: every site that was not taken, with its reason and the channels it holds.
        unknown_ops: ops without a rule, with the number of their calls.
        revived: dead channels that stayed, by reason.
        created: tensors that the original does not have.
        unread: parameters and buffers of the source that no node reads.
        inputs: shapes at which FLOPs were counted.
        timing: with ``ragged="auto"``, milliseconds of a run at these shapes: ``predicted_saving_ms`` by the
            cost model; ``aligned_ms`` and ``ragged_ms`` as measured in turn.  Empty where no channel was worth
            an index.
        latency_ms: measured median of a run, before and after; only with ``report(small, before)``.
        explained: why channels of a layer stayed, by layer; only with ``report(small, explain=True)``.
        edges_before: the graph: for each node those it reads.
        edges_after: the graph of the result.
        ops: what each node does.
    """

    before: Totals
    after: Totals
    layers: tuple[LayerRow, ...]
    refusals: tuple[RefusalNote, ...]
    unknown_ops: dict[str, int]
    revived: dict[str, int]
    created: tuple[str, ...]
    unread: tuple[str, ...]
    inputs: tuple[Any, ...]
    timing: dict[str, float] = field(default_factory=dict)
    latency_ms: tuple[float, float] | None = None
    explained: dict[str, str] = field(default_factory=dict)
    edges_before: dict[str, list[str]] = field(default_factory=dict)
    edges_after: dict[str, list[str]] = field(default_factory=dict)
    ops: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        return to_text(self)

    def _repr_html_(self) -> str:
        return to_html(self)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write it to a file, as HTML, or as JSON or text when the name ends in ``.json`` or ``.txt``.

        Raises:
            OSError: the file cannot be written.
        """
        form = {".json": self.to_json, ".txt": self.__str__}.get(Path(path).suffix, self.to_html)
        with open(path, "w", encoding="utf-8") as file:
            file.write(form())

    def to_html(self, title: str = "srfx report") -> str:
        """A page of its own: totals, kept channels of each layer, reasons, and both graphs."""
        return page(self, title)

    def figure(self) -> Any:
        """Parameters of each layer before and after, as a ``matplotlib.figure.Figure`` (extra ``report``).

        Raises:
            ImportError: matplotlib is not installed.
        """
        return figure(self)

    def to_dict(self) -> dict[str, Any]:
        """All of it as plain data."""
        data = asdict(self)
        data["inputs"] = [str(i) for i in self.inputs]
        return data

    def to_json(self) -> str:
        """All of it as JSON."""
        return json.dumps(self.to_dict(), sort_keys=True)


def report(
    small: nn.Module, before: nn.Module | ExportedProgram | None = None, *, explain: bool = False
) -> Report:
    """What became of each layer, and why not more.

    Args:
        small: a result of `srfx.minimize`, also after deepcopy, pickle or training.
        before: the original; when it is given, both run and their latency is measured.
        explain: find out for each layer why its channels stayed (see `srfx.explain`); takes an analysis.

    Raises:
        PlanError: the model was not made by `srfx.minimize`, or another tool rebuilt it and dropped the
            record.

    Example:
        >>> import srfx
        >>> net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)).eval()
        >>> with torch.no_grad():
        ...     _ = net[0].weight[2:].zero_()
        >>> found = report(srfx.minimize(net, torch.randn(1, 4)))
        >>> found.before.params, found.after.params
        (58, 16)
    """
    record = _record(small)
    tensors = record.plan.tensors
    mine = [t for t in tensors if t.status != "unread"]
    rows = _layers(record)
    return Report(
        Totals(
            *_sizes((t, t.shape) for t in mine if t.status != "created"),
            *_work(record.flops_before, record.n_nodes_before),
        ),
        Totals(
            *_sizes((t, t.kept_shape) for t in mine if t.kept_shape is not None),
            *_work(record.flops_after, record.n_nodes_after),
        ),
        tuple(rows),
        record.plan.refusals,
        record.unknown_ops,
        record.revived,
        tuple(t.name for t in tensors if t.status == "created"),
        tuple(t.name for t in tensors if t.status == "unread"),
        tuple(record.inputs),
        record.timing,
        None if before is None else _measured(before, small, record),
        explained(small, _weights(rows)) if explain else {},
        record.edges_before,
        record.edges_after,
        record.ops,
    )


def _measured(before: nn.Module | ExportedProgram, small: nn.Module, record: Record) -> tuple[float, float]:
    assert isinstance(small, fx.GraphModule)  # it has a record
    return latency_ms(before, small, record)


def _weights(rows: list[LayerRow]) -> dict[str, str]:
    """The tensor of each layer that stands for it and is still there."""
    return {
        r.name: f"{r.name}.{r.tensor}" if r.name else r.tensor for r in rows if r.tensor and r.shape_after
    }


def plan(small: nn.Module) -> KeepPlan:
    """What was kept of each axis of each tensor, as data that goes to JSON and back.

    Raises:
        PlanError: see `report`.

    Example:
        >>> import srfx
        >>> net = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2)).eval()
        >>> with torch.no_grad():
        ...     _ = net[0].weight[1].zero_()
        >>> plan(srfx.minimize(net, torch.randn(1, 4))).kept("0.weight", 0).tolist()
        [0, 2]
    """
    return _record(small).plan


def _record(small: nn.Module) -> Record:
    found = record_of(small)
    if found is None:
        raise PlanError(f"this {type(small).__name__} carries no record: give a result of srfx.minimize")
    return found


def _sizes(tensors: Iterable[tuple[TensorPlan, tuple[int, ...]]]) -> tuple[int, int]:
    n_params = n_bytes = 0
    for tensor, shape in tensors:
        n_bytes += math.prod(shape) * getattr(torch, tensor.dtype).itemsize
        n_params += math.prod(shape) if tensor.role == "parameter" else 0
    return n_params, n_bytes


def _work(flops: dict[str, int], n_nodes: int) -> tuple[int, int]:
    return sum(flops.values()), n_nodes


def _layers(record: Record) -> list[LayerRow]:
    groups: dict[str, list[TensorPlan]] = {name: [] for name in record.layers}
    for tensor in record.plan.tensors:
        if tensor.status != "unread":
            groups.setdefault(_parent(tensor.name), []).append(tensor)
    for name in (*record.flops_before, *record.flops_after):
        groups.setdefault(name, [])
    rows = []
    for name, tensors in groups.items():
        old = [t for t in tensors if t.status != "created"]
        lead = max(old, key=lambda t: (len(t.shape), math.prod(t.shape)), default=None)
        before, after = record.flops_before.get(name, 0), record.flops_after.get(name, 0)
        if lead is None and not (tensors or before or after):
            continue
        rows.append(
            LayerRow(
                name,
                record.layers.get(name, ""),
                lead.name.rpartition(".")[2] if lead is not None else "",
                lead.shape if lead is not None else (),
                lead.kept_shape if lead is not None else (),
                _sizes((t, t.shape) for t in old)[0],
                _sizes((t, t.kept_shape) for t in tensors if t.kept_shape is not None)[0],
                before,
                after,
                () if lead is None else _kept(record.plan, lead),
            )
        )
    return rows


def _kept(plan: KeepPlan, tensor: TensorPlan) -> tuple[Runs, ...]:
    """Outputs and inputs of a weight; only the first axis of anything else."""
    if tensor.kept_shape is None:
        return ((),)
    axes = min(2, len(tensor.shape))
    return tuple(_runs(plan.kept(tensor.name, axis)) for axis in range(axes))


def _runs(positions: Tensor) -> Runs:
    """Positions that follow one another, together; where rows differ, all that some row keeps."""
    found = positions.flatten().unique()
    if not found.numel():
        return ()
    begins = torch.cat([torch.zeros(1, dtype=torch.long), (found.diff() != 1).nonzero().flatten() + 1])
    lengths = torch.cat([begins.diff(), torch.tensor([found.numel() - int(begins[-1])])])
    return tuple(zip(found[begins].tolist(), lengths.tolist(), strict=True))


def _parent(name: str) -> str:
    return name.rpartition(".")[0]
