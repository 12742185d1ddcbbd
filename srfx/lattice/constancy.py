"""The constancy lattice: unreached < constant k < varies, one element per channel; join is pointwise.

A fact is a pair of tensors with the rank of the value it describes; axes that carry no channels have size 1
(both tensors only have to broadcast to each other).  The value of a varying channel is stored as 0.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Affine:
    """Channels along ``axis`` that vary, but only as a known combination of a norm's own statistics.

    y[c] = scale[c] (value[c] - mu) r + offset[c]   where ``mask``[c]; without mu unless ``centred``

    A linear reader can take r and (mu - shift) r in their place, for any number ``shift`` (theory: Lemma N3).
    ``bordered``: zero padding has been put around y since, so that its constant part is not a bias any more.
    """

    norm: Hashable
    axis: int
    mask: Tensor  # [C] bool
    value: Tensor  # [C] float64, what the norm sees
    scale: Tensor  # [C] float64
    offset: Tensor  # [C] float64
    sources: Tensor  # [C] label of the channel that the norm sees, 0 where there is none
    centred: bool = True
    bordered: bool = False

    def coefficients(self, shift: float) -> Tensor:
        """Of r, (mu - shift) r and 1 in each channel, [3, C]; rows in the order of `EMITS`."""
        mean = -self.scale if self.centred else torch.zeros_like(self.scale)
        return torch.stack([self.scale * (self.value - shift), mean, self.offset])


EMITS = ("r", "mu_r", "one")
"""The statistics of a norm, in the order in which it appends them."""


@dataclass(frozen=True)
class Constancy:
    """Which channels vary, and the value of those that do not (float64, or the parameter itself).

    ``affine`` refines some of the varying channels, and ``sums_to_one`` names an axis along which the value sums to
    one; whoever does not know them may ignore them.
    """

    varies: Tensor
    value: Tensor
    affine: Affine | None = None
    sums_to_one: int | None = None

    @classmethod
    def top(cls, rank: int) -> Constancy:
        """Every channel varies."""
        return cls(torch.ones((1,) * rank, dtype=torch.bool), torch.zeros((1,) * rank, dtype=torch.float64))

    @classmethod
    def known(cls, value: Tensor) -> Constancy:
        """Every element is known: a parameter, or something computed from parameters alone."""
        return cls(torch.zeros((1,) * value.dim(), dtype=torch.bool, device=value.device), value)

    @property
    def is_known(self) -> bool:
        """Whether no channel varies."""
        return not bool(self.varies.any())

    def is_constant(self, k: float) -> Tensor:
        """Channels that are the constant k, bool of the joint layout."""
        return ~self.varies & (self.value == k)

    def nonzero(self) -> Tensor:
        """Channels that are a constant other than 0."""
        return ~self.varies & (self.value != 0)

    def leq(self, other: Constancy) -> bool:
        """Whether this fact says at least as much as ``other`` (lies below it)."""
        same = ~self.varies & ~other.varies & (self.value == other.value)
        return bool((other.varies | same).all())

    def join(self, other: Constancy) -> Constancy:
        """The least fact above both: constant where both are the same constant."""
        varies = self.varies | other.varies | (self.value != other.value)
        return Constancy(varies, torch.where(varies, 0, self.value))

    def settle(self, axes: Iterable[int]) -> Constancy:
        """Keep only ``axes`` apart: along every other axis a channel is constant iff it is uniform and finite."""
        varies, value, keep = self.varies, self.value, set(axes)
        for axis in range(value.dim()):
            if axis in keep:
                continue
            if value.shape[axis] > 1:
                first = value.narrow(axis, 0, 1)
                varies = varies | (value != first).any(axis, keepdim=True)
                value = first
            if varies.shape[axis] > 1:
                varies = varies.any(axis, keepdim=True)
        if value.is_floating_point():
            varies = varies | ~torch.isfinite(value)
        affine = self.affine if self.affine is not None and self.affine.axis in keep else None
        return Constancy(varies, torch.where(varies, 0, value), affine, self.sums_to_one)
