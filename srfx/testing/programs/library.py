"""What the code of a generated program calls."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn


def odd(x: Tensor) -> Tensor:
    """An op that nobody knows: no tracer looks into it."""
    return torch.where(x > 0, x * 1.5, x.abs().sqrt() * 0.5)


torch.fx.wrap("odd")


def randomize(model: nn.Module, seed: int) -> nn.Module:
    """Give every parameter and statistic a value away from its default and from zero; in place."""
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            fan = max(1, p[0].numel()) if p.dim() > 1 else 1
            sign = torch.randint(0, 2, p.shape, generator=g) * 2 - 1
            p.copy_((torch.rand(p.shape, generator=g) + 0.2) * sign / math.sqrt(fan))
        for name, b in model.named_buffers():
            if name.endswith("running_mean"):
                b.copy_(0.3 * torch.randn(b.shape, generator=g))
            elif name.endswith("running_var"):
                b.copy_(0.5 + torch.rand(b.shape, generator=g))
    return model


def thin(weight: Tensor, share: float, seed: int) -> None:
    """Set a share of single weights to zero, half of them to -0.0; in place."""
    g = torch.Generator().manual_seed(seed)
    hit = torch.rand(weight.shape, generator=g) < share
    minus = torch.rand(weight.shape, generator=g) < 0.5
    weight[hit] = 0.0
    weight[hit & minus] = -0.0


def floats(n: int, *shape: int, seed: int) -> Tensor:
    """A batch of normal numbers."""
    return torch.randn(n, *shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def words(n: int, length: int, rows: int, seed: int) -> Tensor:
    """A batch of positions in a table."""
    return torch.randint(0, rows, (n, length), generator=torch.Generator().manual_seed(seed))


def seen(n: int, length: int, seed: int) -> Tensor:
    """A batch of masks, True where a token is seen; the first always is."""
    found = torch.rand(n, length, generator=torch.Generator().manual_seed(seed)) < 0.7
    found[:, 0] = True
    return found
