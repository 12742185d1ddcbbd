"""The same masked models through srfx and through other tools: what is left, is it right, how long, how fast.

    python -m benchmarks.peers                            all of it (hours on two cores; goes on where it stopped)
    python -m benchmarks.peers --models resnet18 --masks rows --tools srfx OpenVINO
    python -m benchmarks.peers --write                    only write the tables and the plot again

Each run has a process of its own, so a crash is a row, not an end. Exact means: the first output of the result lies
within 1e-9 of the masked model's, relative to its largest entry, in float64 (1e-4 for the tools that only know
float32). Times are the shortest of many forward passes at batch 2 on one thread, masked model and result in turn.
Tools that are not installed are left out: pip install torch-simplify torch-pruning openvino nni.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import platform
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

from rich.progress import Progress

from benchmarks.peers.cases import CASES, MASKS
from benchmarks.peers.tables import write
from benchmarks.peers.tools import TOOLS

RESULT = Path(__file__).parents[1] / "results" / "peers.json"
PACKAGES = {
    "torch-simplify": "simplify",
    "Torch-Pruning, zero rows": "torch_pruning",
    "Torch-Pruning, zero groups": "torch_pruning",
    "OpenVINO": "openvino",
    "NNI": "nni",
}


def run(tool: str, model: str, mask: str, seconds: int) -> dict[str, Any]:
    """One worker; what it printed last, or how it died."""
    command = [sys.executable, "-m", "benchmarks.peers.worker", tool, model, mask]
    try:
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            timeout=seconds,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )
    except subprocess.TimeoutExpired:
        return {"outcome": "crash", "detail": f"not done after {seconds} s"}
    try:
        row: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    except (IndexError, ValueError):
        last = (done.stderr.strip().splitlines() or ["nothing printed"])[-1]
        return {"outcome": "crash", "detail": f"exit code {done.returncode}: {last[:150]}"}
    return row


def versions() -> dict[str, str]:
    """Of the machine and of every package that takes part."""
    found = {"machine": f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores"}
    for name in ("torch", "torchvision", "torch-simplify", "torch-pruning", "openvino", "nni"):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def main() -> None:
    """Measure what is asked for and not known yet, then write the page."""
    parser = argparse.ArgumentParser(
        prog="benchmarks.peers", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--models", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--masks", nargs="+", choices=MASKS, default=list(MASKS))
    parser.add_argument("--tools", nargs="+", choices=TOOLS, default=list(TOOLS))
    parser.add_argument("--seconds", type=int, default=600, help="limit of one run")
    parser.add_argument("--again", action="store_true", help="measure what is known already, too")
    parser.add_argument("--write", action="store_true", help="measure nothing")
    options = parser.parse_args()
    known: dict[str, Any] = json.loads(RESULT.read_text()) if RESULT.exists() else {"runs": {}}
    there = [t for t in options.tools if t not in PACKAGES or importlib.util.find_spec(PACKAGES[t])]
    jobs = [(t, m, k) for m in options.models for k in options.masks for t in there]
    if options.write:
        jobs = []
    with Progress() as progress:
        for tool, model, mask in progress.track(jobs):
            key = f"{model} / {mask} / {tool}"
            if key in known["runs"] and not options.again:
                continue
            progress.console.print(key, end=": ", highlight=False)
            known["runs"][key] = row = run(tool, model, mask, options.seconds)
            progress.console.print(row.get("detail") or f"{row['outcome']}, {row.get('left', 0):.1%} left")
            known["versions"] = versions()
            scratch = RESULT.with_suffix(".part")
            scratch.write_text(json.dumps(known, indent=1) + "\n")
            scratch.replace(RESULT)
    write(known)


if __name__ == "__main__":
    main()
