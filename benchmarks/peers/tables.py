"""docs/comparison.md, its plot, and the tables of README.md, from the numbers in benchmarks/results/peers.json."""

from __future__ import annotations

from pathlib import Path
from statistics import geometric_mean
from typing import Any

from benchmarks.peers.cases import CASES, MASKS
from benchmarks.peers.tools import FOLDED, FOLDS, SINGLE, TOOLS

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "comparison.md"
PLOT = PAGE.parent / "comparison.svg"
README = ROOT / "README.md"
MARKS = ("<!-- comparison: written by python -m benchmarks.peers -->\n", "<!-- comparison ends -->\n")
CHOSEN = ("resnet18", "resnet50", "mobilenet_v2", "convnext_tiny", "vit_b_16", "bert")
"""Models that README shows."""
ENGINE = "OpenVINO"
"""A tool whose results run in an engine of their own: compared with the result of srfx in that engine."""
WITHIN = 1.03
"""How much slower than a dense network of the same widths we may be."""
MEANING = {
    "rows": "40 % of each layer's rows zero with their biases left, 20 % of its columns zero, half of the rest zero at random",
    "classes": "that, and a quarter of all sets of channels that can only leave together zero wherever they are stored",
    "clean": "the easy case: 40 % of those sets zero wherever they are stored, biases and norms too; nothing else",
}
INTRODUCTION = """\
# Other tools

Written by `python -m benchmarks.peers` ({versions}).

The same masked models are handed to every tool, each in a process of its own. The tools are asked to take the zeros that
are there and to choose nothing; most of them are made to choose as well, and this page says nothing of that. *Left* is
the share of the parameters that stays. A result counts only when it is right: the outputs of masked model and result agree
to 1e-9 in float64 ({single}: to 1e-4, for they only know float32). torch.ao.pruning is asked for those layers only that it
does not refuse, and two lines of NNI's tracer are mended, without which it does not start under a torch of today.
torch-simplify folds batch norms into convolutions as well, so it stands against *{folded}*: the result of `srfx.minimize`
through `torch.fx.experimental.optimization.fuse`, which drops their parameters where the weights are to stay as they are.
"""


def write(known: dict[str, Any]) -> None:
    """Write the page, the plot and the tables of README again."""
    runs, races = known["runs"], known["races"]
    tools = [t for t in TOOLS if any(key.endswith(f"/ {t}") for key in runs)]
    versions = ", ".join(f"{k} {v}" for k, v in known["versions"].items())
    parts = [INTRODUCTION.format(versions=versions, single=", ".join(SINGLE), folded=FOLDED)]
    parts.append("![Share of the parameters left, exact results only](comparison.svg)\n")
    parts.append("## In short\n\n" + _verdict(runs, races))
    parts.append("## How often each was right\n\n" + _outcomes(runs, tools))
    for mask in MASKS:
        parts.append(f"## Share left, `{mask}`\n\n{MEANING[mask]}.\n\n{_shares(runs, tools, mask, CASES)}")
    parts.append("## Speed of the result\n\n" + _speeds(races, tools))
    parts.append("## Time and memory of the rewrite\n\n" + _costs(runs, tools))
    parts.append("## How they crash\n\n" + _crashes(runs))
    PAGE.write_text("\n".join(parts))
    _plot(runs, tools)
    _readme(runs, races, tools)


def _readme(runs: dict[str, Any], races: dict[str, Any], tools: list[str]) -> None:
    text = README.read_text()
    begin, end = (text.index(mark) for mark in MARKS)
    shown = [t for t in tools if any(_get(runs, m, "classes", t) for m in CHOSEN)]
    tables = (
        _shares(runs, shown, "classes", CHOSEN) + "\n" + _outcomes(runs, tools) + "\n" + _verdict(runs, races)
    )
    README.write_text(text[: begin + len(MARKS[0])] + "\n" + tables + "\n" + text[end:])


def _row(cells: list[str]) -> str:
    return "| " + " | ".join(cells) + " |\n"


def _head(cells: list[str]) -> str:
    return _row(cells) + _row(["---", *["---:"] * (len(cells) - 1)])


def _get(runs: dict[str, Any], model: str, mask: str, tool: str) -> dict[str, Any]:
    found: dict[str, Any] = runs.get(f"{model} / {mask} / {tool}", {})
    return found


def _verdict(runs: dict[str, Any], races: dict[str, Any]) -> str:
    """Where our row is not what it should be, by name; counted from the numbers, never written by hand."""
    cases = [(m, k) for m in CASES for k in MASKS if _get(runs, m, k, "srfx")]
    wrong = [
        c
        for c in cases
        if any(_get(runs, *c, t).get("outcome", "exact") != "exact" for t in ("srfx", FOLDED))
    ]
    larger = [c for c in cases if c not in wrong and any(_is_beaten(runs, *c, tool) for tool in TOOLS)]
    raced = {c: races[f"{c[0]} / {c[1]}"] for c in cases if "srfx" in races.get(f"{c[0]} / {c[1]}", {})}
    slower = {
        c: s for c, race in raced.items() if (s := _fastest_other(race)) is not None and s[1] < 1 / WITHIN
    }
    behind = {c: r["srfx"] / r["native"] for c, r in raced.items() if r["srfx"] > WITHIN * r["native"]}
    lines = [
        f"* exact: {len(cases) - len(wrong)} of {len(cases)} cases{_named(wrong)}",
        f"* smallest of the exact results: {len(cases) - len(wrong) - len(larger)} of {len(cases)}{_named(larger)}",
        f"* fastest of the exact results, or within {WITHIN - 1:.0%} of it: {len(raced) - len(slower)} of {len(raced)}"
        + _named(
            [
                (*c, f"{tool} takes {ratio:.2f} of our time, {saved:.2g} ms less")
                for c, (tool, ratio, saved) in slower.items()
            ]
        ),
    ]
    if raced:
        ratio = geometric_mean([r["srfx"] / r["native"] for r in raced.values()])
        gain = geometric_mean([r["masked"] / r["srfx"] for r in raced.values()])
        lines += [
            f"* time of a dense network built at the same widths: {ratio:.3f} of it in the mean, within "
            f"{WITHIN - 1:.0%} of it in {len(raced) - len(behind)} of {len(raced)}"
            + _named([(*c, f"{r:.2f}") for c, r in behind.items()]),
            f"* {gain:.2f} times as fast as the masked models in the mean",
        ]
    return "\n".join(lines) + "\n"


def _named(cases: list[Any]) -> str:
    return f"; not: {', '.join(_words(case) for case in cases)}" if cases else ""


def _words(case: tuple[str, ...]) -> str:
    return f"{case[0]} `{case[1]}`" + (f" ({case[2]})" if len(case) > 2 else "")


def _ours(tool: str) -> str:
    """Which of our rows a tool stands against."""
    return FOLDED if tool in FOLDS else "srfx"


def _is_beaten(runs: dict[str, Any], model: str, mask: str, tool: str) -> bool:
    row, ours = _get(runs, model, mask, tool), _get(runs, model, mask, _ours(tool))
    return bool(row.get("outcome") == "exact" and row["left"] < ours["left"] * 0.9999)


def _smallest(runs: dict[str, Any], model: str, mask: str, among: str) -> float:
    """The least share of the exact results that a tool stands against."""
    rows = [_get(runs, model, mask, tool) for tool in TOOLS if _ours(tool) == _ours(among)]
    return min((r["left"] for r in rows if r.get("outcome") == "exact"), default=0.0)


def _fastest_other(race: dict[str, float]) -> tuple[str, float, float] | None:
    """The fastest exact result of another tool, its time in units of ours in the same engine, milliseconds less."""
    times: dict[str, tuple[float, float]] = {}
    for tool in TOOLS:
        if tool != _ours(tool) and tool in race:
            ours = race["srfx, OpenVINO"] if tool == ENGINE else race.get(_ours(tool), race["srfx"])
            times[tool] = race[tool] / ours, ours - race[tool]
    best = min(times, key=times.__getitem__, default=None)
    return None if best is None else (best, *times[best])


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


def _shares(runs: dict[str, Any], tools: list[str], mask: str, models: Any) -> str:
    models = [m for m in models if any(_get(runs, m, mask, t) for t in tools)]
    text = _head(["tool", *models])
    for tool in tools:
        rows = [(_get(runs, model, mask, tool), _smallest(runs, model, mask, tool)) for model in models]
        text += _row([tool, *(_share(row, least) for row, least in rows)])
    return text


def _share(row: dict[str, Any], least: float) -> str:
    if row.get("outcome") != "exact":
        return {"shape": "wrong shape"}.get(row.get("outcome", ""), row.get("outcome", ""))
    text = f"{row['left']:.1%}"
    return f"**{text}**" if row["left"] <= least * 1.0001 else text


def _speeds(races: dict[str, Any], tools: list[str]) -> str:
    text = (
        "How many times faster than the masked model, batch 2, one thread; exact results only. *native*: a dense network "
        "built at the widths of srfx's result, without anything that srfx adds to be exact. OpenVINO runs in an engine of "
        "its own; there it stands against the masked model and the result of srfx in the same engine.\n\n"
    )
    torches = [t for t in tools if t != ENGINE]
    text += _head(["model, mask", *torches, "native", "srfx / native", "OpenVINO", "srfx in OpenVINO"])
    for model in CASES:
        for mask in MASKS:
            race = races.get(f"{model} / {mask}", {})
            if "masked" not in race:
                continue
            cells = [_times(race, "masked", tool) for tool in (*torches, "native")]
            cells.append(f"{race['srfx'] / race['native']:.3f}")
            cells += [_times(race, "masked, OpenVINO", tool) for tool in (ENGINE, "srfx, OpenVINO")]
            text += _row([f"{model}, {mask}", *cells])
    return text


def _times(race: dict[str, float], base: str, tool: str) -> str:
    return f"{race[base] / race[tool]:.2f}" if tool in race and base in race else ""


def _costs(runs: dict[str, Any], tools: list[str]) -> str:
    text = "Seconds of one thread (tracing included) and MB of memory beyond the model's own run, mask `rows`.\n\n"
    text += _head(["model", *tools])
    for model in CASES:
        rows = [_get(runs, model, "rows", tool) for tool in tools]
        if any("seconds" in row for row in rows):
            cells = [f"{r['seconds']:.1f} s, {r['peak_mb']:.0f}" if "seconds" in r else "" for r in rows]
            text += _row([model, *cells])
    return text


def _crashes(runs: dict[str, Any]) -> str:
    text = _head(["model, mask, tool", "what it says"]).replace("---:", "---")
    for key, row in runs.items():
        if row["outcome"] == "crash":
            said = " ".join(row["detail"].split()).replace("|", "\\|").replace("<", "&lt;")
            text += _row([key.replace(" / ", ", "), said])
    return text


def _plot(runs: dict[str, Any], tools: list[str]) -> None:
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    models = [m for m in CASES if any(_get(runs, m, "classes", t) for t in tools)]
    figure, axes = pyplot.subplots(figsize=(10, 4), layout="constrained")
    width = 0.85 / max(1, len(tools))
    for i, tool in enumerate(tools):
        rows = [_get(runs, model, "classes", tool) for model in models]
        places = [x + i * width for x in range(len(models))]
        colour = {"srfx": "#2a6fdb", FOLDED: "#8fb3ec"}.get(tool) or pyplot.get_cmap("Set2")(i)
        is_exact = [row.get("outcome") == "exact" for row in rows]
        shares = [100 * row["left"] if exact else 0.0 for row, exact in zip(rows, is_exact, strict=True)]
        axes.bar(places, shares, width * 0.9, label=tool, color=colour)
        for place, row, exact in zip(places, rows, is_exact, strict=True):
            if row and not exact:  # wrong or crashed
                axes.plot(place, 2, "x", color=colour, markersize=5)
    axes.set_xticks([x + 0.42 - width / 2 for x in range(len(models))], models, rotation=20, ha="right")
    axes.set_ylabel("parameters left, %  (x: wrong or crash)")
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside upper center", ncols=4, fontsize="small", frameon=False)
    figure.savefig(PLOT, metadata={"Date": None})
    pyplot.close(figure)
