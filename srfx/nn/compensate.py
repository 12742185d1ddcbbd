"""Remove constant channels from a norm: what replaces it, and what its linear readers absorb."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from srfx.nn.functional import ordered_emits
from srfx.nn.group_norm import CompensatedGroupNorm
from srfx.nn.layer_norm import CompensatedLayerNorm
from srfx.nn.removed import RemovedConstants
from srfx.nn.rms_norm import CompensatedRMSNorm, rescale_rms_norm, resolved_rms_eps


def compensate_layer_norm(
    norm: nn.LayerNorm | CompensatedLayerNorm,
    keep: Tensor | Sequence[int],
    constants: Tensor | Sequence[float],
    emits: Sequence[str] | None = None,
    emit_shift: float | None = None,
    axis: int = -1,
) -> CompensatedLayerNorm:
    """Remove constant channels from a layer norm.

    Composes: a compensated norm can be compensated again.

    Args:
        norm: what is there now; not changed.
        keep: indices, in increasing order, of the channels (of those norm sees now) that stay; or a boolean
            mask.
        constants: the values of the channels that go, in the order of their indices.
        emits: channels the new norm emits; None for those norm emits now.
        emit_shift: c of the emitted (mu - c) r; None for norm's own (0 for a plain layer norm).
        axis: which of several normalised axes carries the channels.

    Returns:
        A new module with parameters of its own, in norm's dtype, device, training mode and requires_grad.

    Raises:
        ValueError: keep and constants do not add up to the channels of norm, or keep is not increasing.

    Example:
        >>> small = compensate_layer_norm(nn.LayerNorm(4), [0, 2, 3], [5.0])
        >>> compensate_layer_norm(small, [0, 1], [3.0], emits=("r", "mu_r"))
        CompensatedLayerNorm(2 of 4, removed sum=8, sum of squares=34, eps=1e-05, emits=('r', 'mu_r'))
    """
    kept_shape = list(norm.normalized_shape)
    width = kept_shape[axis]
    index = _kept_index(norm, keep, width, len(constants))
    kept_shape[axis] = len(index)
    n_positions = math.prod(norm.normalized_shape) // width
    gone = RemovedConstants.from_values(constants, repeat=n_positions)
    own = norm if isinstance(norm, CompensatedLayerNorm) else None
    outputs, channels = _outputs_left(own.outputs if own else None, index)
    small = CompensatedLayerNorm(
        kept_shape,
        own.removed.merge(gone) if own else gone,
        eps=norm.eps,
        elementwise_affine=norm.weight is not None,
        bias=norm.bias is not None,
        emits=(own.emits if own else ()) if emits is None else emits,
        emit_shift=(own.emit_shift if own else 0.0) if emit_shift is None else emit_shift,
        outputs=outputs,
    )
    _take_parameters(norm, small, channels, axis)
    return small


def compensate_rms_norm(
    norm: nn.RMSNorm | CompensatedRMSNorm,
    keep: Tensor | Sequence[int],
    constants: Tensor | Sequence[float],
    emits: Sequence[str] | None = None,
    dtype: torch.dtype | None = None,
) -> nn.RMSNorm | CompensatedRMSNorm:
    """The RMS norm that is left when constant channels go: a plain one, unless an extra channel is emitted.

    Args:
        norm: what is there now, over one axis; not changed.
        keep: as in `compensate_layer_norm`.
        constants: as in `compensate_layer_norm`.
        emits: "r", "one" or nothing; None for what norm emits now.
        dtype: of the inputs; only matters for a norm with eps None, where it says which eps that is. None:
            the weight's (float32 without one).

    Returns:
        A new module with a parameter of its own. From a norm without weight, a plain result has a frozen one.

    Raises:
        ValueError: as `compensate_layer_norm`, or norm normalises several axes.

    Example:
        >>> compensate_rms_norm(nn.RMSNorm(4, eps=0.0), [0, 1], [1.0, 1.0])
        RMSNorm((2,), eps=1.0, elementwise_affine=True)
        >>> compensate_rms_norm(nn.RMSNorm(4, eps=0.0), [0, 1], [1.0, 1.0], emits=("r",))
        CompensatedRMSNorm(2 of 4, removed sum of squares=2, eps=0.0, emits=('r',))
    """
    own = norm if isinstance(norm, CompensatedRMSNorm) else None
    if own is not None:
        width, n_total, squares = own.n_kept, own.n_total, own.removed_sum_squares
    else:
        shape = norm.normalized_shape
        if not isinstance(shape, tuple) or len(shape) != 1:
            raise ValueError(f"compensate_rms_norm: {norm} must normalise one axis")
        width, n_total, squares = shape[0], shape[0], 0.0
    index = _kept_index(norm, keep, width, len(constants))
    squares += RemovedConstants.from_values(constants).sum_squares
    names = ordered_emits((own.emits if own else ()) if emits is None else emits)
    affine = norm.weight is not None
    outputs, channels = _outputs_left(own.outputs if own else None, index)
    if names or outputs is not None:
        small = CompensatedRMSNorm(
            len(index),
            n_total,
            squares,
            eps=norm.eps,
            elementwise_affine=affine,
            emits=names,
            outputs=outputs,
        )
        _take_parameters(norm, small, channels, -1)
        return small
    old = norm.weight
    stat_dtype = dtype or (old.dtype if old is not None else torch.float32)
    kept = None if old is None else old.detach().index_select(0, index.to(old.device))
    eps = resolved_rms_eps(norm.eps, stat_dtype)
    weight, eps = rescale_rms_norm(kept, eps, len(index), n_total, squares)
    plain = nn.RMSNorm(len(index), eps=eps)
    plain.weight = nn.Parameter(
        weight.to(stat_dtype) if old is None else weight, requires_grad=old is not None and old.requires_grad
    )
    return plain.train(norm.training)


def compensate_group_norm(
    norm: nn.GroupNorm | CompensatedGroupNorm,
    keep: Tensor | Sequence[int],
    constants: Tensor | Sequence[float],
) -> CompensatedGroupNorm:
    """The group norm that is left when constant channels go. Composes, as `compensate_layer_norm` does.

    Args:
        norm: what is there now; not changed.
        keep: as in `compensate_layer_norm`.
        constants: as in `compensate_layer_norm`.

    Returns:
        A new module with parameters of its own.

    Raises:
        ValueError: as `compensate_layer_norm`.

    Example:
        >>> compensate_group_norm(nn.GroupNorm(2, 4), [0, 2, 3], [5.0])
        CompensatedGroupNorm(3 of 4, 2 groups keeping 1 to 2 of 2, removed sum=5, eps=1e-05)
    """
    if isinstance(norm, CompensatedGroupNorm):
        groups, before = norm.group_index.cpu(), norm.removed
    else:
        groups = torch.arange(norm.num_channels) // (norm.num_channels // norm.num_groups)
        before = (RemovedConstants(),) * norm.num_groups
    index = _kept_index(norm, keep, len(groups), len(constants))
    values = torch.as_tensor(constants, dtype=torch.float64, device="cpu")
    is_gone = torch.ones(len(groups), dtype=torch.bool).index_fill(0, index, False)
    removed = [
        gone.merge(RemovedConstants.from_values(values[groups[is_gone] == g]))
        for g, gone in enumerate(before)
    ]
    small = CompensatedGroupNorm(groups[index], removed, eps=norm.eps, affine=norm.affine)
    _take_parameters(norm, small, index, 0)
    return small


@dataclass(frozen=True)
class AbsorbedColumns:
    """What a linear reader W needs in place of the columns of removed channels behind a norm.

    sum_D W[:, d] y[d] = r column_r + (mu - shift) r column_mu_r + bias. A column is None when it vanishes:
    that channel need not be emitted. Shapes: all [C_out, ...] (taps of a convolution behind), float64.
    """

    r: Tensor | None
    mu_r: Tensor | None
    bias: Tensor | None


def absorbed_columns(
    columns: Tensor,
    constants: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    shift: float | None = 0.0,
) -> AbsorbedColumns:
    """Fold a reader's columns of removed channels into at most two columns and a bias.

    y[d] = gamma[d] (v[d] - mu) r + beta[d], so with any c
    r: W_D (gamma (v - c)),   mu_r: -W_D gamma,   bias: W_D beta                   [exact in real arithmetic]

    Args:
        columns: the reader's weight at the removed channels.
        constants: v, the norm's removed inputs.
        weight: gamma of the removed channels; None is 1.
        bias: beta of the removed channels; None is 0.
        shift: c, the `emit_shift` of the norm. None for an RMS norm, whose output is gamma v r + beta: no
            mu_r.

    Shapes: columns [C_out, D, ...], constants, weight, bias [D].

    Returns:
        New float64 tensors; None for a column that is exactly zero. Equal constants need no r when c is their
        value.

    Source: docs/norms.md, lemma 4.

    Example:
        >>> found = absorbed_columns(torch.tensor([[1.0, 2.0]]), torch.tensor([5.0, 5.0]), shift=5.0)
        >>> found.r, found.mu_r, found.bias
        (None, tensor([[-3.]], dtype=torch.float64), None)
    """
    w = columns.detach().double().movedim(1, -1)  # [C_out, ..., D]
    v = constants.detach().to(w)
    gamma = torch.ones_like(v) if weight is None else weight.detach().to(w)
    beta = torch.zeros_like(v) if bias is None else bias.detach().to(w)

    def column(vector: Tensor) -> Tensor | None:
        total = w @ vector
        return (total.unsqueeze(1) if columns.dim() > 1 else total) if bool(total.any()) else None

    r = column(gamma * (v if shift is None else v - shift))
    mu_r = None if shift is None else column(-gamma)
    folded = column(beta)
    return AbsorbedColumns(r, mu_r, None if folded is None else folded.squeeze(1))


def _kept_index(norm: nn.Module, keep: Tensor | Sequence[int], width: int, n_constants: int) -> Tensor:
    """The kept channels as increasing indices on the CPU."""
    index = torch.as_tensor(keep).cpu()
    if index.dtype == torch.bool:
        if index.shape != (width,):
            raise ValueError(f"{norm}: keep is a mask {list(index.shape)}, the norm sees [{width}] channels")
        index = index.nonzero().flatten()
    index = index.to(torch.int64)
    if (
        index.numel() == 0
        or bool((index[1:] <= index[:-1]).any())
        or int(index[0]) < 0
        or int(index[-1]) >= width
    ):
        raise ValueError(f"{norm}: keep must be increasing indices below {width}, got {index.tolist()}")
    if index.numel() + n_constants != width:
        raise ValueError(
            f"{norm}: {index.numel()} kept and {n_constants} constants do not add up to {width} channels"
        )
    return index


def _outputs_left(outputs: Tensor | None, index: Tensor) -> tuple[Tensor | None, Tensor]:
    """Where the outputs that stay stand among the kept channels; and which of the old outputs they are."""
    if outputs is None:
        return None, index
    place = {int(channel): i for i, channel in enumerate(index)}
    left = [i for i, channel in enumerate(outputs.tolist()) if channel in place]
    return torch.tensor([place[int(outputs[i])] for i in left]), torch.tensor(left)


def _take_parameters(old: nn.Module, new: nn.Module, index: Tensor, axis: int) -> None:
    """Give new the kept part of old's parameters; dtype, device, requires_grad and mode come along."""
    for name, parameter in old.named_parameters(recurse=False):
        kept = parameter.detach().index_select(axis, index.to(parameter.device))
        setattr(new, name, nn.Parameter(kept, requires_grad=parameter.requires_grad))
        for place, buffer in list(new.named_buffers(recurse=False)):
            setattr(new, place, buffer.to(parameter.device))
    new.train(old.training)
