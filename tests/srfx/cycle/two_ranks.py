"""What test_distributed runs on two processes under torchrun; each writes what it found to FOLDER/RANK.json."""

from __future__ import annotations

import importlib.util
import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
from torch import distributed as dist
from torch import nn
from torch.nn import functional as F

import srfx
from srfx.cycle import Phase, agree
from srfx.errors import CycleError

ROOT = Path(__file__).parents[3]


def example() -> Any:
    """The module examples/cycle_ddp.py, with fewer steps."""
    spec = importlib.util.spec_from_file_location("cycle_ddp", ROOT / "examples" / "cycle_ddp.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.N_STEPS = 4
    return module


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 2))


def after_a_phase(shown: Any, train: Any) -> dict[str, list[float]]:
    """Penalty and masks act on a wrapped or sharded model: the weights after one phase."""
    model = network()
    x, _ = shown.data()
    mask = torch.rand(16, 8, generator=torch.Generator().manual_seed(1)) > 0.5
    phase = Phase(
        1, "squeeze", model, penalties=[(0.01, srfx.GroupPenalty(model, x))], masks={"0.weight": mask}
    )
    phase.penalties = [*phase.penalties, (0.001, srfx.L1Penalty(model, x))]
    with phase.attached():
        train(model, phase)
    assert phase.n_steps == shown.N_STEPS
    assert not bool(model[0].weight[~mask].any())
    return {n: p.detach().flatten().tolist() for n, p in model.named_parameters()}


def alone(shown: Any) -> Any:
    """The same phase in one process: the mean over both halves of the data."""

    def train(model: nn.Module, phase: Phase) -> None:
        x, y = shown.data()
        optimizer = torch.optim.AdamW(model.parameters(), 0.02)
        for _ in range(shown.N_STEPS):
            optimizer.zero_grad()
            (
                0.5 * (F.cross_entropy(model(x[::2]), y[::2]) + F.cross_entropy(model(x[1::2]), y[1::2]))
            ).backward()
            optimizer.step()

    return train


def whole_run(shown: Any, folder: Path) -> list[dict[str, Any]]:
    """One cycle with a checkpoint; then the same again, which resumes and finds nothing to do."""
    x, _ = shown.data()
    scores = iter([1.0, 0.9] if dist.get_rank() == 0 else [0.2, 0.1])  # rank 0's count

    def make() -> srfx.SqueezeRelease:
        return srfx.SqueezeRelease(
            network(), shown.train_ddp, lambda _: next(scores), x[:2], cycles=1, pruner="groups",
            tolerance=0.2, finetune=False, checkpoint=folder, progress=False,
        )  # fmt: skip

    run = make()
    run.run()
    again = make()
    assert again.upcoming is None
    history = numbers(run)
    assert numbers(again) == history
    return history


def numbers(run: srfx.SqueezeRelease) -> list[dict[str, Any]]:
    """The history without what depends on the clock."""
    return [{k: v for k, v in r.to_json().items() if k != "seconds"} for r in run.history]


def disagreement() -> str:
    """Rank 1 pruned something else."""
    model = network()
    with torch.no_grad():
        model[0].weight[: 4 + dist.get_rank()] = 0
    try:
        agree.assert_same_plan(srfx.plan(srfx.minimize(model.eval(), torch.zeros(1, 8))))
    except CycleError as error:
        return str(error)
    return ""


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    shown = example()
    found = {
        "alone": after_a_phase(shown, alone(shown)),
        "ddp": after_a_phase(shown, lambda model, _: shown.train_ddp(model)),
        "fsdp": after_a_phase(shown, shown.train_fsdp),
        "run": whole_run(shown, folder / "checkpoint"),
        "disagreement": disagreement(),
    }
    (folder / f"{dist.get_rank()}.json").write_text(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()
    # Gloo's threads may drop their last tensors while the interpreter is taken down, which aborts the process.
    sys.stderr.flush()
    os._exit(0)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
