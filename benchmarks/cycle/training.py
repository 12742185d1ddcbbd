"""One training loop for the image classifiers of the benchmarks: AdamW, a warm-up, a cosine, bfloat16 if asked."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Generator, Tensor, nn
from torch.nn import functional as F

from benchmarks.cycle.images import jitter


@dataclass(frozen=True)
class Phase:
    """How long and how fast to train."""

    epochs: int
    learning_rate: float
    last_rate: float = 0.0  # share of the learning rate left at the end
    warmup_steps: int = 60
    weight_decay: float = 0.05
    batch_size: int = 64
    autocast: bool = True


def decayed(parameters: list[nn.Parameter], weight_decay: float) -> list[dict[str, object]]:
    """Matrices and kernels decay, vectors do not."""
    return [
        {"params": [p for p in parameters if p.squeeze().dim() > 1], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.squeeze().dim() <= 1], "weight_decay": 0.0},
    ]


def train(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    phase: Phase,
    generator: Generator,
    after_epoch: Callable[[int, float], None] = lambda epoch, loss: None,
) -> None:
    """Train in place; every random number comes from `generator`.

    Args:
        model: left in eval mode.
        images: [N, C, H, W].
        labels: [N].
        phase: how long and how fast.
        generator: of order and jitter.
        after_epoch: called with the number of the epoch and its mean loss.
    """
    n_steps = len(images) // phase.batch_size
    total = phase.epochs * n_steps
    optimizer = torch.optim.AdamW(
        decayed(list(model.parameters()), phase.weight_decay), phase.learning_rate, fused=True
    )
    model.train()
    step = 0
    for epoch in range(phase.epochs):
        order = torch.randperm(len(images), generator=generator)[: n_steps * phase.batch_size]
        losses = []
        for batch in order.split(phase.batch_size):
            falling = 0.5 * (1 + math.cos(math.pi * step / total)) * (1 - phase.last_rate) + phase.last_rate
            rate = phase.learning_rate * min(1.0, (step + 1) / max(1, phase.warmup_steps)) * falling
            for group in optimizer.param_groups:
                group["lr"] = rate
            with torch.autocast("cpu", torch.bfloat16, enabled=phase.autocast):
                scores = model(jitter(images[batch], generator))
            loss = F.cross_entropy(scores.float(), labels[batch])
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            losses.append(float(loss.detach()))
            step += 1
        after_epoch(epoch, sum(losses) / len(losses))
    model.eval()


@torch.no_grad()
def accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    """Share of the images that are classified rightly, in float32."""
    model.eval()
    hits = sum(
        int((model(some).argmax(1) == right).sum())
        for some, right in zip(images.split(250), labels.split(250), strict=True)
    )
    return hits / len(labels)
