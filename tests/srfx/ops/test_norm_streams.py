"""Residual streams end to end: what leaves them, with zero and with other constants, whatever joins or divides them."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from srfx.ir.plan import Reason
from tests.helpers import check, kill, randomized

C, H = 9, 7
DEAD = [1, 4, 6]
ZERO, DIFFERENT = (0.0, 0.0, 0.0), (1.5, -0.75, 0.25)
X = torch.randn(2, 6, 5, generator=torch.Generator().manual_seed(0))
Norm = type[nn.Module]


def constant(layer: nn.Module, values: Sequence[float], rows: Sequence[int] = DEAD) -> None:
    """These rows of a layer yield these constants."""
    kill(layer, rows=rows)
    with torch.no_grad():
        layer.bias[list(rows)] = torch.tensor(values)


def still(norm: nn.Module, values: Sequence[float]) -> None:
    """A norm at the end of a branch whose scale is 0 on the dead channels; a layer norm's shift is the constant."""
    with torch.no_grad():
        norm.weight[DEAD] = 0.0
        if getattr(norm, "bias", None) is not None:
            norm.bias[DEAD] = torch.tensor(values)


class Block(nn.Module):
    """Pre-norm, post-norm, or a norm on both sides of the branch."""

    def __init__(self, kind: str, norm: Norm, width: int = C) -> None:
        super().__init__()
        self.kind, self.first, self.second = kind, norm(width), norm(width)
        self.up, self.down = nn.Linear(width, H), nn.Linear(H, width)
        self.scale = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        y = x if self.kind == "post" else self.first(x)
        y = self.down(F.gelu(self.up(y))) * self.scale
        if self.kind == "sandwich":
            y = self.second(y)
        y = x + y
        return self.second(y) if self.kind == "post" else y


class Stream(nn.Module):
    def __init__(self, kind: str, norm: Norm) -> None:
        super().__init__()
        self.stem, self.first, self.second = nn.Linear(5, C), Block(kind, norm), Block(kind, norm)
        self.last, self.head = norm(C), nn.Linear(C, 4)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.head(self.last(self.second(self.first(self.stem(x)))))
        return y


@pytest.mark.parametrize("values", [ZERO, DIFFERENT])
@pytest.mark.parametrize("norm", [nn.LayerNorm, nn.RMSNorm])
@pytest.mark.parametrize("kind", ["pre", "post", "sandwich"])
def test_blocks(kind: str, norm: Norm, values: Sequence[float]) -> None:
    """Three channels of nine leave the stream; the last norm's statistics come instead."""
    model = randomized(Stream(kind, norm))
    constant(model.stem, values)
    for block in (model.first, model.second):
        constant(block.down, values)
        if kind != "pre":
            still(block.second, values)
    with torch.no_grad():
        model.first.scale[0] = 0.0  # the branch does not write this channel
    shift = norm is nn.LayerNorm or kind != "post"  # behind an RMS norm with scale 0 the constants are 0
    n = (norm is nn.LayerNorm) + (values is DIFFERENT and shift)
    reasons = [Reason.NOT_LINEAR_IN_NORM] if kind == "sandwich" and norm is nn.LayerNorm else []
    kept = {"stem.weight": (6, 5), "head.weight": (4, 6 + n), "second.down.weight": (6, H)}
    check(model, (X,), kept=kept, reasons=reasons)


class Joined(nn.Module):
    """Two streams, with norms of two kinds, joined by a sum or one behind the other."""

    def __init__(self, is_sum: bool) -> None:
        super().__init__()
        self.is_sum, self.a, self.b = is_sum, nn.Linear(5, C), nn.Linear(4, C)
        self.in_a, self.in_b = Block("pre", nn.LayerNorm), Block("pre", nn.RMSNorm)
        width = C if is_sum else 2 * C
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 3)

    def forward(self, x: Tensor, z: Tensor) -> Tensor:
        a, b = self.in_a(self.a(x)), self.in_b(self.b(z))
        y: Tensor = self.head(self.norm(a + b if self.is_sum else torch.cat([a, b], -1)))
        return y


@pytest.mark.parametrize("is_sum", [True, False])
def test_joined_streams(is_sum: bool) -> None:
    """Of a sum those channels go that are dead in both; of a concatenation each stream's own."""
    model = randomized(Joined(is_sum))
    for layer in (model.a, model.in_a.down):
        constant(layer, DIFFERENT)
    for layer in (model.b, model.in_b.down):
        constant(layer, DIFFERENT, [1, 4, 7])
    n_left, n_all = (C - 2, C - 2) if is_sum else (C - 3, 2 * C - 6)
    kept = {"a.weight": (n_left, 5), "b.weight": (n_left, 4), "head.weight": (3, n_all + 2)}
    check(model, (X, torch.randn(2, 6, 4)), kept=kept)


class Projected(nn.Module):
    """A stream that goes on in another width: projected behind a norm, and beside it."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.before, self.norm = nn.Linear(5, C), Block("pre", nn.LayerNorm), nn.LayerNorm(C)
        self.project, self.skip = nn.Linear(C, 12), nn.Linear(C, 12)
        self.after, self.last, self.head = Block("pre", nn.LayerNorm, 12), nn.LayerNorm(12), nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.before(self.stem(x))
        x = self.project(self.norm(x)) + self.skip(x)
        y: Tensor = self.head(self.last(self.after(x)))
        return y


def test_a_stream_of_another_width() -> None:
    model = randomized(Projected())
    for layer in (model.stem, model.before.down):
        constant(layer, DIFFERENT)
    for layer in (model.project, model.skip, model.after.down):
        constant(layer, DIFFERENT, [0, 5, 9])
    kept = {
        "stem.weight": (6, 5),
        "project.weight": (9, 8),
        "skip.weight": (9, 6),
        "after.up.weight": (H, 11),
        "head.weight": (3, 11),
    }
    check(model, (X,), kept=kept)


class LayerNorm2d(nn.LayerNorm):
    def forward(self, x: Tensor) -> Tensor:
        x = x.permute(0, 2, 3, 1)
        return F.layer_norm(x, self.normalized_shape, self.weight, self.bias, self.eps).permute(0, 3, 1, 2)


class Downsampled(nn.Module):
    """A norm at the stem, and one in front of a convolution with stride."""

    def __init__(self, kernel: int, padding: int) -> None:
        super().__init__()
        self.stem, self.stem_norm = nn.Conv2d(3, C, 3, padding=1), LayerNorm2d(C)
        self.block, self.norm = nn.Conv2d(C, C, 1), LayerNorm2d(C)
        self.down = nn.Conv2d(C, 12, kernel, stride=2, padding=padding)
        self.last, self.head = nn.LayerNorm(12), nn.Linear(12, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem_norm(self.stem(x))
        x = self.down(self.norm(x + self.block(x)))
        y: Tensor = self.head(self.last(x.mean((2, 3))))
        return y


@pytest.mark.parametrize(("kernel", "padding"), [(2, 0), (3, 0), (3, 1)])
@pytest.mark.parametrize("values", [ZERO, DIFFERENT])
def test_downsampling(values: Sequence[float], kernel: int, padding: int) -> None:
    """The convolution takes a column for each tap, and behind padding the ones as well."""
    model = randomized(Downsampled(kernel, padding))
    constant(model.stem, values)
    constant(model.block, values)
    still(model.stem_norm, values)
    constant(model.down, values, [0, 5, 9])
    n = 2 if values is DIFFERENT else 1
    kept = {
        "stem.weight": (6, 3, 3, 3),
        "block.weight": (6, 6, 1, 1),
        "down.weight": (9, 6 + n + (padding > 0), kernel, kernel),
        "head.weight": (4, 9 + n),
    }
    check(model, (torch.randn(2, 3, 8, 8),), kept=kept)


class Tokens(nn.Module):
    """A class token in front of the others or added to them, learned positions, and the head of one token."""

    def __init__(self, is_added: bool) -> None:
        super().__init__()
        self.is_added, self.stem = is_added, nn.Linear(5, C)
        self.token = nn.Parameter(torch.ones(1, 1, C))
        self.position = nn.Parameter(torch.ones(1, 6 if is_added else 7, C))
        self.block, self.norm, self.head = Block("pre", nn.LayerNorm), nn.LayerNorm(C), nn.Linear(C, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = x + self.token if self.is_added else torch.cat([self.token.expand(x.shape[0], -1, -1), x], 1)
        y: Tensor = self.head(self.norm(self.block(x + self.position))[:, 0])
        return y


@pytest.mark.parametrize("is_added", [True, False])
def test_class_tokens_and_positions(is_added: bool) -> None:
    model = randomized(Tokens(is_added))
    constant(model.stem, DIFFERENT)
    constant(model.block.down, DIFFERENT)
    with torch.no_grad():
        model.token[..., DEAD] = 0.5 if is_added else torch.tensor(DIFFERENT)
        model.position[..., DEAD] = torch.tensor(DIFFERENT)
    kept = {"token": (1, 1, 6), "stem.weight": (6, 5), "head.weight": (3, 8)}
    check(model, (X,), kept=kept)
    with torch.no_grad():  # no constants any more
        model.position[..., DEAD] = torch.randn(model.position.shape[1], 3)
    check(model, (X,), kept={"token": (1, 1, C), "stem.weight": (C, 5), "head.weight": (3, C)})
