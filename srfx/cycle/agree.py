"""More than one process: every rank has to do the same; what rank 0 says counts where they could differ."""

from __future__ import annotations

import torch
from torch import distributed as dist

from srfx.errors import CycleError
from srfx.record.keep_plan import KeepPlan


def is_distributed() -> bool:
    """Whether there is a default process group of more than one process."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def rank() -> int:
    """Of this process; 0 when there is one only."""
    return dist.get_rank() if is_distributed() else 0


def n_processes() -> int:
    """Of the default process group; 1 when there is none."""
    return dist.get_world_size() if is_distributed() else 1


def barrier() -> None:
    """Wait for all; nothing when there is one process."""
    if is_distributed():
        dist.barrier()


def from_rank_0(value: float) -> float:
    """The value that rank 0 has."""
    if not is_distributed():
        return value
    held = torch.tensor([value], dtype=torch.float64, device=_device())
    dist.broadcast(held, 0)
    return float(held)


def assert_same_plan(plan: KeepPlan) -> None:
    """Every rank calls it after minimize; nothing happens when there is one process.

    Raises:
        CycleError: the ranks made different plans; it names those that differ from rank 0 and what differs first.
            Raised on every rank.

    Example:
        >>> assert_same_plan(KeepPlan())
    """
    if not is_distributed():
        return
    own = torch.tensor(list(bytes.fromhex(plan.digest())), dtype=torch.uint8, device=_device())
    every = [torch.empty_like(own) for _ in range(dist.get_world_size())]
    dist.all_gather(every, own)
    others = [i for i, digest in enumerate(every) if not torch.equal(digest, every[0])]
    if others:
        kept = sum(1 for t in plan.tensors if t.kept_shape is not None)
        raise CycleError(
            f"minimize made another plan on rank {', '.join(map(str, others))} than on rank 0 (this is rank "
            f"{dist.get_rank()}, plan {plan.digest()[:12]}, {kept} tensors kept): the weights differ.  Give all ranks "
            "the same weights before pruning (DistributedDataParallel keeps them equal; random choices of a pruner "
            "need one seed), and the same version of srfx."
        )


def _device() -> torch.device:
    """Where collectives of the default group work."""
    backend = dist.get_backend()
    return torch.device("cuda", torch.cuda.current_device()) if "nccl" in backend else torch.device("cpu")
