"""How fast ragged results are, beside aligned ones: eager and compiled, one input and eight.

    python -m benchmarks.ragged_speed                     all models; writes benchmarks/results/ragged_speed.json
    python -m benchmarks.ragged_speed mlp gpt2 --eager    some, not compiled

The results of minimize(), minimize(ragged=True) and minimize(ragged="auto") are called in turn, and the least time of
each counts.  ``auto`` is made for the batch that is measured; it is compared with aligned.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch

import srfx
from benchmarks import ragged_models as zoo
from benchmarks.cycle.history import machine
from srfx.ir.timing import best_s

WAYS: dict[str, Any] = {"aligned": False, "ragged": True, "auto": "auto"}


def measure(name: str, batches: list[int], compiled: list[bool]) -> Iterator[dict[str, Any]]:
    """One row for each batch, eager and compiled."""
    model = zoo.build(name)
    for batch in batches:
        args = zoo.inputs(name, batch)
        found = {}
        for way, ragged in WAYS.items():
            found[way] = srfx.minimize(zoo.traced(name, model, args), args, ragged=ragged).eval()
        timing = srfx.report(found["auto"]).timing
        for is_compiled in compiled:
            run = {w: torch.compile(m) if is_compiled else m for w, m in found.items()}
            with torch.no_grad():
                calls = [partial(m, *args) for m in run.values()]
                for call in calls:
                    call()
                times = dict(zip(WAYS, best_s(calls, n_rounds=60, limit_s=30), strict=True))
            yield {"model": name, "batch": batch, "compiled": is_compiled, "timing": timing,
                   "params": {w: sum(p.numel() for p in m.parameters()) for w, m in found.items()},
                   "ms": {w: 1e3 * t for w, t in times.items()}}  # fmt: skip
            torch.compiler.reset()


def text(row: dict[str, Any]) -> str:
    """One line."""
    ms, n = row["ms"], row["params"]
    return (
        f"{row['model']:14s} batch {row['batch']} {'compiled' if row['compiled'] else 'eager':8s} "
        f"aligned {ms['aligned']:8.3f} ms  ragged {ms['ragged'] / ms['aligned']:5.2f}x time, "
        f"{n['ragged'] / n['aligned']:.2f}x parameters  auto {ms['auto'] / ms['aligned']:5.2f}x time, "
        f"{n['auto'] / n['aligned']:.2f}x parameters"
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
    given = parser.parse_args()
    rows = []
    for name in given.names:
        for row in measure(name, given.batch or [1, 8], [False] if given.eager else [False, True]):
            rows.append(row)
            print(text(row), flush=True)
    path = given.json
    if path is None and given.names == list(zoo.NAMES):
        path = Path(__file__).parent / "results" / "ragged_speed.json"
    if path is not None:
        found = {"machine": machine("torchvision", "transformers"), "rows": rows}
        path.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
