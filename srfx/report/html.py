"""A report as a plain HTML table, for notebooks."""

from __future__ import annotations

from html import escape
from typing import TYPE_CHECKING

from srfx.report.text import summary
from srfx.report.units import count, shape_text, share

if TYPE_CHECKING:
    from srfx.report.build import Report

_HEAD = ("layer", "kind", "shape", "kept", "params", "kept", "left")


def to_html(report: Report) -> str:
    """One table and the lines below it; no scripts, no styles of its own."""
    rows = []
    for r in report.layers:
        if not (r.tensor or r.params_after):
            continue
        after = "gone" if r.shape_after is None and r.tensor else shape_text(r.shape_after or ())
        cells = (
            r.name or "(model)", r.kind, shape_text(r.shape_before), after,
            count(r.params_before), count(r.params_after), share(r.params_after, r.params_before),
        )  # fmt: skip
        rows.append("<tr>" + "".join(f"<td>{escape(c)}</td>" for c in cells) + "</tr>")
    head = "".join(f"<th>{h}</th>" for h in _HEAD)
    lines = "<br>".join(escape(line) for line in summary(report))
    return f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table><p>{lines}</p>"
