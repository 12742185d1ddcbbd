"""The two ways the compensated layer norm is computed: a plain differentiable one, and a quick eager one.

Let K values x be kept of a population of C, the other C - K being constants with mean m and M2 = sum (v -
m)^2. With k = K/C, d = 1 - k, mean and var those of the kept values alone, and D = m - mean (docs/norms.md,
lemma 1):

    mu = mean + d D            var_C = k var + k d D^2 + M2/C            r = 1/sqrt(var_C + eps)

Every term of var_C is non-negative: nothing cancels. The quick form runs the native kernel with eps' = (eps +
M2/C)/k, which gives xhat, mean and rstd, and corrects by rank one (lemma 2; again nothing is subtracted to
get var back from rstd):

    t = sqrt(k d) D rstd         q = 1/sqrt(k + t^2)         (x - mu) r = q (xhat - sqrt(d/k) t)         r = q rstd

On few tokens an op takes as long as it takes to call it, so these are as few as we know: five behind the kernel.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from srfx.nn.selection import select

# Below this the native kernel's rstd can overflow when squared (all kept values equal), and eps' = 0 gives
# inf outright.
_SMALLEST_NATIVE_EPS = 1e-20

# Fake, distributed and other tensors do not mix with the numbers that `_filled` remembers.
_PLAIN = (Tensor, nn.Parameter)

_is_exporting = getattr(
    torch.compiler, "is_exporting", torch.compiler.is_compiling
)  # torch < 2.7 has no is_exporting


@dataclass
class Population:
    """The numbers of one call: sizes, removed constants, and what is emitted; nobody changes them.

    Args:
        kept_shape: sizes of the normalised trailing axes as they are now.
        n_total: C, kept and removed together.
        mean: of the removed constants.
        m2: their sum of squared deviations from `mean`.
        eps: of the original layer.
        emits: subset of ("r", "mu_r", "one"), in this order.
        shift: c of the emitted (mu - c) r.

    Attributes:
        kept_share: k = K/C.
        removed_share: d = (C - K)/C.
        floor: what the variance is at least, eps + M2/C.
        native_eps: floor/k, for the kernel that sees the kept channels alone.
        lean, slope: sqrt(k d) and sqrt(d/k), of the correction.
    """

    kept_shape: tuple[int, ...]
    n_total: int
    mean: float
    m2: float
    eps: float
    emits: tuple[str, ...]
    shift: float
    kept_share: float = field(init=False)
    removed_share: float = field(init=False)
    floor: float = field(init=False)
    native_eps: float = field(init=False)
    lean: float = field(init=False)
    slope: float = field(init=False)

    def __post_init__(self) -> None:
        n_kept = math.prod(self.kept_shape)
        self.kept_share = k = n_kept / self.n_total
        self.removed_share = d = (self.n_total - n_kept) / self.n_total
        self.floor = self.eps + self.m2 / self.n_total
        self.native_eps = self.floor / k
        self.lean, self.slope = math.sqrt(k * d), math.sqrt(d / k)


def statistics_dtype(dtype: torch.dtype) -> torch.dtype:
    """Float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def is_eager() -> bool:
    """Whether ops run as they are called: nothing traces, watches, transforms or differentiates them forward."""
    return not (
        torch.compiler.is_compiling()
        or torch._C._get_tracing_state() is not None
        or torch._C._len_torch_dispatch_stack()
        or torch._C._are_functorch_transforms_active()
        or forward_ad._current_level >= 0
    )


@lru_cache(maxsize=4096)
def _filled(value: float, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """A tensor of one number that nobody writes: to make it anew costs what the arithmetic on few tokens does."""
    with torch.inference_mode(False):
        return torch.full(shape, value, dtype=dtype, device=device)


def normalise(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, p: Population, outputs: Tensor | None = None
) -> Tensor:
    """Pick the form: plain where the call is traced or transformed, quick in eager mode.

    Shapes: x [..., *kept_shape]; weight, bias kept_shape -> [..., *kept_shape], the last axis longer by
    len(emits).  With outputs [M] of one normalised axis: weight, bias [M] -> [..., M + len(emits)].
    """
    is_quick = type(x) in _PLAIN and is_eager() and p.native_eps >= _SMALLEST_NATIVE_EPS
    needs_grad = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, weight, bias))
    if is_quick and not needs_grad:
        return _normalise_quick(x, weight, bias, p, outputs)[0]
    if outputs is not None:
        xs = x.to(statistics_dtype(x.dtype))
        return _selected(normalise(xs, None, None, p), len(p.emits), outputs, weight, bias).to(x.dtype)
    if is_quick:
        out: Tensor = _QuickForm.apply(x, weight, bias, p)  # type: ignore[no-untyped-call, unused-ignore]
        return out
    return normalise_plain(x, weight, bias, p)


def _selected(
    y: Tensor, n_emitted: int, outputs: Tensor, weight: Tensor | None, bias: Tensor | None
) -> Tensor:
    """Channels ``outputs`` of what is normalised, scaled and shifted, and what is emitted behind them."""
    chosen = select(y, -1, outputs)
    if weight is not None:
        chosen = chosen * weight.to(y.dtype)
    if bias is not None:
        chosen = chosen + bias.to(y.dtype)
    return torch.cat([chosen, y[..., y.shape[-1] - n_emitted :]], -1) if n_emitted else chosen


def normalise_plain(x: Tensor, weight: Tensor | None, bias: Tensor | None, p: Population) -> Tensor:
    """Ordinary differentiable ops, for torch.compile, export, ONNX, torch.func and double backward.

    Shapes: x [..., *kept_shape]; weight, bias kept_shape -> [..., *kept_shape], the last axis longer by
    len(emits).
    """
    dims = tuple(range(-len(p.kept_shape), 0))
    xs = x.to(statistics_dtype(x.dtype))
    if torch.compiler.is_compiling() and not _is_exporting():
        # One fused loop in inductor (1.1x native, the spelled-out form is 1.5x); in eager var_mean is 10x
        # native.
        var, mean = torch.var_mean(xs, dims, correction=0, keepdim=True)
        centred = xs - mean
    else:
        mean = xs.mean(dims, keepdim=True)
        centred = xs - mean
        var = (centred * centred).mean(dims, keepdim=True)
    delta = p.mean - mean
    r = torch.rsqrt(p.kept_share * var + (p.kept_share * p.removed_share) * (delta * delta) + p.floor)
    y = (centred - p.removed_share * delta) * r
    if weight is not None:
        y = y * weight
    if bias is not None:
        y = y + bias
    y = y.to(x.dtype)
    if not p.emits:
        return y
    return torch.cat([y, *(channel.to(x.dtype) for channel in _emitted(p, r, delta))], dim=-1)


def _emitted(p: Population, r: Tensor, delta: Tensor) -> list[Tensor]:
    """The extra channels, each [..., 1]."""
    channels = []
    if "r" in p.emits:
        channels.append(r)
    if "mu_r" in p.emits:
        # mu - c = (m - c) - k D: exact where it matters, c = m, instead of a difference of two large numbers.
        channels.append(((p.mean - p.shift) - p.kept_share * delta) * r)
    if "one" in p.emits:
        channels.append(torch.ones_like(r))
    return channels


def _normalise_quick(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, p: Population, outputs: Tensor | None = None
) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
    """Native kernel and rank-one correction; not differentiable (native mean and rstd carry no gradient).

    Returns: y, and in the dtype of the statistics q (None if nothing is removed: 1), rstd and mean - m
        [..., 1 per normalised axis].
    """
    stat, device, shape = statistics_dtype(x.dtype), x.device, p.kept_shape
    xs = x if x.dtype == stat else x.to(stat)
    scale = weight if weight is None or weight.dtype == stat else weight.to(stat)
    bias = bias if bias is None or bias.dtype == stat else bias.to(stat)
    # On CPU the native kernel without weight and bias is slower than with them.
    first = _filled(1.0, shape, stat, device) if scale is None or outputs is not None else scale
    z, mean, rstd = torch.native_layer_norm(xs, shape, first, _filled(0.0, shape, stat, device), p.native_eps)
    z, scale = (z, None) if outputs is None else (select(z, -1, outputs), scale)
    offset = mean - p.mean if p.mean else mean
    t, q = None, None
    if p.removed_share:
        t = torch.addcmul(_filled(0.0, (), stat, device), offset, rstd, value=-p.lean)
        q = torch.addcmul(_filled(p.kept_share, (), stat, device), t, t).rsqrt_()
        z = z.addcmul_(t, first, value=-p.slope) if outputs is None else z.sub_(t, alpha=p.slope)
    if not p.emits and x.dtype == stat:
        return _write(z, scale, q, bias, z), q, rstd, offset  # its memory is at hand: no page faults
    n_last = z.shape[-1]
    out = x.new_empty((*x.shape[:-1], n_last + len(p.emits)))
    _write(z, scale, q, bias, out.narrow(-1, 0, n_last))
    if p.emits:
        _emit(p, t, q, rstd, offset, out.narrow(-1, n_last, len(p.emits)))
    return out, q, rstd, offset


def _write(z: Tensor, scale: Tensor | None, q: Tensor | None, shift: Tensor | None, out: Tensor) -> Tensor:
    """``z scale q + shift`` into ``out``; what is None does nothing.  z may be overwritten."""
    if scale is not None and q is not None:
        z, scale = z.mul_(scale), None
    factor = q if scale is None else scale
    if factor is not None:
        return torch.mul(z, factor, out=out) if shift is None else torch.addcmul(shift, z, factor, out=out)
    if shift is not None:
        return torch.add(z, shift, out=out)
    return z if out is z else out.copy_(z)


def _emit(
    p: Population, t: Tensor | None, q: Tensor | None, rstd: Tensor, offset: Tensor, out: Tensor
) -> None:
    """Write the numbers of `_emitted` into ``out`` [..., len(emits)], which may have another dtype."""
    for position, name in enumerate(p.emits):
        place = out if len(p.emits) == 1 else out.narrow(-1, position, 1)
        if name == "r":
            _write(rstd, None, q, None, place)
        elif name == "one":
            place.fill_(1)
        elif t is not None and q is not None and p.mean == p.shift:  # (mu - m) r = k (mean - m) rstd q
            zero = _filled(0.0, (), t.dtype, t.device)
            torch.addcmul(zero, t, q, value=-p.kept_share / p.lean, out=place)
        else:
            centre = (offset * p.kept_share).add_(p.mean - p.shift)
            _write(centre, rstd, q, None, place)


class _QuickForm(torch.autograd.Function):
    """The quick form with its gradient; a graph of the gradient (create_graph) goes through the plain form.

    The native backward kernel, given mu and r, computes n = r (g w - A/K - xhat B/K), A = sum g w, B = sum g
    w xhat; the population has C members, so dx = r (g w - A/C - xhat B/C) = k n + d r g w. Emitted channels
    add to A and B (lemma 3).
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, p: Population) -> Tensor:
        out, q, rstd, offset = _normalise_quick(x, weight, bias, p)
        ctx.save_for_backward(x, weight, bias, rstd if q is None else rstd * q, -offset)
        ctx.population = p
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None]:
        x, weight, bias, r, delta = ctx.saved_tensors
        p: Population = ctx.population
        wanted = ctx.needs_input_grad[:3]
        if torch.is_grad_enabled():
            return _differentiable_backward(x, weight, bias, p, grads[0], wanted)
        mu = p.mean - p.kept_share * delta
        stat = r.dtype
        shape = list(p.kept_shape)
        xs = x.to(stat)
        n_last = p.kept_shape[-1]
        g = grads[0][..., :n_last].to(stat).contiguous()
        scale = xs.new_ones(shape) if weight is None else weight.to(stat)
        dx, dw, db = torch.ops.aten.native_layer_norm_backward(
            g, xs.contiguous(), shape, mu, r, scale, xs.new_zeros(shape), list(wanted)
        )
        if wanted[0]:
            dx.mul_(p.kept_share).addcmul_(g * scale, r, value=p.removed_share)
            if p.emits:
                slope, offset = _emitted_backward(p, grads[0][..., n_last:].to(stat), delta, r, mu)
                dx.addcmul_(xs, slope).add_(offset)
        return (
            dx.to(x.dtype) if wanted[0] else None,
            dw.to(weight.dtype) if wanted[1] else None,
            db.to(bias.dtype) if wanted[2] else None,
            None,
        )


def _emitted_backward(
    p: Population, grad: Tensor, delta: Tensor, r: Tensor, mu: Tensor
) -> tuple[Tensor, Tensor]:
    """What emitted channels add to dx, as slope x + offset.

    dr/dx = -r^3 (x - mu)/C and d((mu - c) r)/dx = r/C - (mu - c) r^3 (x - mu)/C.

    Shapes: grad [..., len(emits)], the others [..., 1] -> two of [..., 1].
    """
    along_mean = torch.zeros_like(r)
    along_var = torch.zeros_like(r)
    if "r" in p.emits:
        along_var = along_var + grad[..., :1]
    if "mu_r" in p.emits:
        index = p.emits.index("mu_r")
        along_mean = grad[..., index : index + 1]
        along_var = along_var + along_mean * ((p.mean - p.shift) - p.kept_share * delta)
    slope = along_var * r**3 / -p.n_total
    return slope, along_mean * r / p.n_total - mu * slope


def _differentiable_backward(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    p: Population,
    grad: Tensor,
    wanted: tuple[bool, bool, bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None, None]:
    inputs = [
        t for t, is_wanted in zip((x, weight, bias), wanted, strict=True) if is_wanted and t is not None
    ]
    y = normalise_plain(x, weight, bias, p)
    found = iter(torch.autograd.grad(y, inputs, grad, create_graph=True))
    dx, dw, db = (next(found) if is_wanted else None for is_wanted in wanted)
    return dx, dw, db, None
