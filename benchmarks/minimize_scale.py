"""How do the time and the memory of minimize() grow with weights and with nodes?

Each point runs in a process of its own: a chain of linear layers and activations, of ever more weights (float32, at
the top bfloat16) or of ever more nodes. Fits time ~ size^slope on logarithmic axes over the upper part, where the
constant costs are small; a slope of 1 is linear. Memory is the highest resident size during minimize, beside what the
process takes without a model, in sizes of the model.
Prints both tables and writes `benchmarks/results/minimize_scale.json`.
Run: python -m benchmarks.minimize_scale [--max-weights 1000000000] [--max-nodes 20000] [--only weights|nodes]
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn

import srfx

RESULT = Path(__file__).parent / "results" / "minimize_scale.json"
WEIGHTS = (1_000_000, 4_000_000, 16_000_000, 64_000_000, 256_000_000, 1_000_000_000)
NODES = (100, 300, 1_000, 3_000, 10_000, 20_000)
BFLOAT16_FROM = 500_000_000
LARGEST_PEAK = 2.2


def chain(width: int, depth: int, dtype: torch.dtype, share: float) -> nn.Sequential:
    """``depth`` linear layers with activations; ``share`` of the hidden channels is dead."""
    layers: list[nn.Module] = []
    for i in range(depth):
        linear = nn.Linear(width, width, dtype=dtype)
        with torch.no_grad():
            linear.weight.fill_(0.01)  # cheap to make; minimize reads only which are zero, and the constants
            if i + 1 < depth:
                linear.weight[: int(share * width)] = 0
                linear.bias[: int(share * width)] = 0.5
        layers += [linear, nn.ReLU()]
    return nn.Sequential(*layers[:-1]).eval()


def resident(key: str) -> int:
    """A line of /proc/self/status, in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key):
            return int(line.split()[1]) * 1024
    raise AssertionError(f"/proc/self/status has no {key}")


def point(width: int, depth: int, dtype: str, share: float) -> dict[str, Any]:
    """Minimize one chain in this process."""
    kind: torch.dtype = getattr(torch, dtype)
    warm = chain(4, 2, kind, share)
    srfx.minimize(warm, torch.zeros(2, 4, dtype=kind))
    before = resident("VmRSS")
    model = chain(width, depth, kind, share)
    traced = torch.fx.symbolic_trace(model)
    size = sum(p.numel() * p.element_size() for p in model.parameters())
    Path("/proc/self/clear_refs").write_text("5")  # the highest resident size starts again from here
    start = time.process_time()
    small = srfx.minimize(traced, torch.zeros(2, width, dtype=kind))
    seconds = time.process_time() - start
    return {
        "weights": sum(p.numel() for p in model.parameters()),
        "nodes": len(traced.graph.nodes),
        "dtype": dtype,
        "dead_share": share,
        "size_bytes": size,
        "time_s": seconds,
        "peak": (resident("VmHWM") - before) / size,
        "weights_left": sum(p.numel() for p in small.parameters()),
    }


def measured(width: int, depth: int, dtype: str, share: float) -> dict[str, Any]:
    """`point` in a process of its own."""
    command = [
        sys.executable,
        "-m",
        "benchmarks.minimize_scale",
        "--point",
        str(width),
        str(depth),
        dtype,
        str(share),
    ]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def slope(points: list[dict[str, Any]], size: str) -> float:
    """The exponent of time as a power of the size, by least squares on logarithms."""
    xs = [math.log(p[size]) for p in points]
    ys = [math.log(p["time_s"]) for p in points]
    x, y = sum(xs) / len(xs), sum(ys) / len(ys)
    return sum((a - x) * (b - y) for a, b in zip(xs, ys, strict=True)) / sum((a - x) ** 2 for a in xs)


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--max-weights", type=int, default=WEIGHTS[-1])
    parser.add_argument("--max-nodes", type=int, default=NODES[-1])
    parser.add_argument("--only", choices=["weights", "nodes"])
    parser.add_argument(
        "--point", nargs=4, metavar=("WIDTH", "DEPTH", "DTYPE", "SHARE"), help="measure one, print JSON"
    )
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.point:
        width, depth, dtype, share = args.point
        print(json.dumps(point(int(width), int(depth), dtype, float(share))))
        return
    found: dict[str, Any] = json.loads(RESULT.read_text()) if RESULT.exists() else {}
    found["machine"] = {
        "torch": torch.__version__,
        "python": platform.python_version(),
        "processor": platform.machine(),
    }
    if args.only != "nodes":
        by_weights = []
        for n in (n for n in WEIGHTS if n <= args.max_weights):
            dtype = "bfloat16" if n >= BFLOAT16_FROM else "float32"
            for share in (0.0, 0.5):
                by_weights.append(measured(int(math.sqrt(n / 8)), 8, dtype, share))
                show(by_weights[-1])
        large = [p for p in by_weights if p["weights"] > 10_000_000 and p["dead_share"] == 0.5]
        found["by_weights"] = by_weights
        found["slope_weights"] = slope(large, "weights") if len(large) > 1 else None
        found["largest_peak"] = max(p["peak"] for p in by_weights if p["weights"] > 10_000_000)
        print(f"time ~ weights^{found['slope_weights']:.2f}; peak {found['largest_peak']:.2f} models")
    if args.only != "weights":
        by_nodes = []
        for n in (n for n in NODES if n <= args.max_nodes):
            by_nodes.append(measured(8, n // 2, "float32", 0.25))
            show(by_nodes[-1])
        found["by_nodes"] = by_nodes
        found["slope_nodes"] = slope(by_nodes[2:], "nodes") if len(by_nodes) > 3 else None
        print(f"time ~ nodes^{found['slope_nodes']:.2f}")
    RESULT.write_text(json.dumps(found, indent=1) + "\n")


def show(p: dict[str, Any]) -> None:
    """One line of the table."""
    per_node = 1000 * p["time_s"] / p["nodes"]
    print(
        f"{p['weights']:>13,} weights {p['nodes']:>6} nodes {p['dtype']:>9} dead {p['dead_share']:.2f}: "
        f"{p['time_s']:8.2f} s {per_node:7.2f} ms a node, peak {p['peak']:.2f} models",
        flush=True,
    )


if __name__ == "__main__":
    main()
