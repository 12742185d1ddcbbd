"""A report as one HTML file that needs nothing else: no scripts, no fonts, no network."""

from __future__ import annotations

from html import escape
from typing import TYPE_CHECKING

from srfx.report.drawing import graph, strip
from srfx.report.text import summary
from srfx.report.units import count, shape_text, share, size_text

if TYPE_CHECKING:
    from srfx.report.build import LayerRow, Report

_STYLE = """
:root { color-scheme: light dark; --ink: #1b2330; --paper: #fff; --line: #d8dee6; --soft: #f3f6f9; --kept: #2a6fdb;
  --gone: #c8442f; --new: #2c8a4b; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6ebf2; --paper: #14181f; --line: #39424f; --soft: #1d232c;
  --kept: #6ea3f5; --gone: #ef7b67; --new: #5fc381; } }
body { font: 15px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper); margin: 2rem auto;
  max-width: 1150px; padding: 0 1rem; }
h1 { font-size: 1.6rem; margin: 0 0 .3rem; } h2 { font-size: 1.15rem; margin: 2.2rem 0 .6rem; }
.cards { display: flex; flex-wrap: wrap; gap: .8rem; margin: 1.2rem 0; }
.card { flex: 1 1 160px; background: var(--soft); border-radius: 10px; padding: .8rem 1rem; }
.card b { display: block; font-size: 1.5rem; } .card span { opacity: .75; font-size: .9rem; }
.bar { height: 6px; background: var(--line); border-radius: 3px; margin-top: .5rem; }
.bar i { display: block; height: 6px; background: var(--kept); border-radius: 3px; }
table { border-collapse: collapse; width: 100%; font-size: .88rem; } th { text-align: left; }
th, td { padding: .28rem .6rem; border-bottom: 1px solid var(--line); vertical-align: middle; }
td.n, th.n { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
tr.gone td { opacity: .55; } .why { font: .8rem ui-monospace, monospace; white-space: pre-wrap; margin: .3rem 0; }
svg.strip { width: 210px; height: 11px; display: block; margin: 2px 0; }
.strip .all { fill: var(--line); } .strip .kept { fill: var(--kept); }
.graphs { display: grid; grid-template-columns: 1fr 1fr; gap: 1rem; }
.scroll { overflow: auto; max-height: 620px; border: 1px solid var(--line); border-radius: 10px; padding: .6rem; }
.graph path { fill: none; stroke: var(--line); stroke-width: 1.3; } .graph rect { fill: var(--soft); stroke: var(--line); }
.graph text { font: 11px system-ui, sans-serif; text-anchor: middle; fill: var(--ink); }
.graph .removed rect { stroke: var(--gone); } .graph .removed text { fill: var(--gone); }
.graph .added rect { stroke: var(--new); } .graph .added text { fill: var(--new); }
summary { cursor: pointer; } .removed-word { color: var(--gone); } .added-word { color: var(--new); }
"""


def page(report: Report, title: str = "srfx report") -> str:
    """The whole page."""
    return (
        f'<!DOCTYPE html><html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>'
        f'<meta name="viewport" content="width=device-width"><style>{_STYLE}</style></head><body>'
        f"<h1>{escape(title)}</h1><p>What minimization took out, and why the rest stayed.</p>"
        f"{_cards(report)}{_layers(report)}{_stayed(report)}{_graphs(report)}</body></html>"
    )


def _cards(report: Report) -> str:
    b, a = report.before, report.after
    cards = [
        ("parameters", count(b.params), count(a.params), _part(a.params, b.params)),
        ("bytes", size_text(b.bytes), size_text(a.bytes), _part(a.bytes, b.bytes)),
        ("FLOPs", count(b.flops), count(a.flops), _part(a.flops, b.flops)),
    ]
    if report.latency_ms is not None:
        before, after = report.latency_ms
        cards.append(
            ("measured latency", f"{before:.3g} ms", f"{after:.3g} ms", after / before if before else 1.0)
        )
    return f'<div class="cards">{"".join(_card(*card) for card in cards)}</div>'


def _part(part: int, whole: int) -> float:
    return part / whole if whole else 1.0


def _card(name: str, before: str, after: str, left: float) -> str:
    return (
        f'<div class="card"><span>{name}</span><b>{100 * left:.1f} %</b><span>{before} → {after}</span>'
        f'<div class="bar"><i style="width:{100 * min(left, 1):.1f}%"></i></div></div>'
    )


def _layers(report: Report) -> str:
    heads = ("layer", "kind", "shape", "kept", "channels that stay: out, in", "parameters", "left", "FLOPs")
    head = "".join(f"<th{' class=n' if i > 4 else ''}>{h}</th>" for i, h in enumerate(heads))
    rows = "".join(_row(report, r) for r in report.layers if r.tensor or r.params_after)
    return f"<h2>Layers</h2><table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table>"


def _row(report: Report, r: LayerRow) -> str:
    is_gone = r.shape_after is None and bool(r.tensor)
    after = "gone" if is_gone else shape_text(r.shape_after or ())
    strips = "".join(strip(r.shape_before[axis], kept) for axis, kept in enumerate(r.kept) if r.shape_before)
    why = report.explained.get(r.name)
    name = escape(r.name or "(model)")
    if why:
        name = f'<details><summary>{name}</summary><div class="why">{escape(why)}</div></details>'
    cells = [f"<td>{c}</td>" for c in (name, escape(r.kind), shape_text(r.shape_before), after, strips)]
    numbers = (
        f"{count(r.params_before)} → {count(r.params_after)}",
        share(r.params_after, r.params_before),
        f"{count(r.flops_before)} → {count(r.flops_after)}" if r.flops_before or r.flops_after else "",
    )
    cells += [f'<td class="n">{n}</td>' for n in numbers]
    return f"<tr{' class=gone' if is_gone else ''}>{''.join(cells)}</tr>"


def _stayed(report: Report) -> str:
    lines = summary(report)[4:]  # sizes stand above
    items = "".join(f"<li>{escape(' '.join(line.split()))}</li>" for line in lines)
    items = items or "<li>No site was refused, and no dead channel was kept.</li>"
    return f"<h2>What stayed, and why</h2><ul>{items}</ul>"


def _graphs(report: Report) -> str:
    if not report.edges_before:
        return ""
    old, new = set(report.edges_before), set(report.edges_after)
    before = graph(report.edges_before, old - new, "removed", report.ops)
    after = graph(report.edges_after, new - old, "added", report.ops)
    return (
        '<h2>Graph</h2><p>Nodes in <span class="removed-word">red</span> are gone, nodes in '
        '<span class="added-word">green</span> are new; point at one to see what it does.</p>'
        f'<div class="graphs"><div><b>before</b><div class="scroll">{before}</div></div>'
        f'<div><b>after</b><div class="scroll">{after}</div></div></div>'
    )
