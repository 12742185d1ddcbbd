"""Train a network and prune it until there is structure to take.

Zeros alone are not structure: magnitude pruning scatters them, and a channel leaves only when everything that
writes or everything that reads it is zero. So training carries `srfx.GroupPenalty`, the joint norm of all that a
channel is stored in, and pruning by magnitude then clears whole channels. The masks stay what
torch.nn.utils.prune makes them: hooks. (`benchmarks.demo.cycle` leaves all of this to `srfx.SqueezeRelease`.)
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import prune

import srfx
from benchmarks.demo.digits import Digits

PRUNED = (nn.Linear, nn.Conv2d, nn.BatchNorm2d)


@dataclass(frozen=True)
class Schedule:
    """How long, how hard, how much."""

    penalty: float  # weight of the group penalty; too much of it and the network forgets everything
    dense_epochs: int  # no penalty: what the network can do
    penalty_epochs: int  # the group penalty draws whole channels towards zero
    finetune_epochs: int  # after each pruning
    prune_amounts: tuple[float, ...]  # share of the weights left that each pruning takes, over all layers
    learning_rate: float = 2e-3
    batch_size: int = 64

    @property
    def epochs(self) -> int:
        """Length of the whole run."""
        return self.dense_epochs + self.penalty_epochs + len(self.prune_amounts) * self.finetune_epochs


class Trained(NamedTuple):
    """What squeezing came to."""

    dense_accuracy: float  # before any penalty or pruning
    share_of_zeros: float  # of all prunable weights, at the end


def squeeze(net: nn.Module, digits: Digits, schedule: Schedule, advance: Callable[[str], None]) -> Trained:
    """Train, penalise, then prune and fine-tune in turns; the network keeps its pruning hooks.

    Args:
        net: changed in place, left in eval mode.
        digits: what to train and test on.
        schedule: how long and how hard.
        advance: called after each epoch with the name of the phase.
    """

    def train(epochs: int, phase: str, penalty: float) -> None:
        _train(net, digits, schedule, epochs, lambda: advance(phase), (penalty, pressure))

    pressure = srfx.GroupPenalty(net, digits.train_images[:2], inputs=True)
    train(schedule.dense_epochs, "train", 0.0)
    dense = accuracy(net, digits)
    train(schedule.penalty_epochs, "penalise", schedule.penalty)
    layers: list[nn.Module] = [module for module in net.modules() if isinstance(module, PRUNED)]
    *rounds, last = schedule.prune_amounts
    for amount in rounds:
        _prune(layers, amount)
        train(schedule.finetune_epochs, "prune, fine-tune", schedule.penalty)
    _prune(layers, last)
    train(schedule.finetune_epochs, "fine-tune", 0.0)  # no penalty: what stays may recover
    weights = torch.cat([cast(Tensor, layer.weight).flatten() for layer in layers])
    return Trained(dense, int((weights == 0).sum()) / len(weights))


@torch.no_grad()
def accuracy(net: nn.Module, digits: Digits) -> float:
    """Share of the test images that are classified rightly."""
    hits: Tensor = net(digits.test_images).argmax(1) == digits.test_labels
    return int(hits.sum()) / len(hits)


def _prune(layers: list[nn.Module], amount: float) -> None:
    """Mask the smallest weights that are left, wherever they are."""
    weights = [(layer, "weight") for layer in layers]
    prune.global_unstructured(weights, pruning_method=prune.L1Unstructured, amount=amount)


def _train(
    net: nn.Module,
    digits: Digits,
    schedule: Schedule,
    epochs: int,
    advance: Callable[[], None],
    penalty: tuple[float, srfx.GroupPenalty],
) -> None:
    strength, pressure = penalty
    n_images = len(digits.train_labels)
    n_steps = n_images // schedule.batch_size
    optimizer = torch.optim.Adam(net.parameters(), schedule.learning_rate)
    cooling = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * n_steps)
    net.train()
    for _ in range(epochs):
        order = torch.randperm(n_images)[: n_steps * schedule.batch_size]
        for batch in order.split(schedule.batch_size):
            loss = F.cross_entropy(net(digits.train_images[batch]), digits.train_labels[batch])
            if strength:
                loss = loss + strength * pressure(net)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            cooling.step()
        advance()
    net.eval()
