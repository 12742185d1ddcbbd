"""Whole networks drawn at random: minimize is exact, never grows, repeats itself, and leaves its input alone."""

from __future__ import annotations

from typing import Any

import hypothesis.strategies as st
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from torch import Tensor, nn

from tests.helpers import check, masked, randomized, shapes

ACTIVATIONS = (nn.ReLU, nn.Sigmoid, nn.SiLU, nn.Hardswish, nn.Tanh, nn.Identity, nn.PReLU)
KINDS = ("conv", "grouped", "depthwise", "residual", "concat", "gate", "norm", "pool", "up", "shared", "split", "scale",
         "shuffle")  # fmt: skip


class Block(nn.Module):
    """One drawn step from ``c`` channels to ``self.width`` channels."""

    def __init__(self, kind: str, c: int, draw: Any) -> None:
        super().__init__()
        self.kind, self.width = kind, c
        self.act = draw(st.sampled_from(ACTIVATIONS))()
        padding, mode = draw(st.integers(0, 1)), draw(st.sampled_from(("zeros", "reflect", "replicate")))
        if kind == "conv":
            self.width = draw(st.sampled_from((4, 6)))
            self.a = nn.Conv2d(c, self.width, 3, padding=padding, padding_mode=mode, bias=draw(st.booleans()))
        elif kind in ("grouped", "depthwise"):
            groups = 2 if kind == "grouped" else c
            self.width = c * draw(st.integers(1, 2))
            self.a = nn.Conv2d(c, self.width, 3, padding=padding, groups=groups)
        elif kind in ("residual", "shared", "gate", "concat"):
            self.a = nn.Conv2d(c, c, 3 if kind != "gate" else 1, padding=1 if kind != "gate" else 0)
            self.width = 2 * c if kind == "concat" else c
        elif kind == "norm":
            self.a = nn.BatchNorm2d(c, affine=draw(st.booleans()))
        elif kind == "pool":
            pools = (nn.MaxPool2d(2, padding=padding), nn.AvgPool2d(2, padding=padding),
                     nn.AvgPool2d(3, 1, 1, count_include_pad=False))  # fmt: skip
            self.a = draw(st.sampled_from(pools))
        elif kind == "up":
            self.a = nn.Upsample(scale_factor=2)
        elif kind == "scale":
            self.scale = nn.Parameter(torch.ones(c, 1, 1))
        elif kind == "split":
            self.a, self.b = nn.Conv2d(c // 2, 4, 1), nn.Conv2d(c - c // 2, 4, 1)
            self.width = 4

    def forward(self, x: Tensor) -> Tensor:
        if self.kind == "residual":
            return self.act(x + self.a(x))
        if self.kind == "shared":
            return self.act(self.a(self.act(self.a(x))))
        if self.kind == "concat":
            return torch.cat([x, self.act(self.a(x))], 1)
        if self.kind == "gate":
            return x * torch.sigmoid(self.a(F.adaptive_avg_pool2d(x, 1)))
        if self.kind == "scale":
            return self.act(x) * self.scale
        if self.kind == "split":
            c = x.size(1)
            return self.a(x[:, : c // 2]) + self.b(x[:, c // 2 :])
        if self.kind == "shuffle":
            n, c, h, w = x.size()
            return x.view(n, 2, c // 2, h, w).transpose(1, 2).reshape(n, c, h, w)
        return self.act(self.a(x))


class Network(nn.Module):
    def __init__(self, draw: Any) -> None:
        super().__init__()
        blocks: list[nn.Module] = [nn.Conv2d(3, 6, 3, padding=1)]
        c = 6
        for kind in draw(st.lists(st.sampled_from(KINDS), min_size=1, max_size=5)):
            if c > 24 and kind == "concat":
                continue
            block = Block(kind, c, draw)
            blocks.append(block)
            c = block.width
        self.blocks = nn.Sequential(*blocks)
        self.is_flat, self.is_pair = draw(st.booleans()), draw(st.booleans())
        side = 2 if self.is_flat else 1
        self.pool = nn.AdaptiveAvgPool2d(side)
        self.fc = nn.Linear(c * side * side, 4)

    def forward(self, x: Tensor) -> Any:
        y = self.blocks(x)
        z = self.fc(self.pool(y).flatten(1))
        return {"logits": z, "map": y} if self.is_pair else z


def mask_of(draw: Any) -> dict[str, float]:
    return {
        "rows": draw(st.sampled_from((0.0, 0.4, 0.7))),
        "columns": draw(st.sampled_from((0.0, 0.3))),
        "zeros": draw(st.sampled_from((0.0, 0.5))),
        "scales": draw(st.sampled_from((0.0, 0.4))),
        "layers": draw(st.sampled_from((0.0, 0.0, 0.2))),
    }


@given(st.data())
@settings(max_examples=10)
def test_convolutional_networks(data: st.DataObject) -> None:
    """Both ways of tracing keep the same channels."""
    seed = data.draw(st.integers(0, 3))
    torch.manual_seed(seed)
    model = masked(randomized(Network(data.draw), seed), seed, **mask_of(data.draw))
    x, other = (torch.randn(2, 3, 12, 12),), (torch.randn(1, 3, 14, 13),)
    found = check(model, x, others=[other])
    sizes = [sorted(shapes(o.small).values()) for o in found.values()]
    assert sizes[0] == sizes[1]


class Perceptron(nn.Module):
    def __init__(self, draw: Any) -> None:
        super().__init__()
        widths = draw(st.lists(st.integers(1, 7), min_size=1, max_size=4))
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in zip([5, *widths], [*widths, 3], strict=False))
        self.act = draw(st.sampled_from(ACTIVATIONS))()
        self.norms = nn.ModuleList(
            nn.LayerNorm(w) if draw(st.booleans()) else nn.BatchNorm1d(w) for w in widths if w
        )
        self.is_tied = draw(st.booleans()) and len(widths) > 1 and len(set(widths)) == 1
        if self.is_tied:
            for layer in list(self.layers)[1:-1]:
                layer.weight = self.layers[1].weight

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = x
        for layer, norm in zip(list(self.layers)[:-1], self.norms, strict=True):
            y = self.act(norm(layer(y)))
        return self.layers[-1](y), y


@given(st.data())
@settings(max_examples=10)
def test_perceptrons(data: st.DataObject) -> None:
    seed = data.draw(st.integers(0, 3))
    model = masked(randomized(Perceptron(data.draw), seed), seed, **mask_of(data.draw))
    x = (torch.randn(4, 5),)
    found = check(model, x)
    sizes = [sorted(shapes(o.small).values()) for o in found.values()]
    assert sizes[0] == sizes[1]
