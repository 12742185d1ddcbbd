"""The same zeros, other numbers: a model whose nonzero weights are drawn anew again and again."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, fx, nn

from srfx.ir.attrs import split_path
from srfx.ir.double import copy_for_comparison

SIGNS = ("kept", "positive", "mixed", "mixed")
"""How the draws take their signs, in turn.

A chain of rectifiers lets nothing pass under most random signs; all positive, it lets everything pass.  As they
were, they suit whatever the model does with them (a logarithm, a temperature).
"""


@dataclass(frozen=True)
class _Slot:
    """A tensor of the copy that is drawn anew."""

    target: Tensor
    sign: Tensor  # of the original value: -1, 0, 1; the zeros stay
    scale: float  # of weights with mixed signs
    mean: float  # of weights of one sign
    is_positive: bool  # a variance


class Resampler:
    """A copy of a graph module in float64, and draws of its weights.

    Parameters are drawn once for each tensor, so that ties stay ties; of the buffers only the statistics of batch
    norms (``running_mean``, ``running_var``) are drawn: tables, masks and templates are part of the program.  Zeros,
    infinities, integers and single numbers that are zero stay what they are.

    Args:
        gm: the graph module; not changed.
        seed: of the draws.
    """

    def __init__(self, gm: fx.GraphModule, seed: int) -> None:
        self.copy = cast(fx.GraphModule, copy_for_comparison(gm, _owned_double))
        self.copy.requires_grad_(False)
        self.seed = seed
        self._slots = list(_slots(self.copy))

    def draw(self, i: int) -> None:
        """Give every nonzero weight of the copy the values of draw ``i``."""
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + i)
        signs, spread = SIGNS[i % len(SIGNS)], 1.0 if i >= len(SIGNS) else 0.0
        with torch.no_grad():
            for slot in self._slots:
                size = 0.2 + torch.rand(slot.target.shape, generator=generator, dtype=torch.float64)
                mixed = torch.randint(0, 2, slot.target.shape, generator=generator).double() * 2 - 1
                factor = math.exp(spread * float(torch.rand((), generator=generator) * 2 - 1))
                sign = mixed if signs == "mixed" else torch.ones_like(mixed)
                if slot.is_positive:
                    sign, level = torch.ones_like(mixed), 1.0
                elif signs == "kept":
                    sign, level = slot.sign.sign(), slot.scale
                else:
                    level = slot.scale if signs == "mixed" else slot.mean
                new = size * sign * level * factor
                keep = (slot.sign == 0) | ~slot.sign.isfinite()
                slot.target.copy_(torch.where(keep, slot.sign, new))


def _owned_double(tensor: Tensor) -> Tensor:
    if tensor.is_floating_point():
        return tensor.detach().to(torch.float64, copy=True)
    if tensor.is_complex():
        return tensor.detach().to(torch.complex128, copy=True)
    return tensor.detach().clone()


def _slots(gm: nn.Module) -> list[_Slot]:
    found: dict[int, _Slot] = {}
    for name, tensor in (*gm.named_parameters(), *gm.named_buffers()):
        last = split_path(name)[1]
        is_statistic = last in ("running_mean", "running_var")
        if not tensor.is_floating_point() or not (is_statistic or isinstance(tensor, nn.Parameter)):
            continue
        fan = max(1, tensor[0].numel()) if tensor.dim() > 1 and tensor.numel() else 1
        slot = _Slot(
            tensor.data,
            tensor.detach().clone(),
            1 / math.sqrt(fan),
            1.4 / fan if fan > 1 else 1.0,
            last == "running_var",
        )
        found.setdefault(id(tensor), slot)
    return list(found.values())
