"""The Squeeze-Release cycle on several processes: `torchrun --nproc-per-node 2 examples/cycle_ddp.py [--fsdp]`.

Every process runs the same cycle.  The training function wraps the model anew each time it is called, since minimize
returns another, smaller one; penalty and masks act on the wrapped parameters by themselves.  Minimize is deterministic,
and all ranks check that they made the same plan.
"""

from __future__ import annotations

import argparse
import copy

import torch
from rich.console import Console
from torch import distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

import srfx
from srfx.cycle import Phase

N_IMAGES, N_STEPS = 256, 30


def data() -> tuple[torch.Tensor, torch.Tensor]:
    """Points in eight dimensions, of which two decide."""
    x = torch.randn(N_IMAGES, 8, generator=torch.Generator().manual_seed(0))
    return x, (x[:, 0] * x[:, 1] > 0).long()


def steps(model: nn.Module, parameters: nn.Module) -> None:
    """A plain training loop; each process takes its part of the data."""
    x, y = (t[dist.get_rank() :: dist.get_world_size()] for t in data())
    optimizer = torch.optim.AdamW(parameters.parameters(), 0.02)
    for _ in range(N_STEPS):
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()


def train_ddp(model: nn.Module) -> None:
    """Wrapped and thrown away: gradients are averaged, the parameters stay the model's own."""
    wrapped = DistributedDataParallel(model)
    steps(wrapped, model)


def train_fsdp(model: nn.Module, phase: Phase) -> None:
    """A sharded copy trains; the cycle is told to act on it, and the result is gathered into the model."""
    sharded = copy.deepcopy(model)
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for layer in sharded.children():
        if list(layer.parameters()):
            fully_shard(layer, mesh=mesh)
    fully_shard(sharded, mesh=mesh)
    phase.watch(sharded)
    steps(sharded, sharded)
    with torch.no_grad():
        for mine, theirs in zip(model.parameters(), sharded.parameters(), strict=True):
            mine.copy_(theirs.full_tensor())  # type: ignore[attr-defined]
        for kept, new in zip(model.buffers(), sharded.buffers(), strict=True):
            kept.copy_(new)


def main() -> None:
    """Train, then squeeze and release; rank 0 prints what came of it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--fsdp", action="store_true", help="FSDP2 instead of DistributedDataParallel")
    parser.add_argument("--checkpoint", help="folder to resume from")
    arguments = parser.parse_args()
    dist.init_process_group("gloo")
    torch.manual_seed(0)  # the same first weights everywhere
    torch.set_num_threads(1)
    x, y = data()
    model = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 2))
    for _ in range(3):
        train_ddp(model)
    cycle = srfx.SqueezeRelease(
        model,
        train_fsdp if arguments.fsdp else train_ddp,
        lambda small: float((small(x).argmax(1) == y).float().mean()),
        x[:2],
        cycles=2,
        pruner="groups",
        penalty=1e-3,
        tolerance=0.1,
        patience=2,
        checkpoint=arguments.checkpoint,
        progress=False,
    )
    best = cycle.run()
    if dist.get_rank() == 0:
        console = Console()
        for record in cycle.history:
            console.print(record)
        console.print(f"{sum(p.numel() for p in best.parameters())} parameters are left")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
