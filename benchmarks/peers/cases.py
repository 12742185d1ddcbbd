"""The masked models of the comparison: built from configurations, no downloads."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

import srfx
from tests.helpers import masked, randomized, recalibrated


class Case(NamedTuple):
    """How to make a model, and one input for it."""

    build: Callable[[], nn.Module]
    shape: tuple[int, ...]
    n_tokens: int = 0  # of the vocabulary, when the input is text


def _perceptron() -> nn.Module:
    return nn.Sequential(
        nn.Linear(784, 300), nn.ReLU(), nn.Linear(300, 100), nn.ReLU(), nn.Linear(100, 10)
    )  # fmt: skip


def _torchvision(name: str, **options: object) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        import torchvision

        return torchvision.models.get_model(name, weights=None, **options)  # type: ignore[no-any-return]

    return build


def _bert() -> nn.Module:
    from transformers import BertConfig, BertModel

    config = BertConfig(
        vocab_size=2000, hidden_size=256, num_hidden_layers=4, num_attention_heads=4, intermediate_size=1024
    )  # fmt: skip
    config.return_dict = False
    return BertModel(config)  # type: ignore[no-any-return]


PICTURE = (2, 3, 64, 64)
CASES = {
    "mlp": Case(_perceptron, (2, 784)),
    "vgg11_bn": Case(_torchvision("vgg11_bn"), PICTURE),
    "resnet18": Case(_torchvision("resnet18"), PICTURE),
    "resnet50": Case(_torchvision("resnet50"), PICTURE),
    "mobilenet_v2": Case(_torchvision("mobilenet_v2"), PICTURE),
    "densenet121": Case(_torchvision("densenet121"), PICTURE),
    "shufflenet_v2_x1_0": Case(_torchvision("shufflenet_v2_x1_0"), PICTURE),
    "efficientnet_b0": Case(_torchvision("efficientnet_b0"), PICTURE),
    "convnext_tiny": Case(_torchvision("convnext_tiny"), PICTURE),
    "vit_b_16": Case(_torchvision("vit_b_16", image_size=64), PICTURE),
    "bert": Case(_bert, (2, 32), n_tokens=2000),
}
MASKS = ("rows", "classes", "clean")
"""rows: 40 % of each layer's rows zero, biases left; 20 % of its columns zero; half of the rest zero at random.
classes: that, and a quarter of all sets of channels that can only leave together zero wherever they are stored.
clean: the easy case, only whole sets zero (40 % of them), biases and norms too, nothing at random."""


def prepare(name: str, kind: str, seed: int = 0) -> tuple[nn.Module, Tensor]:
    """The masked model in eval mode, float64, and an input; norms are calibrated so that it carries signal."""
    case = CASES[name]
    torch.manual_seed(seed)
    random.seed(seed)
    model = randomized(case.build().eval(), seed).double()
    x = (
        torch.randint(0, case.n_tokens, case.shape)
        if case.n_tokens
        else torch.randn(case.shape, dtype=torch.float64)
    )
    if kind != "clean":
        masked(model, seed, rows=0.4, columns=0.2, zeros=0.5)
    if kind != "rows":
        clear_classes(model, x, 0.4 if kind == "clean" else 0.25, seed)
    return recalibrated(model, (x,), seed).eval(), x


@torch.no_grad()
def clear_classes(model: nn.Module, x: Tensor, share: float, seed: int) -> None:
    """Zero a share of the sets of channels that can only leave together, in every tensor that stores them."""
    found = srfx.channel_groups(model, x)
    parameters = dict(model.named_parameters())
    drawn = torch.rand(found.n_groups, generator=torch.Generator().manual_seed(seed)) < share
    for part in found.slices:
        if part.name in parameters:
            is_gone = drawn[part.groups.clamp(min=0)] & (part.groups >= 0)
            parameters[part.name].masked_fill_(is_gone, 0)
