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
from torch import nn

from srfx.errors import PlanError
from srfx.record.attach import record_of
from srfx.record.keep_plan import KeepPlan, RefusalNote, TensorPlan
from srfx.record.record import Record
from srfx.report.html import to_html
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

    def to_html(self) -> str:
        """A page of its own."""
        return f"<!DOCTYPE html><html><head><meta charset=utf-8><title>srfx</title></head><body>{to_html(self)}</body></html>"

    def to_dict(self) -> dict[str, Any]:
        """All of it as plain data."""
        data = asdict(self)
        data["inputs"] = [str(i) for i in self.inputs]
        return data

    def to_json(self) -> str:
        """All of it as JSON."""
        return json.dumps(self.to_dict(), sort_keys=True)


def report(small: nn.Module) -> Report:
    """What became of each layer, and why not more.

    Args:
        small: a result of `srfx.minimize`, also after deepcopy, pickle or training.

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
    return Report(
        Totals(
            *_sizes((t, t.shape) for t in mine if t.status != "created"),
            *_work(record.flops_before, record.n_nodes_before),
        ),
        Totals(
            *_sizes((t, t.kept_shape) for t in mine if t.kept_shape is not None),
            *_work(record.flops_after, record.n_nodes_after),
        ),
        tuple(_layers(record)),
        record.plan.refusals,
        record.unknown_ops,
        record.revived,
        tuple(t.name for t in tensors if t.status == "created"),
        tuple(t.name for t in tensors if t.status == "unread"),
        tuple(record.inputs),
        record.timing,
    )


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
            )
        )
    return rows


def _parent(name: str) -> str:
    return name.rpartition(".")[0]
