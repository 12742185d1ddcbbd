"""One tool on one masked model, in a process of its own; prints one line of JSON."""

from __future__ import annotations

import argparse
import copy
import json
import resource
import time
import traceback
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from benchmarks.peers.cases import prepare
from benchmarks.peers.tools import SINGLE, TOOLS
from tests.helpers import relative_error


def first(output: Any) -> Tensor:
    """The first float tensor of whatever a model returns."""
    return next(t for t in tree_leaves(output) if isinstance(t, Tensor) and t.is_floating_point())


def n_weights(model: nn.Module) -> int:
    """Parameters, tied ones once; constants of a converted model."""
    counted = getattr(model, "n_weights", None)
    return int(counted) if isinstance(counted, int) else sum(p.numel() for p in model.parameters())


@torch.no_grad()
def in_turn(models: list[nn.Module], x: Tensor, seconds: float = 6.0) -> list[float]:
    """The shortest forward time of each in milliseconds, measured in turn so that noise meets all alike."""
    best = [float("inf")] * len(models)
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        for i, model in enumerate(models):
            start = time.perf_counter()
            model(x)
            best[i] = min(best[i], 1e3 * (time.perf_counter() - start))
    return best


def single(model: nn.Module) -> nn.Module:
    """A float32 copy; what is no torch model stays."""
    return model if hasattr(model, "n_weights") else copy.deepcopy(model).float()


def run(tool: str, name: str, mask: str, seed: int) -> dict[str, Any]:
    """Parameters, error, time to rewrite, peak memory beyond the model's own, latency against the masked model."""
    model, x = prepare(name, mask, seed)
    if tool in SINGLE:
        model, x = model.float(), x.float() if x.is_floating_point() else x
    given = copy.deepcopy(model)
    with torch.no_grad():
        wanted = first(model(x))
    idle = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start = time.perf_counter()
    try:
        result = TOOLS[tool](given, x)
        seconds = time.perf_counter() - start
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - idle
        with torch.no_grad():
            found = first(result(x))
    except BaseException as error:  # a tool's crash, of whatever kind, is a result
        if isinstance(error, KeyboardInterrupt):
            raise
        where = traceback.extract_tb(error.__traceback__)[-1]
        return {"outcome": "crash", "detail": f"{type(error).__name__}: {str(error)[:150]} ({where.name})"}
    row: dict[str, Any] = {
        "left": n_weights(result) / n_weights(model),
        "seconds": seconds,
        "peak_mb": peak / 1024,
    }
    if found.shape != wanted.shape:
        return row | {"outcome": "shape", "detail": f"{list(wanted.shape)} became {list(found.shape)}"}
    row["error"] = relative_error(wanted, found.to(wanted))
    is_exact = row["error"] < (1e-9 if found.dtype == torch.float64 else 1e-4)
    row["outcome"] = "exact" if is_exact else "wrong"
    if is_exact:
        pair = [single(model), single(result)]
        row["masked_ms"], row["latency_ms"] = in_turn(pair, x.float() if x.is_floating_point() else x)
    return row


def main() -> None:
    """Read the case from the command line, print its row."""
    parser = argparse.ArgumentParser()
    parser.add_argument("tool")
    parser.add_argument("model")
    parser.add_argument("mask")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.set_num_threads(1)
    print("\n" + json.dumps(run(options.tool, options.model, options.mask, options.seed)), flush=True)


if __name__ == "__main__":
    main()
