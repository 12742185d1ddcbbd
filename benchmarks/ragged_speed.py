"""How fast ragged results are, beside aligned ones: eager and compiled, one input and eight.

    python -m benchmarks.ragged_speed                     all models; writes benchmarks/results/ragged_speed.json
    python -m benchmarks.ragged_speed mlp gpt2 --eager    some, not compiled
    python -m benchmarks.ragged_speed --resume            go on behind the rows that the file has already
    python -m benchmarks.ragged_speed --ways auto         not ragged=True, which takes long to compile

The results of minimize(), minimize(ragged=True) and minimize(ragged="auto") are called in turn.  A time is the least
of its calls, with one thread that of the processor; a ratio is the median of the ratios within a turn, which what else
the machine does meets alike.  ``auto`` is made for the batch that is measured; it is compared with aligned.  Where it
is the same graph with the same tensors it is not run: its ratio is 1.  The row says the load of the machine.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx

import srfx
from benchmarks import ragged_models as zoo
from benchmarks.cycle.history import machine
from srfx.ir.timing import turns_s

WAYS: dict[str, Any] = {"aligned": False, "ragged": True, "auto": "auto"}


def measure(name: str, batch: int, is_compiled: list[bool], ways: list[str]) -> Iterator[dict[str, Any]]:
    """One row eager, and one compiled."""
    model, args = zoo.build(name), zoo.inputs(name, batch)
    found = {}
    for way in ("aligned", *ways):
        found[way] = srfx.minimize(zoo.traced(name, model, args), args, ragged=WAYS[way]).eval()
    timing = srfx.report(found["auto"]).timing if "auto" in found else {}
    twins = [way for way in ways if is_same(found[way], found["aligned"])]
    params = {w: sum(p.numel() for p in m.parameters()) for w, m in found.items()}
    run = [way for way in found if way not in twins]
    for compiled in is_compiled:
        row = {"model": name, "batch": batch, "compiled": compiled, "timing": timing, "params": params,
               "twins": twins, "load": os.getloadavg()[0]}  # fmt: skip
        turns = (
            timed([torch.compile(found[w]) if compiled else found[w] for w in run], args) if run[1:] else []
        )
        ratio = {w: statistics.median(t[i] / t[0] for t in turns) for i, w in enumerate(run) if turns}
        ms = {w: 1e3 * min(t[i] for t in turns) for i, w in enumerate(run) if turns}
        yield {**row, "ms": ms, "ratio": {**ratio, **dict.fromkeys(twins, 1.0)}, "n_turns": len(turns)}
        torch.compiler.reset()


def timed(models: list[Callable[..., Any]], args: tuple[Tensor, ...]) -> list[list[float]]:
    """Seconds of each in each turn."""
    with torch.no_grad():
        calls = [partial(m, *args) for m in models]
        turns_s(calls, n_rounds=3, limit_s=0)  # compiles, and warms up
        return turns_s(calls, n_rounds=60, limit_s=30)


def is_same(a: fx.GraphModule, b: fx.GraphModule) -> bool:
    """Whether both are the same graph over the same numbers."""
    mine, other = a.state_dict(), b.state_dict()
    return (
        a.code == b.code and mine.keys() == other.keys() and all(torch.equal(mine[k], other[k]) for k in mine)
    )


def text(row: dict[str, Any]) -> str:
    """One line."""
    cells = [
        f"{way} {ratio:5.2f}x time, {row['params'][way] / row['params']['aligned']:.2f}x parameters"
        for way, ratio in row["ratio"].items()
        if way != "aligned"
    ]
    kind = "compiled" if row["compiled"] else "eager"
    ms = f"{row['ms']['aligned']:8.3f} ms" if row["ms"] else ""
    return f"{row['model']:14s} batch {row['batch']} {kind:8s} aligned {ms}  {'  '.join(cells)}  load {row['load']:.1f}"


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("names", nargs="*", default=list(zoo.NAMES))
    parser.add_argument("--eager", action="store_true", help="not compiled")
    parser.add_argument("--compiled", action="store_true", help="not eager")
    parser.add_argument("--ways", nargs="+", choices=["ragged", "auto"], default=["ragged", "auto"])
    parser.add_argument("--batch", type=int, action="append")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--resume", action="store_true", help="keep the rows of the file that was begun")
    given = parser.parse_args()
    path = given.json
    if path is None and given.names == list(zoo.NAMES):
        path = Path(__file__).parent / "results" / "ragged_speed.json"
    rows = json.loads(path.read_text())["rows"] if given.resume and path is not None and path.exists() else []
    for name in given.names:
        for batch in given.batch or [1, 8]:
            done = [r["compiled"] for r in rows if (r["model"], r["batch"]) == (name, batch)]
            kinds = [False] * (not given.compiled) + [True] * (not given.eager)
            left = [c for c in kinds if c not in done]
            for row in measure(name, batch, left, given.ways) if left else ():
                rows.append(row)
                rows.sort(key=lambda r: zoo.NAMES.index(r["model"]))
                print(text(row), flush=True)
                if path is not None:
                    found = {"machine": machine("torchvision", "transformers"), "rows": rows}
                    path.write_text(json.dumps(found, indent=1) + "\n")
    if rows:
        print(verdict(rows))


def verdict(rows: list[dict[str, Any]]) -> str:
    """How often auto is slower than aligned by more than 3 %, and on which models another network, faster by as much."""
    rows = [r for r in rows if "auto" in r["ratio"]]
    slower = [f"{r['model']} batch {r['batch']}" for r in rows if r["ratio"]["auto"] > 1.03]
    faster = sorted({r["model"] for r in rows if r["ratio"]["auto"] < 0.97})
    return (
        f"auto is slower by more than 3 % in {len(slower)} of {len(rows)} rows: {slower}; faster on {faster}"
    )


if __name__ == "__main__":
    main()
