"""A report as text: one table, then what stayed and why."""

from __future__ import annotations

import io
from collections import defaultdict
from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich import box
from rich.console import Console
from rich.table import Table

from srfx.report.units import count, shape_text, share, size_text

if TYPE_CHECKING:
    from srfx.report.build import LayerRow, Report

MAX_NODES = 8
"""How many nodes are named for one reason; the rest is counted (all of them are in the JSON)."""


def to_text(report: Report, width: int = 110) -> str:
    """The report as plain text of at most ``width`` columns."""
    return render([_table(report), *summary(report)], width)


def render(parts: Sequence[Table | str], width: int = 110) -> str:
    """Tables and lines as plain text."""
    console = Console(file=io.StringIO(), width=width, color_system=None, legacy_windows=False)
    for part in parts:
        if isinstance(part, str):
            console.print(part, soft_wrap=True, highlight=False, markup=False)
        else:
            console.print(part)
    file = console.file
    assert isinstance(file, io.StringIO)
    return "\n".join(line.rstrip() for line in file.getvalue().splitlines())


def _table(report: Report) -> Table:
    table = Table(box=box.SIMPLE_HEAD, show_footer=True, pad_edge=False)
    b, a = report.before, report.after
    table.add_column("layer", footer="total", overflow="fold")
    table.add_column("kind")
    table.add_column("shape", overflow="fold")
    table.add_column("kept", overflow="fold")
    table.add_column("params", justify="right", footer=count(b.params))
    table.add_column("kept", justify="right", footer=count(a.params))
    table.add_column("left", justify="right", footer=share(a.params, b.params))
    for row in report.layers:
        if not (row.tensor or row.params_after):
            continue  # an op without tensors: its FLOPs are in the total
        table.add_row(*_cells(row))
    return table


def _cells(row: LayerRow) -> tuple[str, ...]:
    gone = row.shape_after is None and bool(row.tensor)
    return (
        row.name or "(model)",
        row.kind,
        shape_text(row.shape_before),
        "gone" if gone else shape_text(row.shape_after or ()),
        count(row.params_before) if row.tensor else "",
        count(row.params_after) if row.tensor else "",
        share(row.params_after, row.params_before) if row.params_before else "",
    )


def summary(report: Report) -> list[str]:
    """Totals, refusals, unknown ops and revived channels, one line each."""
    b, a = report.before, report.after
    lines = [
        f"parameters  {count(b.params)} -> {count(a.params)} ({share(a.params, b.params)})",
        f"bytes       {size_text(b.bytes)} -> {size_text(a.bytes)} ({share(a.bytes, b.bytes)})",
        f"FLOPs       {count(b.flops)} -> {count(a.flops)} ({share(a.flops, b.flops)}) at {_inputs(report)}",
        f"graph       {b.nodes} -> {a.nodes} nodes",
    ]
    if report.timing:
        lines.append(f"time        {_timing(report.timing)}")
    if report.unread:
        lines.append(f"unread      {len(report.unread)} tensors that no node reads: {_some(report.unread)}")
    if report.created:
        lines.append(f"created     {len(report.created)} tensors: {_some(report.created)}")
    for name, n in report.unknown_ops.items():
        lines.append(
            f"unknown op  {name}: {n} call{'s' if n != 1 else ''}, every channel that touches it stays"
        )
    for reason, n in report.revived.items():
        lines.append(f"revived     {n} channels: {_reason_text(report, reason)}")
    by_reason = defaultdict(list)
    for refusal in report.refusals:
        by_reason[refusal.message].append(refusal)
    for message, found in by_reason.items():
        n = sum(r.n_channels for r in found)
        held = f", {n} channels" if n else ""
        sites = [f"{r.node} ({r.detail})" if r.detail else r.node for r in found]
        lines.append(f"refused     {message}{held}: {_some(sites)}")
    return lines


def _reason_text(report: Report, reason: str) -> str:
    from srfx.ir.plan import Reason

    return Reason[reason].value.removeprefix("revived: ")


def _some(names: tuple[str, ...] | list[str]) -> str:
    rest = len(names) - MAX_NODES
    return ", ".join(names[:MAX_NODES]) + (f" and {rest} more" if rest > 0 else "")


def _timing(found: dict[str, float]) -> str:
    text = f"ragged was predicted to save {found['predicted_saving_ms']:.3g} ms of a run"
    if "ragged_ms" in found:
        kept = "ragged" if found["is_ragged"] else "aligned"
        text += f"; measured: aligned {found['aligned_ms']:.3g} ms, ragged {found['ragged_ms']:.3g} ms; kept: {kept}"
    return text


def _inputs(report: Report) -> str:
    shapes = [shape_text(i.shape) for i in report.inputs if hasattr(i, "shape")]
    return ", ".join(shapes) or "no tensor inputs"
