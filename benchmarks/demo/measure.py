"""What a user asks of the smaller network: same answers, how many bytes, how fast."""

import statistics
import time
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import save_file
from torch import Tensor, nn


class Agreement(NamedTuple):
    """Two networks on the same images."""

    accuracy_before: float
    accuracy_after: float
    n_equal: int  # predictions that agree
    n_images: int


class Latency(NamedTuple):
    """Median times of one forward pass."""

    batch: int
    before_ms: float
    after_ms: float


@torch.no_grad()
def compare(before: nn.Module, after: nn.Module, images: Tensor, labels: Tensor) -> Agreement:
    """Accuracy of both, and how often they say the same."""
    said, says = before(images).argmax(1), after(images).argmax(1)
    n_images, n_equal = len(labels), int((said == says).sum())
    right_before, right_after = int((said == labels).sum()), int((says == labels).sum())
    return Agreement(right_before / n_images, right_after / n_images, n_equal, n_images)


@torch.no_grad()
def latency(before: nn.Module, after: nn.Module, images: Tensor, n_rounds: int = 200) -> Latency:
    """Time both in turn, so that whatever else the machine does meets both alike."""
    times: tuple[list[float], list[float]] = ([], [])
    for _ in range(n_rounds):
        for net, record in zip((before, after), times, strict=True):
            start = time.perf_counter()
            net(images)
            record.append(1e3 * (time.perf_counter() - start))
    return Latency(len(images), *(statistics.median(record[n_rounds // 10 :]) for record in times))


def save_weights(net: nn.Module, path: Path) -> int:
    """Write parameters and buffers as safetensors; returns the file's bytes."""
    save_file({name: tensor.contiguous() for name, tensor in net.state_dict().items()}, path)
    return path.stat().st_size


def widths(net: nn.Module) -> dict[str, int]:
    """Output channels of each linear and convolutional layer, by name."""
    found = {}
    for name, module in net.named_modules():
        if isinstance(module, nn.Linear | nn.Conv2d):
            found[name] = module.weight.shape[0]
    return found
