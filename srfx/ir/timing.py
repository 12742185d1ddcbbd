"""How long models run, measured in turn, so that what else the machine does meets all of them alike."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import torch


def one_run_s(run: Callable[[], object], device: str = "cpu") -> float:
    """Seconds of one call."""
    is_cuda = device.startswith("cuda")
    if is_cuda:
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    run()
    if is_cuda:
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def best_s(
    runs: Sequence[Callable[[], object]], device: str = "cpu", n_rounds: int = 15, limit_s: float = 3.0
) -> list[float]:
    """The least seconds of each of several calls, called in turn for ``n_rounds`` rounds, or for ``limit_s`` seconds.

    Example:
        >>> short, long = best_s([lambda: None, lambda: time.sleep(0.001)], n_rounds=3)
        >>> short < long
        True
    """
    found = [float("inf")] * len(runs)
    end = time.perf_counter() + limit_s
    for n in range(n_rounds):
        for i, run in enumerate(runs):
            found[i] = min(found[i], one_run_s(run, device))
        if n >= 2 and time.perf_counter() > end:
            break
    return found
