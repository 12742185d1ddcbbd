"""How fast ragged results are, beside aligned ones: eager and compiled, one input and eight.

    python -m benchmarks.ragged_speed                     all models; writes benchmarks/results/ragged_speed.json
    python -m benchmarks.ragged_speed mlp gpt2 --eager    some, not compiled
    python -m benchmarks.ragged_speed --resume            go on behind the rows that the file has already

The results of minimize(), minimize(ragged=True) and minimize(ragged="auto") are called in turn.  A time is the least
of its calls; a ratio is the median of the ratios within a turn, which what else the machine does meets alike.
``auto`` is made for the batch that is measured; it is compared with aligned.  The row says the load of the machine.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch

import srfx
from benchmarks import ragged_models as zoo
from benchmarks.cycle.history import machine
from srfx.ir.timing import turns_s

WAYS: dict[str, Any] = {"aligned": False, "ragged": True, "auto": "auto"}


def measure(name: str, batch: int, is_compiled: list[bool]) -> Iterator[dict[str, Any]]:
    """One row eager, and one compiled."""
    model, args = zoo.build(name), zoo.inputs(name, batch)
    found = {}
    for way, ragged in WAYS.items():
        found[way] = srfx.minimize(zoo.traced(name, model, args), args, ragged=ragged).eval()
    timing = srfx.report(found["auto"]).timing
    for compiled in is_compiled:
        runs = {w: torch.compile(m) if compiled else m for w, m in found.items()}
        with torch.no_grad():
            calls = [partial(m, *args) for m in runs.values()]
            turns_s(calls, n_rounds=3, limit_s=0)  # compiles, and warms up
            turns = [dict(zip(WAYS, t, strict=True)) for t in turns_s(calls, n_rounds=60, limit_s=30)]
        ratio = {w: statistics.median(t[w] / t["aligned"] for t in turns) for w in WAYS}
        yield {"model": name, "batch": batch, "compiled": compiled, "timing": timing,
               "params": {w: sum(p.numel() for p in m.parameters()) for w, m in found.items()},
               "ms": {w: 1e3 * min(t[w] for t in turns) for w in WAYS},
               "ratio": ratio, "n_turns": len(turns), "load": os.getloadavg()[0]}  # fmt: skip
        torch.compiler.reset()


def text(row: dict[str, Any]) -> str:
    """One line."""
    ms, n, ratio = row["ms"], row["params"], row["ratio"]
    return (
        f"{row['model']:14s} batch {row['batch']} {'compiled' if row['compiled'] else 'eager':8s} "
        f"aligned {ms['aligned']:8.3f} ms  ragged {ratio['ragged']:5.2f}x time, "
        f"{n['ragged'] / n['aligned']:.2f}x parameters  auto {ratio['auto']:5.2f}x time, "
        f"{n['auto'] / n['aligned']:.2f}x parameters  load {row['load']:.1f}"
    )


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("names", nargs="*", default=list(zoo.NAMES))
    parser.add_argument("--eager", action="store_true")
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
            left = [c for c in ([False] if given.eager else [False, True]) if c not in done]
            for row in measure(name, batch, left) if left else ():
                rows.append(row)
                print(text(row), flush=True)
                if path is not None:
                    found = {"machine": machine("torchvision", "transformers"), "rows": rows}
                    path.write_text(json.dumps(found, indent=1) + "\n")
    if rows:
        print(verdict(rows))


def verdict(rows: list[dict[str, Any]]) -> str:
    """How often auto is slower than aligned by more than 3 %, and on which models another network, faster by as much."""
    slower = [f"{r['model']} batch {r['batch']}" for r in rows if r["ratio"]["auto"] > 1.03]
    others = [r for r in rows if r["params"]["auto"] != r["params"]["aligned"]]  # else it is aligned's twin
    faster = sorted({r["model"] for r in others if r["ratio"]["auto"] < 0.97})
    return (
        f"auto is slower by more than 3 % in {len(slower)} of {len(rows)} rows: {slower}; faster on {faster}"
    )


if __name__ == "__main__":
    main()
