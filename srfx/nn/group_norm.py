"""CompensatedGroupNorm: group norm whose groups lost constant channels, not necessarily equally many."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from srfx.nn import functional
from srfx.nn.removed import RemovedConstants, pack_numbers, unpack_numbers


class CompensatedGroupNorm(nn.Module):
    """Group norm over groups of C/G channels of which some, being constants, are no longer there.

    Per group the statistics of all C/G channels, as in `CompensatedLayerNorm`; a removed channel has its
    constant at every position. Groups may keep unequal numbers of channels, or none.                 [exact
    in real arithmetic]

    The removed constants are Python floats, kept in the state dict as the int64 bits of float64 numbers, for
    the reasons `CompensatedLayerNorm` gives. The group of each channel is an int64 buffer.

    Args:
        group_index: the group of each kept channel.
        removed: per group the removed constants, `n_values` counting channels; every group must add up to
            C/G.
        eps: of the original layer.
        affine: whether there are weight and bias.
        device: of the parameters and the buffer.
        dtype: of the parameters.

    Shapes: x [N, K, ...] -> the same; weight, bias [K].

    Raises:
        ValueError: no kept channel, a group index out of range, or groups of unequal original size.

    Example:
        >>> none, gone = RemovedConstants(), RemovedConstants.from_values([4.0])
        >>> norm = CompensatedGroupNorm([0, 1, 1], [gone, none])
        >>> norm
        CompensatedGroupNorm(3 of 4, 2 groups keeping 1 to 2 of 2, removed sum=4, eps=1e-05)
        >>> norm(torch.tensor([[[1.0], [2.0], [7.0]]])).shape
        torch.Size([1, 3, 1])
    """

    group_index: Tensor
    weight: nn.Parameter | None
    bias: nn.Parameter | None

    def __init__(
        self,
        group_index: Sequence[int] | Tensor,
        removed: Sequence[RemovedConstants],
        *,
        eps: float = 1e-5,
        affine: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        index: list[int] = group_index.tolist() if isinstance(group_index, Tensor) else list(group_index)
        if not index or min(index) < 0 or max(index) >= len(removed):
            raise ValueError(
                f"CompensatedGroupNorm: group_index needs entries 0 to {len(removed) - 1}, got {index}"
            )
        self.removed = tuple(removed)
        self.n_kept_per_group = tuple(Counter(index)[g] for g in range(len(removed)))
        sizes = {n + gone.n_values for n, gone in zip(self.n_kept_per_group, removed, strict=True)}
        if len(sizes) != 1:
            raise ValueError(f"CompensatedGroupNorm: groups must have one original size, got {sorted(sizes)}")
        self.group_size = sizes.pop()
        self.eps = eps
        self.affine = affine
        self.register_buffer("group_index", torch.tensor(index, dtype=torch.int64, device=device))
        for name in ("weight", "bias"):
            parameter = nn.Parameter(torch.empty(len(index), device=device, dtype=dtype)) if affine else None
            self.register_parameter(name, parameter)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Weight 1, bias 0."""
        if self.weight is not None and self.bias is not None:
            nn.init.ones_(self.weight)
            nn.init.zeros_(self.bias)

    @property
    def n_groups(self) -> int:
        """G."""
        return len(self.removed)

    @property
    def n_kept(self) -> int:
        """K."""
        return sum(self.n_kept_per_group)

    @property
    def n_total(self) -> int:
        """C."""
        return self.group_size * self.n_groups

    def forward(self, x: Tensor) -> Tensor:
        """Normalise the kept channels [N, K, ...]."""
        return functional.compensated_group_norm(
            x,
            self.group_index,
            self.group_size,
            tuple(gone.mean for gone in self.removed),
            tuple(gone.m2 for gone in self.removed),
            weight=self.weight,
            bias=self.bias,
            eps=self.eps,
        )

    def get_extra_state(self) -> Tensor:
        """Count, mean and M2 per group: float64 bits as int64 [G, 3]."""
        return pack_numbers((gone.n_values, gone.mean, gone.m2) for gone in self.removed)

    def set_extra_state(self, state: object) -> None:
        """Take over what `get_extra_state` of a layer with the same groups returned.

        Raises:
            ValueError: the state was cast or averaged, or the groups lost other numbers of channels.
        """
        rows = unpack_numbers(f"{self}", state, (self.n_groups, 3))
        loaded = tuple(RemovedConstants(int(n_values), mean, m2) for n_values, mean, m2 in rows)
        if [gone.n_values for gone in loaded] != [gone.n_values for gone in self.removed]:
            raise ValueError(
                f"{self}: the state removes {[gone.n_values for gone in loaded]} channels of the groups"
            )
        self.removed = loaded

    def extra_repr(self) -> str:
        """Kept of total, and what was compensated."""
        low, high = min(self.n_kept_per_group), max(self.n_kept_per_group)
        keeping = f"{low}" if low == high else f"{low} to {high}"
        total = sum(gone.sum for gone in self.removed)
        affine = "" if self.affine else ", affine=False"
        return (
            f"{self.n_kept} of {self.n_total}, {self.n_groups} groups keeping {keeping} of "
            f"{self.group_size}, removed sum={total:.6g}, eps={self.eps:g}{affine}"
        )
