"""Where the numbers of a program come from: chance, a recorded sequence, or Hypothesis."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import TypeVar

T = TypeVar("T")


class Choices:
    """A source of choices that writes down what it chose; 0 is always the simplest.

    Args:
        source: gives a number from 0 to n - 1.

    Example:
        >>> c = Choices.of_seed(3)
        >>> drawn = [c.below(5), c.pick("abc"), c.flag(0.5)]
        >>> again = Choices.replay(c.made)
        >>> [again.below(5), again.pick("abc"), again.flag(0.5)] == drawn
        True
    """

    def __init__(self, source: Callable[[int], int]) -> None:
        self._source = source
        self.made: list[int] = []

    @classmethod
    def of_seed(cls, seed: int) -> Choices:
        """Independent choices."""
        return cls(random.Random(seed).randrange)

    @classmethod
    def replay(cls, made: Sequence[int]) -> Choices:
        """The choices of a recorded sequence; whatever is too large is cut, whatever is missing is 0."""
        rest = iter(made)
        return cls(lambda n: min(next(rest, 0), n - 1))

    def below(self, n: int) -> int:
        """A number from 0 to n - 1."""
        if n < 2:
            return 0
        found = self._source(n)
        self.made.append(found)
        return found

    def between(self, low: int, high: int) -> int:
        """A number from low to high, both included."""
        return low + self.below(high - low + 1)

    def pick(self, options: Sequence[T]) -> T:
        """One of the options; the first is the simplest."""
        return options[self.below(len(options))]

    def flag(self, chance: float = 0.5) -> bool:
        """True with about this chance."""
        return self.below(20) >= 20 - round(20 * chance)

    def subset(self, n: int, most: int) -> list[int]:
        """At most ``most`` of the positions 0 .. n - 1, in order."""
        found = {self.below(n) for _ in range(self.below(most + 1))}
        return sorted(found)


def shrink(made: Sequence[int], fails: Callable[[list[int]], bool], budget: int = 300) -> list[int]:
    """A shorter and smaller sequence of choices on which ``fails`` is true still.

    Args:
        made: a failing sequence.
        fails: whether a sequence fails in the same way.
        budget: how many sequences are tried at most.
    """
    best, tries = list(made), 0
    while best and best[-1] == 0:
        best.pop()
    size = max(1, len(best) // 2)
    while size and tries < budget:
        start, changed = 0, False
        while start < len(best) and tries < budget:
            for new in _smaller(best, start, size):
                tries += 1
                if fails(new):
                    best, changed = new, True
                    break
            else:
                start += size
        if not changed:
            size //= 2
    return best


def _smaller(best: list[int], start: int, size: int) -> list[list[int]]:
    found = [best[:start] + best[start + size :]]
    if any(best[start : start + size]):
        found.append(best[:start] + [0] * len(best[start : start + size]) + best[start + size :])
    if size == 1 and best[start] > 1:
        found.append([*best[:start], best[start] // 2, *best[start + 1 :]])
    return found
