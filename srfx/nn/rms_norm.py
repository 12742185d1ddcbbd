"""RMS norm without its constant channels: a rescaled plain one, or CompensatedRMSNorm to emit 1/rms."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from srfx.nn import functional
from srfx.nn.layer_norm_forms import statistics_dtype
from srfx.nn.removed import pack_numbers, unpack_numbers


def resolved_rms_eps(eps: float | None, dtype: torch.dtype) -> float:
    """The eps that `F.rms_norm` uses for inputs of this dtype.

    None means the resolution of the dtype it computes in.

    Example:
        >>> resolved_rms_eps(None, torch.bfloat16) == torch.finfo(torch.float32).eps
        True
    """
    return torch.finfo(statistics_dtype(dtype)).eps if eps is None else eps


def rescale_rms_norm(
    weight: Tensor | None, eps: float, n_kept: int, n_total: int, sum_squares: float = 0.0
) -> tuple[Tensor, float]:
    """Weight and eps with which a plain RMS norm over the kept channels does what the original did.

    With s = C/K: weight' = weight sqrt(s), eps' = (eps + S2/C) s                  [exact in real arithmetic]
    (1/C) (sum_K x^2 + S2) + eps = ((1/K) sum_K x^2 + eps')/s

    Args:
        weight: of the kept channels; None for a norm without weight (the result has one, in float64).
        eps: a number; see `resolved_rms_eps` where the layer says None.
        n_kept: K.
        n_total: C, the width before removal.
        sum_squares: S2 of the removed constants.

    Returns:
        A new tensor in weight's dtype, and eps'.

    Raises:
        ValueError: sizes that do not fit together.

    Cost: O(K), computed in float64.

    Example:
        >>> weight, eps = rescale_rms_norm(torch.ones(2), 0.0, 2, 4, 6.0)
        >>> torch.nn.functional.rms_norm(torch.tensor([[3.0, 1.0]]), (2,), weight, eps)
        tensor([[1.5000, 0.5000]])
    """
    if not 0 < n_kept <= n_total or (weight is not None and weight.numel() != n_kept):
        width = None if weight is None else list(weight.shape)
        raise ValueError(
            f"rescale_rms_norm: n_kept {n_kept}, n_total {n_total} and weight {width} do not fit"
        )
    scale = n_total / n_kept
    old = torch.ones(n_kept, dtype=torch.float64) if weight is None else weight.detach()
    return (old.double() * scale**0.5).to(old.dtype), (eps + sum_squares / n_total) * scale


class CompensatedRMSNorm(nn.Module):
    """RMS norm over C channels of which only K are still there, with 1/rms as an extra channel.

    r = 1/sqrt((sum_K x^2 + S2)/C + eps),  y = x r weight, then the emitted channels  [exact in real
    arithmetic]

    A removed channel d with constant v is gone from the output too: weight[d] v r, affine in r. Where nothing
    has to be emitted a plain `nn.RMSNorm` does (`rescale_rms_norm`). S2 is a Python float, kept in the state
    dict as the int64 bits of a float64 number, for the reasons `CompensatedLayerNorm` gives.

    Args:
        n_kept: K.
        n_total: C.
        removed_sum_squares: S2.
        eps: of the original layer; None as in `nn.RMSNorm`.
        elementwise_affine: whether there is a weight.
        emits: channels appended after the K, from "r" and "one", in this order.
        outputs: which of the K channels come out, in this order; None for all.  A buffer of int32.
        device: of the weight.
        dtype: of the weight.

    Shapes: x [..., K] -> [..., K + len(emits)]; with M outputs [..., M + len(emits)], weight M.

    Raises:
        ValueError: sizes that do not fit, S2 not a finite number of at least 0, or emits other than r and
            one.

    Example:
        >>> CompensatedRMSNorm(2, 4, 6.0, eps=0.0)(torch.tensor([[3.0, 1.0]]))
        tensor([[1.5000, 0.5000, 0.5000]], grad_fn=<CatBackward0>)
    """

    weight: nn.Parameter | None
    outputs: Tensor | None

    def __init__(
        self,
        n_kept: int,
        n_total: int,
        removed_sum_squares: float = 0.0,
        *,
        eps: float | None = None,
        elementwise_affine: bool = True,
        emits: Sequence[str] = ("r",),
        outputs: Tensor | Sequence[int] | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if not 0 < n_kept <= n_total:
            raise ValueError(f"CompensatedRMSNorm: n_kept must be 1 to n_total, got {n_kept} of {n_total}")
        if not 0.0 <= removed_sum_squares < float("inf"):
            raise ValueError(
                f"CompensatedRMSNorm: removed_sum_squares is a sum of squares, got {removed_sum_squares}"
            )
        self.n_kept = n_kept
        self.n_total = n_total
        self.removed_sum_squares = float(removed_sum_squares)
        self.eps = eps
        self.emits = functional.ordered_emits(emits)
        if "mu_r" in self.emits:
            raise ValueError(f"CompensatedRMSNorm: an RMS norm has no mean, got emits={self.emits}")
        self.register_buffer("outputs", functional.stored_outputs(outputs, n_kept, len(self.emits), device))
        width = n_kept if self.outputs is None else self.outputs.numel()
        weight = torch.empty(width, device=device, dtype=dtype) if elementwise_affine else None
        self.register_parameter("weight", None if weight is None else nn.Parameter(weight))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Weight 1."""
        if self.weight is not None:
            nn.init.ones_(self.weight)

    @property
    def elementwise_affine(self) -> bool:
        """Whether there is a weight, as `nn.RMSNorm` names it."""
        return self.weight is not None

    def forward(self, x: Tensor) -> Tensor:
        """Normalise the kept channels [..., K] and append what is emitted."""
        return functional.compensated_rms_norm(
            x,
            (self.n_kept,),
            self.n_total,
            self.removed_sum_squares,
            weight=self.weight,
            eps=self.eps,
            emits=self.emits,
            outputs=self.outputs,
        )

    def get_extra_state(self) -> Tensor:
        """C and S2: float64 bits as int64 [1, 2]."""
        return pack_numbers([(self.n_total, self.removed_sum_squares)])

    def set_extra_state(self, state: object) -> None:
        """Take over what `get_extra_state` of a layer of the same sizes returned.

        Raises:
            ValueError: the state was cast or averaged, or belongs to another number of channels.
        """
        ((n_total, sum_squares),) = unpack_numbers(f"{self}", state, (1, 2))
        if n_total != self.n_total:
            raise ValueError(f"{self}: the state is of a layer with {n_total:.0f} channels in all")
        self.removed_sum_squares = sum_squares

    def extra_repr(self) -> str:
        """Kept of total, and what was compensated."""
        affine = "" if self.elementwise_affine else ", elementwise_affine=False"
        emits = f", outputs={self.outputs.numel()}" if self.outputs is not None else ""
        emits += f", emits={self.emits}" if self.emits else ""
        squares = f"removed sum of squares={self.removed_sum_squares:.6g}"
        return f"{self.n_kept} of {self.n_total}, {squares}, eps={self.eps}{emits}{affine}"
