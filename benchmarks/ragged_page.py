"""Put the numbers of benchmarks/results/ragged_bound.json and ragged_speed.json into the tables of docs/ragged.md.

    python -m benchmarks.ragged_page

A table stands between two comments that name it; a file that is not there leaves its table as it is.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
PAGE = Path(__file__).parents[1] / "docs" / "ragged.md"


def bound_table(rows: list[dict[str, Any]]) -> str:
    """Shares of the parameters, one line for each model."""
    lines = [
        "| model | parameters | aligned | ragged | with indices | bound | over it |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in rows:
        counts = [row["aligned"], row["ragged"], row["ragged"] + row["indices"], row["bound"]]
        shares = " | ".join(f"{n / row['before']:.1%}".replace("%", " %") for n in counts)
        over = f"{row['over_bound']:+.1%}".replace("%", " %")
        lines.append(f"| {row['model']} | {row['before'] / 1e6:.2f} M | {shares} | {over} |")
    return "\n".join(lines)


def speed_table(rows: list[dict[str, Any]]) -> str:
    """Times relative to aligned, one line for each model: eager and compiled, batch 1 and 8; = is aligned itself."""
    kinds = [(is_compiled, batch) for is_compiled in (False, True) for batch in (1, 8)]
    heads = [f"{'compiled' if c else 'eager'}, batch {b}" for c, b in kinds]
    lines = [f"| model | result | {' | '.join(heads)} |", f"| --- | --- |{' --- |' * len(kinds)}"]
    found = {(r["model"], r["compiled"], r["batch"]): r for r in rows}
    for model in dict.fromkeys(r["model"] for r in rows):
        for way in ("ragged", "auto"):
            cells = " | ".join(_cell(found.get((model, *kind)), way) for kind in kinds)
            lines.append(f"| {model} | {way} | {cells} |")
    return "\n".join(lines)


def _cell(row: dict[str, Any] | None, way: str) -> str:
    if row is None or way not in row["ratio"]:
        return ""
    return "=" if way in row["twins"] else f"{row['ratio'][way]:.2f}"


def replaced(text: str, name: str, table: str) -> str:
    """The page with another table of this name."""
    begin, end = f"<!-- {name} -->\n", f"\n<!-- end of {name} -->"
    before, found, rest = text.partition(begin)
    _, is_closed, after = rest.partition(end)
    if not found or not is_closed:
        raise ValueError(f"{PAGE.name} has no place for the table {name!r}: {begin!r} .. {end!r}")
    return before + begin + table + end + after


def main() -> None:
    """Rewrite the page."""
    text = PAGE.read_text()
    for name, make in (("ragged_bound", bound_table), ("ragged_speed", speed_table)):
        path = RESULTS / f"{name}.json"
        if path.exists():
            text = replaced(text, name, make(json.loads(path.read_text())["rows"]))
    PAGE.write_text(text)


if __name__ == "__main__":
    main()
