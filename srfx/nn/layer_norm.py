"""CompensatedLayerNorm: layer norm that remembers the constant channels it no longer sees."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from srfx.nn import functional
from srfx.nn.removed import RemovedConstants, pack_numbers, unpack_numbers


class CompensatedLayerNorm(nn.Module):
    """Layer norm over C channels of which only K are still there; the others are known constants.

    mu = (sum_K x + S1)/C,  var = (sum_K (x - mu)^2 + S2 - 2 mu S1 + (C - K) mu^2)/C,  r = 1/sqrt(var + eps)
    y = (x - mu) r weight + bias, then the emitted channels                        [exact in real arithmetic]

    S1 and S2, the sum and the sum of squares of the removed constants, are held as count, mean and M2, which
    combine without cancellation, as Python floats: not as buffers, which `.to(torch.bfloat16)` would round
    and MPS could not hold in float64. A state dict carries them as one int64 tensor (`_extra_state`, the bits
    of float64 numbers), so that no cast of the state dict rounds them and safetensors takes it. Loading a
    state dict loads them too.

    Args:
        normalized_shape: sizes of the kept part of the normalised trailing axes; K for the usual single axis.
        removed: the removed constants. `RemovedConstants.from_sums(n, S1, S2)` or, better,
            `.from_values(values)`.
        eps: of the original layer.
        elementwise_affine: whether there is a weight.
        bias: whether there is a bias too.
        emits: channels appended after the K, from "r", "mu_r" (= (mu - emit_shift) r) and "one", in this
            order.
        emit_shift: c of mu_r. With c near the removed constants, mu_r stays small, and if they all equal c, a
            reader needs no r: (v - mu) r = (v - c) r - (mu - c) r.
        outputs: which of the K channels come out, in this order; None for all.  A buffer of int32.
        device: of the parameters.
        dtype: of the parameters.

    Shapes: x [..., K] -> [..., K + len(emits)]. Weight and bias: K (normalized_shape).
        With M outputs: [..., M + len(emits)], weight and bias M.

    Raises:
        ValueError: no kept channel, unknown emits, or emits or outputs with several axes.

    Source: derived in docs/norms.md; the combination of statistics is Chan, Golub, LeVeque (1979).

    Example:
        >>> norm = nn.LayerNorm(4)
        >>> x = torch.tensor([[1.0, 5.0, 2.0, 5.0]])
        >>> small = CompensatedLayerNorm(2, RemovedConstants.from_values([5.0, 5.0]), emits=("r",))
        >>> small
        CompensatedLayerNorm(2 of 4, removed sum=10, sum of squares=50, eps=1e-05, emits=('r',))
        >>> torch.allclose(small(x[:, [0, 2]])[:, :2], norm(x)[:, [0, 2]])
        True
    """

    normalized_shape: tuple[int, ...]
    eps: float
    emits: tuple[str, ...]
    emit_shift: float
    weight: nn.Parameter | None
    bias: nn.Parameter | None
    outputs: Tensor | None

    def __init__(
        self,
        normalized_shape: int | Sequence[int],
        removed: RemovedConstants,
        *,
        eps: float = 1e-5,
        elementwise_affine: bool = True,
        bias: bool = True,
        emits: Sequence[str] = (),
        emit_shift: float = 0.0,
        outputs: Tensor | Sequence[int] | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        shape = (normalized_shape,) if isinstance(normalized_shape, int) else tuple(normalized_shape)
        if math.prod(shape) < 1:
            raise ValueError(f"CompensatedLayerNorm: at least one channel must be kept, got {shape}")
        self.normalized_shape = shape
        self.removed = removed
        self.eps = eps
        self.emits = functional.ordered_emits(emits)
        self.emit_shift = float(emit_shift)
        if (self.emits or outputs is not None) and len(shape) != 1:
            raise ValueError(
                f"CompensatedLayerNorm: emits {self.emits} and outputs need one normalised axis, got {shape}"
            )
        self.register_buffer(
            "outputs", functional.stored_outputs(outputs, shape[-1], len(self.emits), device)
        )
        if self.outputs is not None:
            shape = (self.outputs.numel(),)
        has_weight, has_bias = elementwise_affine, elementwise_affine and bias
        self.register_parameter(
            "weight", nn.Parameter(torch.empty(shape, device=device, dtype=dtype)) if has_weight else None
        )
        self.register_parameter(
            "bias", nn.Parameter(torch.empty(shape, device=device, dtype=dtype)) if has_bias else None
        )
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Weight 1, bias 0."""
        if self.weight is not None:
            nn.init.ones_(self.weight)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    @property
    def n_kept(self) -> int:
        """K."""
        return math.prod(self.normalized_shape)

    @property
    def n_total(self) -> int:
        """C."""
        return self.n_kept + self.removed.n_values

    @property
    def elementwise_affine(self) -> bool:
        """Whether there is a weight, as `nn.LayerNorm` names it."""
        return self.weight is not None

    def forward(self, x: Tensor) -> Tensor:
        """Normalise the kept channels [..., K] and append what is emitted."""
        return functional.compensated_layer_norm(
            x,
            self.normalized_shape,
            self.n_total,
            self.removed.mean,
            self.removed.m2,
            weight=self.weight,
            bias=self.bias,
            eps=self.eps,
            emits=self.emits,
            emit_shift=self.emit_shift,
            outputs=self.outputs,
        )

    def get_extra_state(self) -> Tensor:
        """Count, mean and M2 of the removed constants, and emit_shift: float64 bits as int64 [1, 4]."""
        return pack_numbers([(self.removed.n_values, self.removed.mean, self.removed.m2, self.emit_shift)])

    def set_extra_state(self, state: object) -> None:
        """Take over what `get_extra_state` of a layer with equally many removed channels returned.

        Raises:
            ValueError: the state was cast or averaged, or belongs to another number of removed channels.
        """
        ((n_values, mean, m2, shift),) = unpack_numbers(f"{self}", state, (1, 4))
        if n_values != self.removed.n_values:
            raise ValueError(f"{self}: the state is of a layer with {n_values:.0f} removed channels")
        self.removed = RemovedConstants(int(n_values), mean, m2)
        self.emit_shift = shift

    def extra_repr(self) -> str:
        """Kept of total, and what was compensated."""
        kept = f"{self.n_kept}" if len(self.normalized_shape) == 1 else f"{list(self.normalized_shape)}"
        parts = [
            f"{kept} of {self.n_total}",
            f"removed sum={self.removed.sum:.6g}",
            f"sum of squares={self.removed.sum_squares:.6g}",
            f"eps={self.eps:g}",
        ]
        if self.outputs is not None:
            parts.append(f"outputs={self.outputs.numel()}")
        if self.emits:
            parts.append(f"emits={self.emits}")
        if self.emit_shift != 0.0:
            parts.append(f"emit_shift={self.emit_shift:.6g}")
        if self.weight is None:
            parts.append("elementwise_affine=False")
        elif self.bias is None:
            parts.append("bias=False")
        return ", ".join(parts)
