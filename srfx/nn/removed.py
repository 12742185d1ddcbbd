"""What a normalisation layer has to remember about the constant channels it lost.

The three numbers kept are the count, the mean and M2 = sum of squared deviations from that mean. Sum and sum
of squares say the same, but the variance they imply, S2 - S1^2/n, cancels: sixteen constants near 1000 leave
four correct digits of it. Mean and M2 are combined with the kept channels by a sum of non-negative terms
(`docs/norms.md`, lemma 1).
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class RemovedConstants:
    """Count, mean and sum of squared deviations of constants that are gone from a normalised population.

    Args:
        n_values: how many values are gone; at least 0.
        mean: their mean; 0 when there are none.
        m2: the sum of their squared deviations from `mean`; at least 0.

    Raises:
        ValueError: a negative count or M2, a number that is not finite, or no values with a mean or M2 other
            than 0.

    Source: Chan, Golub, LeVeque (1979), "Updating formulae and a pairwise algorithm for computing sample
    variances".

    Example:
        >>> removed = RemovedConstants.from_values([1.0, 3.0])
        >>> removed
        RemovedConstants(n_values=2, mean=2.0, m2=2.0)
        >>> removed.sum, removed.sum_squares
        (4.0, 10.0)
        >>> removed.merge(RemovedConstants.from_values([2.0]))
        RemovedConstants(n_values=3, mean=2.0, m2=2.0)
    """

    n_values: int = 0
    mean: float = 0.0
    m2: float = 0.0

    def __post_init__(self) -> None:
        if self.n_values < 0:
            raise ValueError(f"RemovedConstants: n_values must be at least 0, got {self.n_values}")
        if not (math.isfinite(self.mean) and math.isfinite(self.m2)):
            raise ValueError(
                f"RemovedConstants: constants must be finite, got mean {self.mean}, m2 {self.m2}"
            )
        if self.m2 < 0.0:
            raise ValueError(f"RemovedConstants: m2 is a sum of squares, got {self.m2}")
        if self.n_values == 0 and (self.mean != 0.0 or self.m2 != 0.0):
            raise ValueError(f"RemovedConstants: no values, yet mean {self.mean} and m2 {self.m2}")

    @classmethod
    def from_values(cls, values: Tensor | Iterable[float], repeat: int = 1) -> RemovedConstants:
        """Summarise constants, exactly rounded (`math.fsum`).

        Args:
            values: the constants; a tensor is read in float64.
            repeat: how often each value occurs (a norm over several axes sees a channel at many positions).
        """
        numbers: list[float] = (
            values.detach().double().flatten().tolist()
            if isinstance(values, Tensor)
            else [float(v) for v in values]
        )
        if not numbers:
            return cls()
        if not all(math.isfinite(v) for v in numbers):
            raise ValueError(f"RemovedConstants: constants must be finite, got {numbers}")
        mean = math.fsum(numbers) / len(numbers)
        m2 = math.fsum((v - mean) ** 2 for v in numbers)
        return cls(len(numbers) * repeat, mean, m2 * repeat)

    @classmethod
    def from_sums(cls, n_values: int, sum: float, sum_squares: float) -> RemovedConstants:
        """Build from S1 and S2.

        Prefer `from_values`: M2 = S2 - S1^2/n loses digits when the constants are nearly equal.

        Raises:
            ValueError: S2 is smaller than S1^2/n by more than rounding, so no such constants exist.

        Example:
            >>> RemovedConstants.from_sums(2, 4.0, 10.0)
            RemovedConstants(n_values=2, mean=2.0, m2=2.0)
        """
        if n_values == 0:
            return cls(0, sum, sum_squares)
        mean = sum / n_values
        m2 = sum_squares - sum * mean
        if m2 < -1e-12 * abs(sum_squares) - 1e-300:
            raise ValueError(
                f"RemovedConstants: {n_values} values with sum {sum} cannot have sum of squares {sum_squares}"
            )
        return cls(n_values, mean, max(m2, 0.0))

    @property
    def sum(self) -> float:
        """S1, the sum of the constants."""
        return self.n_values * self.mean

    @property
    def sum_squares(self) -> float:
        """S2, the sum of the squares of the constants."""
        return self.m2 + self.n_values * self.mean**2

    def merge(self, other: RemovedConstants) -> RemovedConstants:
        """The summary of both populations together."""
        if self.n_values == 0 or other.n_values == 0:
            return other if self.n_values == 0 else self
        n_values = self.n_values + other.n_values
        delta = other.mean - self.mean
        mean = (self.n_values * self.mean + other.n_values * other.mean) / n_values
        m2 = self.m2 + other.m2 + delta**2 * (self.n_values * other.n_values / n_values)
        return RemovedConstants(n_values, mean, m2)


def pack_numbers(rows: Iterable[Iterable[float]]) -> Tensor:
    """Float64 numbers as the int64 tensor of their bits, for `get_extra_state`.

    Integers survive what happens to a state dict on its way: a loader that casts floating tensors to
    bfloat16, a device without float64 (MPS), safetensors (which refuses anything but tensors).

    Returns: int64 [rows, columns].
    """
    return torch.tensor([list(row) for row in rows], dtype=torch.float64).view(torch.int64)


def unpack_numbers(owner: str, packed: object, shape: tuple[int, int]) -> list[list[float]]:
    """The numbers behind `pack_numbers`.

    Raises:
        ValueError: not an int64 tensor of `shape`; something averaged or cast the state dict.
    """
    if not isinstance(packed, Tensor) or packed.dtype != torch.int64 or tuple(packed.shape) != shape:
        got = f"{packed.dtype} {list(packed.shape)}" if isinstance(packed, Tensor) else type(packed).__name__
        raise ValueError(
            f"{owner}: extra state must be int64 {list(shape)} (the bits of float64 numbers), got {got}; "
            "was the state dict averaged, cast, or saved from a layer of another structure?"
        )
    numbers: list[list[float]] = packed.cpu().contiguous().view(torch.float64).tolist()
    return numbers
