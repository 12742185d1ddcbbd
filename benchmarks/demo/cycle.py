"""Run the Squeeze-Release demo: `make demo-cycle`, or `python -m benchmarks.demo.cycle`.

A fully connected network on real handwritten digits, made smaller in cycles by `srfx.SqueezeRelease` around a plain
training loop.  Writes the small network, the history and a picture of size against accuracy.  A run that is stopped
goes on where it was; one that is complete is shown again (remove out/cycle to start afresh).  What is accepted is decided
on the test images, so the accuracy of the last accepted network is a little flattered.
"""

import argparse
import json
import time
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import nn
from torch.nn import functional as F

import srfx
from benchmarks.demo.digits import Digits, load_digits
from benchmarks.demo.networks import Perceptron
from benchmarks.demo.picture import draw_history
from srfx.cycle import Phase, PhaseRecord

BATCH = 64
EPOCHS = {"dense": 12, "train": 5, "squeeze": 5, "finetune": 20}


def main() -> None:
    """Train a dense network, make it small, print what came of each cycle and write out/."""
    parser = argparse.ArgumentParser(prog="benchmarks.demo.cycle", description=main.__doc__)
    parser.add_argument("--out", type=Path, default=Path("out"), help="folder to write to")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--cycles", type=int, default=16)
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    # Layers this small gain nothing from a second thread. What the penalty drives to zero becomes denormal
    # on its way, and arithmetic on such numbers is many times slower.
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)

    console, start, digits = Console(), time.perf_counter(), load_digits()
    torch.manual_seed(options.seed)
    net = Perceptron()
    train(net, digits, EPOCHS["dense"])
    cycle = make(net, digits, options.cycles, options.seed, options.out / "cycle")
    for record in cycle:
        if record.score is not None:
            console.print(str(record), highlight=False)
    assert cycle.best is not None

    show(cycle.history, console)
    srfx.save(cycle.best, options.out / "cycle.srfx")
    (options.out / "cycle.json").write_text(
        json.dumps([record.to_json() for record in cycle.history], indent=1) + "\n"
    )
    draw_history(cycle.history, options.out / "cycle.png")
    console.print(
        f"\nWritten to {options.out}/ after {time.perf_counter() - start:.0f} s: cycle.srfx, .json, .png"
    )


def make(net: nn.Module, digits: Digits, cycles: int, seed: int, folder: Path | None) -> srfx.SqueezeRelease:
    """The cycle around the loop below."""

    def train_phase(model: nn.Module, phase: Phase) -> None:
        train(model, digits, EPOCHS[phase.name])

    def accuracy(model: nn.Module) -> float:
        return float((model(digits.test_images).argmax(1) == digits.test_labels).float().mean())

    return srfx.SqueezeRelease(
        net,
        train_phase,
        accuracy,
        digits.train_images[:2],
        cycles=cycles,
        pruner="layer",
        amount=0.6,
        penalty=pressure,
        inputs=True,
        noise=0.05,
        tolerance=0.005,
        patience=3,
        seed=seed,
        checkpoint=folder,
        minimize_options={"ragged": True},
    )


def pressure(cycle: int) -> float:
    """Strength of the penalty: groups get smaller from cycle to cycle, and what presses on them would too."""
    return min(2e-4 * 1.25 ** (cycle - 1), 3e-3)


def train(model: nn.Module, digits: Digits, epochs: int) -> None:
    """A plain training loop; it knows nothing of penalties and masks."""
    n_images = len(digits.train_labels)
    n_steps = n_images // BATCH
    optimizer = torch.optim.Adam(model.parameters(), 2e-3)
    cooling = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * n_steps)
    for _ in range(epochs):
        for batch in torch.randperm(n_images)[: n_steps * BATCH].split(BATCH):
            loss = F.cross_entropy(model(digits.train_images[batch]), digits.train_labels[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            cooling.step()


def show(history: list[PhaseRecord], console: Console) -> None:
    """A row for each evaluated phase."""
    table = Table("cycle", "phase", "parameters", "smaller", "accuracy", "within the tolerance")
    for r in history:
        if r.score is not None:
            table.add_row(
                str(r.cycle), r.phase, f"{r.n_parameters:,}", f"{r.ratio:.1f}x", f"{r.score:.1%}",
                "yes" if r.accepted else "no",
            )  # fmt: skip
    console.print(table)


if __name__ == "__main__":
    main()
