"""One tool on the masked forms of one model, in a process of its own; prints a line of JSON for each."""

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

from benchmarks.peers.cases import MASKS, prepare
from benchmarks.peers.tools import SINGLE, TOOLS
from tests.helpers import relative_error


def first(output: Any) -> Tensor:
    """The first float tensor of whatever a model returns."""
    return next(t for t in tree_leaves(output) if isinstance(t, Tensor) and t.is_floating_point())


def share(result: nn.Module, model: nn.Module) -> float:
    """Parameters left, tied ones once; a converted model has counted its constants itself."""
    counted = getattr(result, "share", None)
    if isinstance(counted, float):
        return counted
    return sum(p.numel() for p in result.parameters()) / sum(p.numel() for p in model.parameters())


def peak_mb() -> float:
    """The most memory that this process has held so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def run(tool: str, name: str, mask: str, seed: int) -> dict[str, Any]:
    """Parameters, error, time to rewrite, peak memory beyond that of the masked model's own run."""
    model, x = prepare(name, mask, seed)
    if tool in SINGLE:
        model, x = model.float(), x.float() if x.is_floating_point() else x
    given = copy.deepcopy(model)
    with torch.no_grad():
        wanted = first(model(x))
    idle, start = peak_mb(), time.process_time()
    try:
        result = TOOLS[tool](given, x)
        seconds, peak = time.process_time() - start, peak_mb() - idle
        with torch.no_grad():
            found = first(result(x))
    except BaseException as error:  # a tool's crash, of whatever kind, is a result
        if isinstance(error, KeyboardInterrupt):
            raise
        where = traceback.extract_tb(error.__traceback__)[-1]
        return {"outcome": "crash", "detail": f"{type(error).__name__}: {str(error)[:150]} ({where.name})"}
    row: dict[str, Any] = {"left": share(result, model), "seconds": seconds, "peak_mb": peak}
    if found.shape != wanted.shape:
        return row | {"outcome": "shape", "detail": f"{list(wanted.shape)} became {list(found.shape)}"}
    row["error"] = relative_error(wanted, found.to(wanted))
    is_exact = row["error"] < (1e-9 if found.dtype == torch.float64 else 1e-4)
    return row | {"outcome": "exact" if is_exact else "wrong"}


def main() -> None:
    """Read the cases from the command line, print their rows."""
    parser = argparse.ArgumentParser()
    parser.add_argument("tool")
    parser.add_argument("model")
    parser.add_argument("masks", nargs="+", choices=MASKS)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.set_num_threads(1)
    for mask in options.masks:
        row = run(options.tool, options.model, mask, options.seed)
        print("\n" + json.dumps({"mask": mask} | row), flush=True)


if __name__ == "__main__":
    main()
