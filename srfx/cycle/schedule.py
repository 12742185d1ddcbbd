"""Numbers that change from cycle to cycle."""

from __future__ import annotations

from collections.abc import Callable, Sequence

Schedule = float | Sequence[float] | Callable[[int], float]
"""A number, one number for each cycle (the last one goes on), or a function of the cycle's number, from 1."""


def at(schedule: Schedule, cycle: int) -> float:
    """The value of a schedule in a cycle.

    Example:
        >>> at(0.5, 3), at([0.1, 0.2], 3), at(lambda cycle: 0.1 * cycle, 2)
        (0.5, 0.2, 0.2)
    """
    if callable(schedule):
        return float(schedule(cycle))
    if isinstance(schedule, Sequence):
        return float(schedule[min(cycle, len(schedule)) - 1])
    return float(schedule)
