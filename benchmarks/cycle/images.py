"""The digits as ConvNeXt takes them: three equal colours, 32 by 32, moved about a little while training."""

import torch
from torch import Generator, Tensor
from torch.nn import functional as F

MEAN, STD = 0.1307, 0.3081
MOST_DEGREES, MOST_SCALE, MOST_SHIFT = 10.0, 0.1, 0.12  # of a turn, of one, of half the picture


def as_colour(images: Tensor) -> Tensor:
    """[N, 1, 28, 28] in 0..1 to [N, 3, 32, 32], standardised."""
    return F.pad((images - MEAN) / STD, (2, 2, 2, 2), value=-MEAN / STD).repeat(1, 3, 1, 1)


def jitter(images: Tensor, generator: Generator) -> Tensor:
    """Turn, scale and shift each image at random by a little."""
    n = len(images)
    turn, scale, across, down = (torch.rand(4, n, generator=generator) * 2 - 1).unbind()
    angle = turn * MOST_DEGREES * torch.pi / 180
    cos, sin = torch.cos(angle) * (1 + scale * MOST_SCALE), torch.sin(angle) * (1 + scale * MOST_SCALE)
    theta = torch.stack([cos, -sin, across * MOST_SHIFT, sin, cos, down * MOST_SHIFT], dim=1).view(n, 2, 3)
    grid = F.affine_grid(theta, list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, align_corners=False, padding_mode="border")
