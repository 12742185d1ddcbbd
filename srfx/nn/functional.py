"""Compensated normalisation as functions.

Each is one node in a `torch.fx.symbolic_trace`, however it was imported: like the functions of
`torch.nn.functional` they hand a call on an fx Proxy (or a tensor subclass) to `__torch_function__`.
torch.compile and torch.export see through them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function

from srfx.nn.layer_norm_forms import Population, is_eager, normalise, statistics_dtype
from srfx.nn.selection import select

EMITTABLE = ("r", "mu_r", "one")


def ordered_emits(emits: Sequence[str]) -> tuple[str, ...]:
    """The names in their fixed order.

    Raises:
        ValueError: an unknown or repeated name.

    Example:
        >>> ordered_emits(("mu_r", "r"))
        ('r', 'mu_r')
    """
    unknown = [name for name in emits if name not in EMITTABLE]
    if unknown or len(set(emits)) != len(emits):
        raise ValueError(f"emits must be distinct names out of {EMITTABLE}, got {tuple(emits)}")
    return tuple(name for name in EMITTABLE if name in emits)


def stored_outputs(
    outputs: Tensor | Sequence[int] | None, n_kept: int, n_emitted: int, device: torch.device | str | None
) -> Tensor | None:
    """Positions of the channels that come out as a norm keeps them, int32; none if its readers take statistics alone.

    Raises:
        ValueError: nothing comes out at all, or one is not among the kept channels.

    Example:
        >>> stored_outputs([0, 2], 3, 0, None)
        tensor([0, 2], dtype=torch.int32)
    """
    if outputs is None:
        return None
    index = torch.as_tensor(outputs).to(device=device, dtype=torch.int32)
    if index.dim() != 1 or not index.numel() + n_emitted or bool(((index < 0) | (index >= n_kept)).any()):
        raise ValueError(
            f"outputs are positions below {n_kept}, at least one where nothing is emitted, got {index.tolist()}"
        )
    return index


def compensated_layer_norm(
    x: Tensor,
    normalized_shape: Sequence[int],
    n_total: int,
    removed_mean: float = 0.0,
    removed_m2: float = 0.0,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    emits: Sequence[str] = (),
    emit_shift: float = 0.0,
    outputs: Tensor | None = None,
) -> Tensor:
    """Layer norm over channels of which some, being constants, are no longer there.

    mu = (sum_K x + S1)/C,  var = (sum_K (x - mu)^2 + S2 - 2 mu S1 + (C - K) mu^2)/C,  r = 1/sqrt(var + eps)
    y = (x - mu) r weight + bias                                                   [exact in real arithmetic]

    with S1 = n removed_mean, S2 = removed_m2 + n removed_mean^2, n = C - K; never computed in this form,
    which cancels.

    Args:
        x: the kept channels, last.
        normalized_shape: (K,); longer when several trailing axes are normalised, whose kept part it gives.
        n_total: C, the width before removal; the number of elements when several axes are normalised.
        removed_mean: mean of the removed constants.
        removed_m2: sum of their squared deviations from that mean.
        weight: scale of the kept channels.
        bias: shift of the kept channels.
        eps: of the original layer.
        emits: channels to append, in the order r, mu_r = (mu - emit_shift) r, one.
        emit_shift: a number near the removed constants keeps mu_r small, so that readers in half precision
            lose nothing.
        outputs: which of the K channels come out, in this order; all by default.  Weight and bias are theirs.

    Shapes: x [..., K], weight [K], bias [K] -> [..., K + len(emits)]; several axes x [..., K1, K2].
        With outputs [M]: weight [M], bias [M] -> [..., M + len(emits)].

    Returns:
        A tensor in x's dtype. Statistics are float32 (float64 for float64).

    Raises:
        ValueError: x does not end in normalized_shape, unknown emits, or emits or outputs with several axes.

    Cost: eager CPU 1.4 to 2.5 times F.layer_norm of width K; compiled 1.1 to 1.2 (docs/norms.md).

    Example:
        >>> full = torch.tensor([[1.0, 5.0, 2.0, 5.0]])
        >>> kept = full[:, [0, 2]]
        >>> torch.allclose(
        ...     compensated_layer_norm(kept, (2,), 4, removed_mean=5.0),
        ...     torch.nn.functional.layer_norm(full, (4,))[:, [0, 2]],
        ... )
        True
    """
    tensors = tuple(t for t in (x, weight, bias, outputs) if t is not None)
    if has_torch_function(tensors):
        traced: Tensor = handle_torch_function(
            compensated_layer_norm,
            tensors,
            x,
            tuple(normalized_shape),
            n_total,
            removed_mean,
            removed_m2,
            weight=weight,
            bias=bias,
            eps=eps,
            emits=tuple(emits),
            emit_shift=emit_shift,
            outputs=outputs,
        )
        return traced
    of = _known_population if is_eager() else _population
    population = of(tuple(normalized_shape), n_total, removed_mean, removed_m2, eps, tuple(emits), emit_shift)
    kept_shape = population.kept_shape
    if x.shape[-len(kept_shape) :] != kept_shape:
        raise ValueError(
            f"compensated_layer_norm: x must end in normalized_shape {list(kept_shape)}, got {list(x.shape)}"
        )
    if outputs is not None and len(kept_shape) != 1:
        raise ValueError(f"compensated_layer_norm: outputs need one normalised axis, got {list(kept_shape)}")
    return normalise(x, weight, bias, population, outputs)


def _population(
    kept_shape: tuple[int, ...],
    n_total: int,
    mean: float,
    m2: float,
    eps: float,
    emits: tuple[str, ...],
    shift: float,
) -> Population:
    """The numbers of a call, checked."""
    names = ordered_emits(emits)
    if not 0 < math.prod(kept_shape) <= n_total:
        raise ValueError(
            f"compensated_layer_norm: normalized_shape {list(kept_shape)} must have 1 to {n_total} elements"
        )
    if names and len(kept_shape) != 1:
        raise ValueError(
            f"compensated_layer_norm: emits {names} need one normalised axis, got {list(kept_shape)}"
        )
    return Population(kept_shape, n_total, mean, m2, eps, names, shift)


# Dynamo warns of caches, so only eager calls go this way.
_known_population = lru_cache(maxsize=4096)(_population)


def compensated_rms_norm(
    x: Tensor,
    normalized_shape: Sequence[int],
    n_total: int,
    removed_sum_squares: float = 0.0,
    weight: Tensor | None = None,
    eps: float | None = None,
    emits: Sequence[str] = (),
    outputs: Tensor | None = None,
) -> Tensor:
    """RMS norm without its constant channels, with 1/rms as an extra channel.

    r = 1/sqrt((sum_K x^2 + S2)/C + eps),  y = x r weight                          [exact in real arithmetic]

    Without extra channels use `torch.nn.functional.rms_norm` with what `rescale_rms_norm` returns.

    Args:
        x: the kept channels, last.
        normalized_shape: (K,).
        n_total: C, the width before removal.
        removed_sum_squares: S2.
        weight: scale of the kept channels.
        eps: of the original layer; None is F.rms_norm's default, the resolution of the statistics' dtype.
        emits: channels to append out of r, one.
        outputs: which of the K channels come out, in this order; all by default.  The weight is theirs.

    Shapes: x [..., K], weight [K] -> [..., K + len(emits)]; with outputs [M]: weight [M] -> [..., M + len(emits)].

    Raises:
        ValueError: x does not end in normalized_shape, or emits other than r and one.

    Example:
        >>> compensated_rms_norm(torch.tensor([[3.0, 1.0]]), (2,), 4, 6.0, eps=0.0, emits=("r",))
        tensor([[1.5000, 0.5000, 0.5000]])
    """
    tensors = tuple(t for t in (x, weight, outputs) if t is not None)
    if has_torch_function(tensors):
        traced: Tensor = handle_torch_function(
            compensated_rms_norm,
            tensors,
            x,
            tuple(normalized_shape),
            n_total,
            removed_sum_squares,
            weight=weight,
            eps=eps,
            emits=tuple(emits),
            outputs=outputs,
        )
        return traced
    names = ordered_emits(emits)
    if "mu_r" in names:
        raise ValueError("compensated_rms_norm: an RMS norm has no mean, emits can be r and one")
    if x.shape[-1:] != tuple(normalized_shape) or not 0 < x.shape[-1] <= n_total:
        raise ValueError(
            f"compensated_rms_norm: x must end in normalized_shape {list(normalized_shape)}, one axis of at "
            f"most {n_total}, got {list(x.shape)}"
        )
    stat = statistics_dtype(x.dtype)
    xs = x.to(stat)
    floor = removed_sum_squares / n_total + (torch.finfo(stat).eps if eps is None else eps)
    r = torch.rsqrt((xs * xs).sum(-1, keepdim=True) / n_total + floor)
    y = (xs if outputs is None else select(xs, -1, outputs)) * r
    if weight is not None:
        y = y * weight
    channels = {"r": r, "one": torch.ones_like(r)}
    parts = [y.to(x.dtype), *(channels[name].to(x.dtype) for name in names)]
    return torch.cat(parts, dim=-1) if names else parts[0]


def compensated_group_norm(
    x: Tensor,
    group_index: Tensor,
    group_size: int,
    removed_mean: Sequence[float],
    removed_m2: Sequence[float],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    """Group norm in which every group may have lost another number of constant channels.

    A constant channel has its value at every position, so per position a group's statistics are those of
    layer norm: mean, between-channel and within-channel variance of the kept, joined with the removed
    [exact in real arithmetic]

    Args:
        x: the kept channels on axis 1.
        group_index: the group of each kept channel, 0 to n_groups - 1, in any order.
        group_size: C/G, channels of each group before removal.
        removed_mean: per group the mean of its removed constants; 0 if none.
        removed_m2: per group the sum over its removed channels of their squared deviations from that mean.
        weight: scale of the kept channels.
        bias: shift of the kept channels.
        eps: of the original layer.

    Shapes: x [N, K, ...], group_index [K], removed_mean and removed_m2 G long, weight [K], bias [K] -> as x.

    Returns:
        A tensor in x's dtype. Statistics are float32 (float64 for float64).

    Raises:
        ValueError: sizes that do not fit together.

    Cost: about five passes over x in eager mode; one fused loop for the statistics when compiled.

    Example:
        >>> full = torch.tensor([[[1.0], [4.0], [2.0], [7.0]]])
        >>> y = compensated_group_norm(full[:, [0, 2, 3]], torch.tensor([0, 1, 1]), 2, (4.0, 0.0), (0.0, 0.0))
        >>> torch.allclose(y, torch.nn.functional.group_norm(full, 2)[:, [0, 2, 3]])
        True
    """
    tensors = tuple(t for t in (x, group_index, weight, bias) if t is not None)
    if has_torch_function(tensors):
        traced: Tensor = handle_torch_function(
            compensated_group_norm,
            tensors,
            x,
            group_index,
            group_size,
            tuple(removed_mean),
            tuple(removed_m2),
            weight=weight,
            bias=bias,
            eps=eps,
        )
        return traced
    n_groups = len(removed_mean)
    if x.dim() < 2 or x.shape[1] != group_index.shape[0] or len(removed_m2) != n_groups:
        raise ValueError(
            f"compensated_group_norm: x {list(x.shape)} needs {group_index.shape[0]} channels on axis 1, and "
            f"removed_mean and removed_m2 equal lengths, got {n_groups} and {len(removed_m2)}"
        )
    stat = statistics_dtype(x.dtype)
    xs = x.flatten(2).to(stat) if x.dim() > 2 else x.unsqueeze(-1).to(stat)  # [N, K, positions]
    member = (group_index[:, None] == torch.arange(n_groups, device=x.device)).to(stat)  # [K, G]
    mean_removed = torch.tensor(tuple(removed_mean), dtype=stat, device=x.device)  # [G]
    floor = torch.tensor([m2 / group_size + eps for m2 in removed_m2], dtype=stat, device=x.device)  # [G]
    n_kept = member.sum(0)  # [G]
    n_removed = group_size - n_kept

    mean_channel = xs.mean(-1)  # [N, K]
    centred = xs - mean_channel[..., None]
    var_channel = (centred * centred).mean(-1)
    # Sums over groups are a masked sum, not a matmul (which may run in TF32) nor an index_add (not
    # deterministic on GPUs).
    mean_kept = (mean_channel[..., None] * member).sum(1) / n_kept.clamp(min=1)  # [N, G]
    mean = mean_kept + (n_removed / group_size) * (mean_removed - mean_kept)
    offset = mean_channel - mean[:, group_index]  # [N, K]
    spread = ((var_channel + offset * offset)[..., None] * member).sum(1)  # [N, G]
    from_removed = (n_removed / group_size) * (mean_removed - mean) ** 2
    r = torch.rsqrt(spread / group_size + from_removed + floor)[:, group_index]  # [N, K]
    scale = r if weight is None else r * weight  # [N, K]
    shift = offset * scale if bias is None else torch.addcmul(bias.to(stat), offset, scale)
    y = torch.addcmul(shift[..., None], centred, scale[..., None])  # one pass in eager mode
    return y.reshape(x.shape).to(x.dtype)
