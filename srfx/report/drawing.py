"""Two graphs side by side, and which channels of a layer stayed, as SVG."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape

ROW, COLUMN, BOX = 26, 150, 140
MAX_ROWS = 400
"""Rows of a graph that are drawn; below them stands how many more there are."""

Runs = tuple[tuple[int, int], ...]
"""Positions as (first, how many)."""


def strip(size: int, kept: Runs, width: int = 240, height: int = 12) -> str:
    """A bar of all channels in which the kept ones are filled.

    Example:
        >>> strip(4, ((1, 2),)).count("<rect")
        2
    """
    scale = width / max(size, 1)
    parts = [f'<rect class="all" width="{width}" height="{height}"/>']
    parts += [
        f'<rect class="kept" x="{first * scale:.2f}" width="{max(n * scale, 0.4):.2f}" height="{height}"/>'
        for first, n in kept
    ]
    n_kept = sum(n for _, n in kept)
    title = f"<title>{n_kept} of {size} channels stay</title>"
    return f'<svg class="strip" viewBox="0 0 {width} {height}" preserveAspectRatio="none">{title}{"".join(parts)}</svg>'


def graph(edges: Mapping[str, Sequence[str]], marked: set[str], mark: str, ops: Mapping[str, str]) -> str:
    """A graph from top to bottom, each node below all that it reads.

    Args:
        edges: for each node, in order, the nodes it reads.
        marked: nodes to colour.
        mark: their class in the style sheet.
        ops: what each node does.
    """
    place: dict[str, tuple[int, int]] = {}
    used: dict[int, int] = {}
    for name, sources in edges.items():
        row = 1 + max((place[s][0] for s in sources if s in place), default=-1)
        column = used.get(row, 0)
        used[row] = column + 1
        place[name] = (row, column)
    shown = {name: at for name, at in place.items() if at[0] < MAX_ROWS}
    lines = [
        _line(shown[source], at) for name, at in shown.items() for source in edges[name] if source in shown
    ]
    boxes = [_box(name, ops.get(name, ""), at, mark if name in marked else "") for name, at in shown.items()]
    rows = 1 + max((row for row, _ in shown.values()), default=0)
    columns = max((n for row, n in used.items() if row < MAX_ROWS), default=1)
    width, height = columns * COLUMN + 10, rows * ROW + 10
    more = len(place) - len(shown)
    note = f"<p>and {more} more nodes</p>" if more else ""
    return (
        f'<svg class="graph" width="{width}" height="{height}" viewBox="0 0 {width} {height}">'
        f"{''.join(lines)}{''.join(boxes)}</svg>{note}"
    )


def _line(a: tuple[int, int], b: tuple[int, int]) -> str:
    x1, y1 = a[1] * COLUMN + BOX / 2, a[0] * ROW + 18
    x2, y2 = b[1] * COLUMN + BOX / 2, b[0] * ROW + 2
    bend = 0 if b[0] - a[0] == 1 else min(12 * (b[0] - a[0]), 70)
    return f'<path d="M{x1} {y1} C{x1 + bend} {y1 + 10} {x2 + bend} {y2 - 10} {x2} {y2}"/>'


def _box(name: str, op: str, at: tuple[int, int], mark: str) -> str:
    x, y = at[1] * COLUMN, at[0] * ROW + 2
    text = name if len(name) <= 20 else f"{name[:9]}…{name[-10:]}"
    return (
        f'<g class="node {mark}"><title>{escape(f"{name}: {op}" if op else name)}</title>'
        f'<rect x="{x}" y="{y}" width="{BOX}" height="16" rx="4"/>'
        f'<text x="{x + BOX / 2}" y="{y + 12}">{escape(text)}</text></g>'
    )
