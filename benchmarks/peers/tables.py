"""docs/comparison.md and its plot, from the numbers in benchmarks/results/peers.json."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks.peers.cases import CASES, MASKS
from benchmarks.peers.tools import TOOLS

PAGE = Path(__file__).parents[2] / "docs" / "comparison.md"
PLOT = PAGE.parent / "comparison.svg"
MEANING = {
    "rows": "40 % of each layer's rows zero with their biases left, 20 % of its columns zero, half of the rest zero at random",
    "classes": "that, and a quarter of all sets of channels that can only leave together zero wherever they are stored",
    "clean": "the easy case: 40 % of those sets zero wherever they are stored, biases and norms too; nothing else",
}
INTRODUCTION = """\
# Other tools

Written by `python -m benchmarks.peers` ({versions}).

The same masked models are handed to every tool, each run in a process of its own. The tools are asked to take the zeros
that are there and to choose nothing; most of them are made to choose as well, and this page says nothing of that. *Left*
is the share of the parameters that stays. A result counts only when it is right: the outputs of masked model and result
agree to 1e-9 in float64 (1e-4 for the tools that only know float32).
"""


def write(known: dict[str, Any]) -> None:
    """Write the page and the plot again."""
    runs = known["runs"]
    tools = [t for t in TOOLS if any(key.endswith(f"/ {t}") for key in runs)]
    parts = [INTRODUCTION.format(versions=", ".join(f"{k} {v}" for k, v in known["versions"].items()))]
    parts.append("![Share of the parameters left, exact results only](comparison.svg)\n")
    parts.append("## How often each was right\n\n" + _outcomes(runs, tools))
    for mask in MASKS:
        parts.append(f"## Share left, `{mask}`\n\n{MEANING[mask]}.\n\n{_shares(runs, tools, mask)}")
    parts.append("## Speed of the result\n\n" + _speeds(runs, tools))
    parts.append("## Time and memory of the rewrite\n\n" + _costs(runs, tools))
    PAGE.write_text("\n".join(parts))
    _plot(runs, tools)


def _row(cells: list[str]) -> str:
    return "| " + " | ".join(cells) + " |\n"


def _head(cells: list[str]) -> str:
    return _row(cells) + _row(["---", *["---:"] * (len(cells) - 1)])


def _get(runs: dict[str, Any], model: str, mask: str, tool: str) -> dict[str, Any]:
    found: dict[str, Any] = runs.get(f"{model} / {mask} / {tool}", {})
    return found


def _outcomes(runs: dict[str, Any], tools: list[str]) -> str:
    text = _head(
        ["tool", "runs", "exact and smaller", "exact, nothing done", "wrong numbers", "wrong shape", "crash"]
    )
    for tool in tools:
        rows = [row for key, row in runs.items() if key.endswith(f"/ {tool}")]
        exact = [row for row in rows if row["outcome"] == "exact"]
        smaller = sum(row["left"] < 0.999 for row in exact)
        others = [sum(row["outcome"] == what for row in rows) for what in ("wrong", "shape", "crash")]
        text += _row([tool, str(len(rows)), str(smaller), str(len(exact) - smaller), *map(str, others)])
    return text


def _shares(runs: dict[str, Any], tools: list[str], mask: str) -> str:
    models = [m for m in CASES if any(_get(runs, m, mask, t) for t in tools)]
    text = _head(["model", *tools])
    for model in models:
        rows = [_get(runs, model, mask, tool) for tool in tools]
        least = min((r["left"] for r in rows if r.get("outcome") == "exact"), default=0.0)
        text += _row([model, *(_share(row, least) for row in rows)])
    return text


def _share(row: dict[str, Any], least: float) -> str:
    if row.get("outcome") != "exact":
        return row.get("outcome", "")
    text = f"{row['left']:.1%}"
    return f"**{text}**" if row["left"] <= least * 1.001 else text


def _speeds(runs: dict[str, Any], tools: list[str]) -> str:
    text = "How many times faster than the masked model, batch 2, one thread; exact results only.\n\n"
    text += _head(["model, mask", *tools])
    for model in CASES:
        for mask in MASKS:
            rows = [_get(runs, model, mask, tool) for tool in tools]
            if not any("latency_ms" in row for row in rows):
                continue
            text += _row([f"{model}, {mask}", *(_gain(row) for row in rows)])
    return text


def _gain(row: dict[str, Any]) -> str:
    return f"{row['masked_ms'] / row['latency_ms']:.2f}" if "latency_ms" in row else ""


def _costs(runs: dict[str, Any], tools: list[str]) -> str:
    text = "Seconds (tracing included) and MB of memory beyond the model's own, mask `rows`.\n\n"
    text += _head(["model", *tools])
    for model in CASES:
        rows = [_get(runs, model, "rows", tool) for tool in tools]
        if any("seconds" in row for row in rows):
            text += _row(
                [
                    model,
                    *(f"{r['seconds']:.1f} s, {r['peak_mb']:.0f}" if "seconds" in r else "" for r in rows),
                ]
            )
    return text


def _plot(runs: dict[str, Any], tools: list[str]) -> None:
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    models = [m for m in CASES if any(_get(runs, m, "classes", t) for t in tools)]
    figure, axes = pyplot.subplots(figsize=(9, 3.5), layout="constrained")
    width = 0.8 / max(1, len(tools))
    for i, tool in enumerate(tools):
        rows = [_get(runs, model, "classes", tool) for model in models]
        heights = [100 * row["left"] if row.get("outcome") == "exact" else 0.0 for row in rows]
        places = [x + i * width for x in range(len(models))]
        axes.bar(places, heights, width, label=tool)
    axes.set_xticks([x + 0.4 - width / 2 for x in range(len(models))], models, rotation=20, ha="right")
    axes.set_ylabel("parameters left, %")
    axes.legend(fontsize="small", ncols=2)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(PLOT, metadata={"Date": None})
    pyplot.close(figure)
