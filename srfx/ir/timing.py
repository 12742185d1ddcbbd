"""How long models run, measured in turn, so that what else the machine does meets all of them alike."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence

import torch


def one_run_s(run: Callable[[], object], device: str = "cpu") -> float:
    """Seconds of one call; of the processor, where this thread does all the work: others do not count then."""
    is_cuda = device.startswith("cuda")
    clock = time.thread_time if device == "cpu" and torch.get_num_threads() == 1 else time.perf_counter
    if is_cuda:
        torch.cuda.synchronize(device)
    start = clock()
    run()
    if is_cuda:
        torch.cuda.synchronize(device)
    return clock() - start


def turns_s(
    runs: Sequence[Callable[[], object]], device: str = "cpu", n_rounds: int = 15, limit_s: float = 3.0
) -> list[list[float]]:
    """Seconds of each call in each turn: ``n_rounds`` of them, or until all calls took ``limit_s``, at least three.

    Every other turn goes backwards, so that none always follows the same one.
    """
    found: list[list[float]] = []
    while len(found) < 3 or (len(found) < n_rounds and sum(map(sum, found)) < limit_s):
        order = range(len(runs)) if len(found) % 2 == 0 else reversed(range(len(runs)))
        turn = {i: one_run_s(runs[i], device) for i in order}
        found.append([turn[i] for i in range(len(runs))])
    return found


def best_s(
    runs: Sequence[Callable[[], object]], device: str = "cpu", n_rounds: int = 15, limit_s: float = 3.0
) -> list[float]:
    """The least seconds of each of several calls, called in turn (`turns_s`).

    Example:
        >>> short, long = best_s([lambda: None, lambda: sum(range(100_000))], n_rounds=3)
        >>> short < long
        True
    """
    return [min(times) for times in zip(*turns_s(runs, device, n_rounds, limit_s), strict=True)]


def is_faster(turns: Sequence[Sequence[float]], share: float) -> bool:
    """Whether the second of two calls took at most ``share`` of the time of the first: least times, and median of turns.

    What else the machine does spoils single times, and meets both calls of a turn alike.

    Example:
        >>> is_faster([[1.0, 0.9], [1.1, 0.9], [1.2, 1.3]], 0.95)
        True
    """
    first, second = (min(times) for times in zip(*turns, strict=True))
    return second <= share * first and statistics.median(b / a for a, b in turns) <= share
