"""Is minimize() fast enough?

A ResNet-50 with random masks is traced once; minimize() may take 10 times one `torch.count_nonzero` over all
its weights plus 2 ms a node of the graph. Prints the ratio to that budget and where the time goes, phase
by phase (with what is indented below it), and writes `benchmarks/results/minimize_speed.json`.
Run: python -m benchmarks.minimize_speed [--model resnet50] [--rounds 5] [--threads 1]
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import importlib
import json
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torchvision
from torch import fx, nn

import srfx
import srfx.analysis.solver
import srfx.passes
import srfx.passes.base
import srfx.passes.compact_channels
import srfx.record.recorder

RESULT = Path(__file__).parent / "results" / "minimize_speed.json"
BUDGET_PER_COUNT = 10.0
BUDGET_MS_PER_NODE = 2.0

# What is timed: where the name is looked up, the name, the depth at which it is shown.
MINIMIZE = "srfx.minimize"
SOLVER = "srfx.analysis.solver"
PHASES = (
    (MINIMIZE, "capture", 0),
    (MINIMIZE, "survey", 0),
    *(
        (f"{srfx.passes.PASSES[name].__module__}.{srfx.passes.PASSES[name].__name__}", "__call__", 0)
        for name in sys.modules[MINIMIZE].CANONICALISE
    ),
    ("srfx.passes.compact_channels.CompactChannels", "__call__", 0),
    ("srfx.passes.compact_channels", "analyse", 1),
    (SOLVER, "sites", 2),
    (SOLVER, "label", 2),
    ("srfx.lattice.classes.Classes", "of", 2),
    (SOLVER, "constancy", 2),
    (SOLVER, "liveness", 2),
    (SOLVER, "live_labels", 2),
    (SOLVER, "_present", 2),
    ("srfx.lattice.classes.Classes", "close", 2),
    (SOLVER, "_choose_carriers", 2),
    ("srfx.passes.compact_channels", "plan_edits", 1),
    ("srfx.passes.compact_channels.CompactChannels", "apply", 1),
    ("srfx.passes.compact_channels.CompactChannels", "finish", 1),
    ("srfx.record.recorder.Recorder", "__init__", 0),
    ("srfx.record.recorder.Recorder", "compaction", 0),
    ("srfx.record.recorder.Recorder", "record", 0),
    (MINIMIZE, "own_tensors", 0),
)


def masked(model: nn.Module, seed: int = 0) -> nn.Module:
    """Zeros as an unstructured pruner with fine-tuning leaves them: 30 % dead rows, the rest half empty."""
    generator = torch.Generator().manual_seed(seed)
    layers = [m for m in model.modules() if isinstance(m, (nn.Conv2d, nn.Linear))]
    with torch.no_grad():
        for layer in layers:
            weight = layer.weight
            weight *= torch.rand(weight.shape, generator=generator) < 0.5
            if layer is not layers[-1]:
                weight[torch.rand(len(weight), generator=generator) < 0.3] = 0
    return model


class Phases:
    """Time spent in named functions, inclusive."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)

    def timed(self, function: Callable[..., Any], name: str) -> Callable[..., Any]:
        """The function, adding its time to `name`."""

        @functools.wraps(function)
        def run(*args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                self.seconds[name] += time.perf_counter() - start

        return run

    @contextlib.contextmanager
    def watch(self) -> Iterator[None]:
        """Time everything in PHASES."""
        with contextlib.ExitStack() as stack:
            for place, name, _ in PHASES:
                owner = find(place)
                if owner is None or not hasattr(owner, name):
                    continue  # the function has moved; its line is missing from the table
                raw = vars(owner).get(name, getattr(owner, name))
                label = f"{place}.{name}"
                new: Any = self.timed(getattr(raw, "__func__", raw), label)
                new = classmethod(new) if isinstance(raw, classmethod) else new
                stack.enter_context(mock.patch.object(owner, name, new))
            yield


def find(place: str) -> Any:
    """The module or class of this path; `srfx.minimize` the module, not the function of that name."""
    parent, _, last = place.rpartition(".")
    with contextlib.suppress(ImportError):
        importlib.import_module(place)
        return sys.modules[place]
    with contextlib.suppress(ImportError):
        importlib.import_module(parent)
        return getattr(sys.modules[parent], last, None)
    return None


def count_seconds(model: nn.Module) -> float:
    """One torch.count_nonzero over each weight."""
    start = time.perf_counter()
    for parameter in model.parameters():
        torch.count_nonzero(parameter)
    return time.perf_counter() - start


def watch(traced: fx.GraphModule) -> tuple[fx.GraphModule, float, Phases]:
    """One run with its phases timed: the result, the time of all, the time of each."""
    phases = Phases()
    with phases.watch():
        start = time.perf_counter()
        small = srfx.minimize(traced)
        return small, time.perf_counter() - start, phases


def measure(traced: fx.GraphModule, n_rounds: int) -> dict[str, Any]:
    """First and best time of minimize(), best time of counting, phases of the best watched run."""
    times, counts = [], []
    for _ in range(n_rounds):  # in turns, so that a busy machine slows both alike
        counts.append(count_seconds(traced))
        start = time.perf_counter()
        srfx.minimize(traced)
        times.append(time.perf_counter() - start)
    small, watched, phases = min((watch(traced) for _ in range(n_rounds)), key=lambda run: run[1])
    start = time.perf_counter()
    again = srfx.minimize(small)
    n_nodes = len(traced.graph.nodes)
    budget = BUDGET_PER_COUNT * min(counts) + BUDGET_MS_PER_NODE * n_nodes / 1000
    return {
        "nodes": n_nodes,
        "params_before": sum(p.numel() for p in traced.parameters()),
        "params_after": sum(p.numel() for p in small.parameters()),
        "params_again": sum(p.numel() for p in again.parameters()),
        "first_s": times[0],
        "best_s": min(times),
        "again_s": time.perf_counter() - start,
        "count_nonzero_s": min(counts),
        "budget_s": budget,
        "ratio": min(times) / budget,
        "watched_s": watched,
        "phases_s": {f"{place}.{name}": phases.seconds.get(f"{place}.{name}") for place, name, _ in PHASES},
    }


def show(name: str, found: dict[str, Any]) -> None:
    """The table."""
    print(
        f"{name}: {found['nodes']} nodes, {found['params_before']:,} -> {found['params_after']:,} parameters"
    )
    print(f"minimize          {found['best_s'] * 1000:8.1f} ms (first call {found['first_s'] * 1000:.1f} ms)")
    print(f"count_nonzero     {found['count_nonzero_s'] * 1000:8.1f} ms over all weights")
    print(f"budget            {found['budget_s'] * 1000:8.1f} ms = 10 x count_nonzero + 2 ms a node")
    print(f"ratio             {found['ratio']:8.2f}    (at most 1)\n")
    print(f"one run, watched  {found['watched_s'] * 1000:8.1f} ms")
    for place, function, depth in PHASES:
        seconds = found["phases_s"][f"{place}.{function}"]
        owner = place.rpartition(".")[2]
        label = f"{owner}.{function}" if function.startswith("__") else function
        text = "   gone" if seconds is None else f"{seconds * 1000:8.1f} ms"
        print(f"  {'    ' * depth}{label:<28}{text}")


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="resnet50", help="a torchvision model")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    traced = fx.symbolic_trace(masked(torchvision.models.get_model(options.model, weights=None)).eval())
    found = {"threads": options.threads, "torch": torch.__version__, **measure(traced, options.rounds)}
    show(options.model, found)
    RESULT.parent.mkdir(exist_ok=True)
    known = json.loads(RESULT.read_text()) if RESULT.exists() else {}
    RESULT.write_text(json.dumps({**known, options.model: found}, indent=2) + "\n")


if __name__ == "__main__":
    main()
