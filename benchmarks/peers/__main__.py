"""The same masked models through srfx and through other tools: what is left, is it right, how long, how fast.

    python -m benchmarks.peers                            all of it (hours on two cores; goes on where it stopped)
    python -m benchmarks.peers --models resnet18 --masks rows --tools srfx OpenVINO
    python -m benchmarks.peers --write                    only write the tables and the plot again

Each tool has a process of its own for each model, so a crash is a row, not an end. Exact means: the first output of
the result lies within 1e-9 of the masked model's, relative to its largest entry, in float64 (1e-4 for the tools that
only know float32). The exact results then race in one process: medians of forward passes taken in turn at batch 2 on
one thread, beside the masked model and a dense network built at the widths of ours. Times are CPU times.
Tools that are not installed are left out: pip install -e ".[bench,peers,report]".
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


def run(tool: str, model: str, masks: list[str], seconds: int) -> dict[str, dict[str, Any]]:
    """One row for each mask; where the process died, how. What comes after a death is tried in another process."""
    rows: dict[str, dict[str, Any]] = {}
    while left := [mask for mask in masks if mask not in rows]:
        lines, death = _lines(["benchmarks.peers.worker", tool, model, *left], seconds * len(left))
        rows |= {row.pop("mask"): row for row in lines}
        if len(lines) < len(left):
            rows[left[len(lines)]] = {"outcome": "crash", "detail": death}
    return rows


def race(model: str, mask: str, tools: list[str], seconds: int) -> dict[str, Any]:
    """How fast the exact results are."""
    lines, death = _lines(["benchmarks.peers.race", model, mask, *tools], seconds)
    return lines[0] if lines else {"detail": death}


def _lines(command: list[str], seconds: int) -> tuple[list[dict[str, Any]], str]:
    """The JSON that a process printed, line by line, and how it ended."""
    command = [sys.executable, "-m", *command]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    ) as process:
        try:
            out, errors = process.communicate(timeout=seconds)
            last = (errors.strip().splitlines() or ["nothing printed"])[-1]
            death = f"exit code {process.returncode}: {last[:150]}"
        except subprocess.TimeoutExpired:
            process.kill()
            out, _ = process.communicate()
            death = f"not done after {seconds} s"
    return [json.loads(line) for line in out.splitlines() if line.startswith("{")], death


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
    parser.add_argument("--measure-only", action="store_true", help="write only the numbers")
    options = parser.parse_args()
    known: dict[str, Any] = json.loads(RESULT.read_text()) if RESULT.exists() else {"runs": {}, "races": {}}
    there = [t for t in options.tools if t not in PACKAGES or importlib.util.find_spec(PACKAGES[t])]
    jobs = [] if options.write else [(m, t) for m in options.models for t in (*there, None)]
    with Progress() as progress:
        for model, tool in progress.track(jobs):
            masks = [k for k in options.masks if options.again or not is_known(known, model, k, tool)]
            if not masks:
                continue
            if tool is not None:
                for mask, row in run(tool, model, masks, options.seconds).items():
                    known["runs"][f"{model} / {mask} / {tool}"] = row
                    said = row.get("detail") or f"{row['outcome']}, {row['left']:.1%} left"
                    progress.console.print(f"{model} / {mask} / {tool}: {said}", highlight=False)
            else:
                for mask in masks:
                    known["races"][f"{model} / {mask}"] = race(
                        model, mask, exact_tools(known, model, mask), options.seconds
                    )
            known["versions"] = versions()
            scratch = RESULT.with_suffix(".part")
            scratch.write_text(json.dumps(known, indent=1) + "\n")
            scratch.replace(RESULT)
    if known["runs"] and not options.measure_only:
        write(known)


def is_known(known: dict[str, Any], model: str, mask: str, tool: str | None) -> bool:
    """Whether a run, or without a tool the race, was measured before."""
    if tool is None:
        return f"{model} / {mask}" in known["races"]
    return f"{model} / {mask} / {tool}" in known["runs"]


def exact_tools(known: dict[str, Any], model: str, mask: str) -> list[str]:
    """Tools that gave the right answer, ours first."""
    rows = {tool: known["runs"].get(f"{model} / {mask} / {tool}", {}) for tool in TOOLS}
    return [tool for tool, row in rows.items() if row.get("outcome") == "exact"]


if __name__ == "__main__":
    main()
