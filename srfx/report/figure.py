"""A report as a figure for a paper: parameters of each layer before and after."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from srfx.report.build import Report


def figure(report: Report, max_layers: int = 60) -> Any:
    """Horizontal bars, one for each layer with parameters, the largest ``max_layers`` of them.

    Returns:
        A ``matplotlib.figure.Figure``; ``.savefig("sizes.pdf")`` writes it.

    Raises:
        ImportError: matplotlib is not installed (``pip install srfx[report]``).
    """
    from matplotlib.figure import Figure

    rows = [r for r in report.layers if r.params_before or r.params_after]
    largest = {id(r) for r in sorted(rows, key=lambda r: -r.params_before)[:max_layers]}
    rows = [r for r in rows if id(r) in largest]
    made = Figure(figsize=(7, 1 + 0.22 * len(rows)), layout="constrained")
    axes = made.subplots()
    places = range(len(rows))
    axes.barh(places, [r.params_before for r in rows], color="#d3dbe6", label="before")
    axes.barh(places, [r.params_after for r in rows], color="#2a6fdb", label="after", height=0.55)
    axes.set_yticks(places, [r.name or "(model)" for r in rows], fontsize=7)
    axes.invert_yaxis()
    axes.set_xlabel("parameters")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    return made
