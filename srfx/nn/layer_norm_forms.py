"""The two ways the compensated layer norm is computed: a plain differentiable one, and a quick eager one.

Let K values x be kept of a population of C, the other C - K being constants with mean m and M2 = sum (v -
m)^2. With k = K/C, d = 1 - k, mean and var those of the kept values alone, and D = m - mean (docs/norms.md,
lemma 1):

    mu = mean + d D            var_C = k var + k d D^2 + M2/C            r = 1/sqrt(var_C + eps)

Every term of var_C is non-negative: nothing cancels. The quick form runs the native kernel with eps' = (eps +
M2/C)/k, which gives xhat, mean and rstd, and corrects by rank one (lemma 2; again nothing is subtracted to
get var back from rstd):

    t = D rstd         q = 1/sqrt(k + k d t^2)        (x - mu) r = q (xhat - d t)        r = q rstd
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

# Below this the native kernel's rstd can overflow when squared (all kept values equal), and eps' = 0 gives
# inf outright.
_SMALLEST_NATIVE_EPS = 1e-20

_is_exporting = getattr(
    torch.compiler, "is_exporting", torch.compiler.is_compiling
)  # torch < 2.7 has no is_exporting


@dataclass(frozen=True, slots=True)
class Population:
    """The numbers of one call: sizes, removed constants, and what is emitted.

    Args:
        kept_shape: sizes of the normalised trailing axes as they are now.
        n_total: C, kept and removed together.
        mean: of the removed constants.
        m2: their sum of squared deviations from `mean`.
        eps: of the original layer.
        emits: subset of ("r", "mu_r", "one"), in this order.
        shift: c of the emitted (mu - c) r.
    """

    kept_shape: tuple[int, ...]
    n_total: int
    mean: float
    m2: float
    eps: float
    emits: tuple[str, ...]
    shift: float

    @property
    def kept_share(self) -> float:
        """K/C."""
        return math.prod(self.kept_shape) / self.n_total

    @property
    def removed_share(self) -> float:
        """(C - K)/C."""
        return (self.n_total - math.prod(self.kept_shape)) / self.n_total

    @property
    def floor(self) -> float:
        """What the variance is at least: eps + M2/C."""
        return self.eps + self.m2 / self.n_total


def statistics_dtype(dtype: torch.dtype) -> torch.dtype:
    """Float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def is_eager() -> bool:
    """Whether ops run as they are called: nothing traces, transforms or differentiates them forward."""
    return not (
        torch.compiler.is_compiling()
        or torch._C._get_tracing_state() is not None
        or torch._C._are_functorch_transforms_active()
        or forward_ad._current_level >= 0
    )


def normalise(x: Tensor, weight: Tensor | None, bias: Tensor | None, p: Population) -> Tensor:
    """Pick the form: plain where the call is traced or transformed, quick in eager mode."""
    if not is_eager() or p.floor / p.kept_share < _SMALLEST_NATIVE_EPS:
        return normalise_plain(x, weight, bias, p)
    needs_grad = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, weight, bias))
    if needs_grad:
        out: Tensor = _QuickForm.apply(x, weight, bias, p)  # type: ignore[no-untyped-call, unused-ignore]
        return out
    return _normalise_quick(x, weight, bias, p)[0]


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
    x: Tensor, weight: Tensor | None, bias: Tensor | None, p: Population
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Native kernel and rank-one correction; not differentiable (native mean and rstd carry no gradient).

    Returns: y, and in the dtype of the statistics q, rstd and D = m - mean [..., 1 per normalised axis].
    """
    stat = statistics_dtype(x.dtype)
    xs = x.to(stat)
    shape = list(p.kept_shape)
    # On CPU the native kernel without weight and bias is 1.7 times slower than with them.
    scale = xs.new_ones(shape) if weight is None else weight.to(stat)
    k, d = p.kept_share, p.removed_share
    z, mean, rstd = torch.native_layer_norm(xs, shape, scale, xs.new_zeros(shape), p.floor / k)
    delta = p.mean - mean
    t = delta * rstd
    q = (t * t).mul_(k * d).add_(k).rsqrt_()
    z.addcmul_(t, scale, value=-d)
    n_last = p.kept_shape[-1]
    if p.emits or x.dtype != stat:
        out = x.new_empty([*x.shape[:-1], n_last + len(p.emits)])
        y = out[..., :n_last]
    else:
        out = y = z  # its memory is at hand; a fresh tensor costs page faults
    if bias is None:
        torch.mul(z, q, out=y)
    else:
        torch.addcmul(bias.to(stat), z, q, out=y)
    if p.emits:
        _emit(p, q * rstd, delta, out[..., n_last:])
    return out, q, rstd, delta


def _emit(p: Population, r: Tensor, delta: Tensor, out: Tensor) -> None:
    """Write the numbers of `_emitted` into ``out`` [..., len(emits)], which may have another dtype."""
    for offset, name in enumerate(p.emits):
        place = out.narrow(-1, offset, 1)
        if name == "r":
            place.copy_(r)
        elif name == "one":
            place.fill_(1)
        elif p.mean == p.shift:
            torch.mul(delta * -p.kept_share, r, out=place)
        else:
            torch.mul((delta * -p.kept_share).add_(p.mean - p.shift), r, out=place)


class _QuickForm(torch.autograd.Function):
    """The quick form with its gradient; a graph of the gradient (create_graph) goes through the plain form.

    The native backward kernel, given mu and r, computes n = r (g w - A/K - xhat B/K), A = sum g w, B = sum g
    w xhat; the population has C members, so dx = r (g w - A/C - xhat B/C) = k n + d r g w. Emitted channels
    add to A and B (lemma 3).
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, p: Population) -> Tensor:
        out, q, rstd, delta = _normalise_quick(x, weight, bias, p)
        ctx.save_for_backward(x, weight, bias, q * rstd, delta)
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
