"""How fast the exact results for one masked model are, all in one process and in turn; prints one line of JSON.

Each is made again here, in float32.  OpenVINO runs its result in an engine of its own; so for it the masked model and
the result of srfx are converted too, and the three are compared among themselves.
"""

from __future__ import annotations

import argparse
import copy
import json
import random
import statistics
import time

import torch
from torch import Tensor, fx, nn

from benchmarks.peers.cases import MASKS, prepare
from benchmarks.peers.native import native
from benchmarks.peers.tools import SINGLE, TOOLS, convert


@torch.no_grad()
def in_turn(models: dict[str, nn.Module], x: Tensor, seconds: float, least: int = 15) -> dict[str, float]:
    """Median CPU time of a forward pass of each, in milliseconds; each round in another order.

    CPU time of one thread: what else runs on the machine does not count as time, and disturbs all alike.
    """
    times: dict[str, list[float]] = {name: [] for name in models}
    names, order = list(models), random.Random(0)
    for model in models.values():
        for _ in range(3):
            model(x)
    end = time.process_time() + seconds
    turn = 0
    while turn < least or time.process_time() < end:
        order.shuffle(names)  # else each always follows the same one, whose caches it finds
        for name in names:
            start = time.process_time()
            models[name](x)
            times[name].append(1e3 * (time.process_time() - start))
        turn += 1
    return {name: statistics.median(found) for name, found in times.items()}


def contestants(model: nn.Module, x: Tensor, tools: list[str]) -> dict[str, nn.Module]:
    """The masked model, what each tool makes of it, and a dense network of the widths of ours."""
    found = {"masked": copy.deepcopy(model).float()}
    for tool in tools:
        given, value = copy.deepcopy(model), x
        if tool in SINGLE:
            given, value = given.float(), _single(x)
        found[tool] = TOOLS[tool](given, value)
        if tool != "OpenVINO":
            found[tool] = found[tool].float()
    ours = found["srfx"]
    assert isinstance(ours, fx.GraphModule)
    found["native"] = native(ours, _single(x))
    if "OpenVINO" in found:
        found["masked, OpenVINO"] = convert(found["masked"], _single(x))
        found["srfx, OpenVINO"] = convert(ours, _single(x))
    return found


def _single(x: Tensor) -> Tensor:
    return x.float() if x.is_floating_point() else x


def main() -> None:
    """Read the case from the command line, print the times."""
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    parser.add_argument("mask", choices=MASKS)
    parser.add_argument("tools", nargs="+", choices=TOOLS)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--seconds", type=float, default=5.0)
    options = parser.parse_args()
    torch.set_num_threads(1)
    model, x = prepare(options.model, options.mask, options.seed)
    models = contestants(model, x, options.tools)
    print("\n" + json.dumps(in_turn(models, _single(x), options.seconds)), flush=True)


if __name__ == "__main__":
    main()
