"""How small does ConvNeXt-Tiny get on handwritten digits at the accuracy of the dense network?

The dense network is trained first.  Then, in cycles: clear the channels that are missed least (all that a channel of
the residual stream is stored in, and the hidden channels of each MLP), `srfx.minimize`, train on.  The cycles stop at a
size that is set beforehand, a last training follows, and what that gives is reported; no cycle is picked by its test
accuracy.  For comparison the dense network gets that last training too.  Each phase is kept in --work, and a run that
was stopped goes on behind the last one.

Run: python -m benchmarks.cycle_convnext [--work out/cycle_convnext] [--threads 1] [--seed 0] [--smaller 250]
"""

from __future__ import annotations

import argparse
import copy
import time
from dataclasses import asdict
from pathlib import Path

import torch
import torchvision
from torch import Generator, Tensor, fx, nn
from torch.nn import functional as F

import srfx
from benchmarks.cycle.history import Step, as_data, count, machine, plot, ragged, table, write
from benchmarks.cycle.images import as_colour, jitter
from benchmarks.cycle.pruner import LeastMissed
from benchmarks.cycle.training import Phase, accuracy, train
from benchmarks.demo.digits import Digits, load_digits

DENSE = Phase(epochs=24, learning_rate=1e-3)
CYCLE = Phase(epochs=3, learning_rate=6e-4, last_rate=0.05, warmup_steps=20)
LAST = Phase(epochs=30, learning_rate=6e-4)
SHARE = 0.4  # of the parameters, cleared in each cycle
LONGER = 900  # the number of the phase in which the dense network is trained on, for comparison
N_BATCHES = 16  # that the importance is measured on
EXAMPLE = torch.zeros(2, 3, 32, 32)


class Run:
    """Phases with numbers, each made once and kept."""

    def __init__(self, work: Path, seed: int) -> None:
        self.work, self.seed = work, seed
        digits: Digits = load_digits()
        self.images, self.labels = as_colour(digits.train_images), digits.train_labels
        self.test = as_colour(digits.test_images), digits.test_labels
        work.mkdir(parents=True, exist_ok=True)

    def generator(self, phase: int) -> Generator:
        """The random numbers of one phase, whatever was run before it."""
        return Generator().manual_seed(self.seed * 1000 + phase)

    def train(self, model: nn.Module, how: Phase, phase: int) -> None:
        """Train and say how it goes."""
        started = time.monotonic()
        train(
            model,
            self.images,
            self.labels,
            how,
            self.generator(phase),
            after_epoch=lambda epoch, loss: print(
                f"  phase {phase} epoch {epoch} loss {loss:.4f} {time.monotonic() - started:.0f} s",
                flush=True,
            ),
        )

    def dense(self) -> fx.GraphModule:
        """The network that all is measured against."""
        torch.manual_seed(self.seed)
        model = torchvision.models.convnext_tiny(num_classes=10, stochastic_depth_prob=0.0, layer_scale=0.1)
        kept = self.work / "dense.pt"
        if kept.exists():
            model.load_state_dict(torch.load(kept, weights_only=True))
        else:
            self.train(model, DENSE, 0)
            torch.save(model.state_dict(), kept)
        return fx.symbolic_trace(model)

    def cycle(self, model: fx.GraphModule, phase: int) -> tuple[fx.GraphModule, Step]:
        """Clear, minimize, train on; or what is kept of it."""
        kept = self._kept(f"phase{phase}")
        if kept is not None:
            return kept
        started, generator = time.monotonic(), self.generator(phase)
        least = LeastMissed(srfx.channel_groups(model, EXAMPLE), model)
        for batch in torch.randperm(len(self.images), generator=generator)[: N_BATCHES * 64].split(64):
            model.zero_grad()
            F.cross_entropy(model(jitter(self.images[batch], generator)), self.labels[batch]).backward()
            least.add()
        model.zero_grad()
        least.clear(SHARE)
        small = srfx.minimize(model, EXAMPLE)
        worst = difference(model, small, self.test[0][:100])
        self.train(small, CYCLE, phase)
        return self._keep(f"phase{phase}", small, phase, started, worst)

    def last(self, model: fx.GraphModule, phase: int) -> tuple[fx.GraphModule, Step]:
        """The last training, from the network of that phase; or what is kept of it."""
        kept = self._kept(f"last{phase}")
        if kept is not None:
            return kept
        started, model = time.monotonic(), copy.deepcopy(model)
        self.train(model, LAST, phase)
        return self._keep(f"last{phase}", model, phase, started, 0.0)

    def _kept(self, name: str) -> tuple[fx.GraphModule, Step] | None:
        path = self.work / f"{name}.pt"
        return torch.load(path, weights_only=False) if path.exists() else None  # files of our own making

    def _keep(
        self, name: str, model: fx.GraphModule, phase: int, started: float, worst: float
    ) -> tuple[fx.GraphModule, Step]:
        step = Step(phase, count(model), accuracy(model, *self.test), time.monotonic() - started, worst)
        torch.save((model, step), self.work / f"{name}.part")
        (self.work / f"{name}.part").rename(self.work / f"{name}.pt")
        return model, step


@torch.no_grad()
def difference(model: nn.Module, small: nn.Module, images: Tensor) -> float:
    """The largest difference of the scores, in float32, over the largest score."""
    scores = model.eval()(images)
    return float((small.eval()(images) - scores).abs().max() / scores.abs().max())


def main() -> None:
    """Run, print the table, write the JSON and the plot."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--work", type=Path, default=Path("out/cycle_convnext"))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--skip-dense", action="store_true", help="do not train the dense network any longer")
    parser.add_argument(
        "--smaller", type=float, default=250.0, help="how many times fewer parameters to stop at"
    )
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.set_flush_denormal(True)
    run = Run(arguments.work, arguments.seed)
    dense = run.dense()
    steps = [Step(0, count(dense), accuracy(dense, *run.test), 0.0, 0.0)]
    model = dense
    while count(model) * arguments.smaller > steps[0].n_parameters:
        model, step = run.cycle(model, len(steps))
        steps.append(step)
        print(table({"": steps[:1] + steps[-1:]}, "accuracy"), flush=True)
    model, last = run.last(model, len(steps))
    runs = {"cycles": [*steps, last]}
    if not arguments.skip_dense:
        runs["dense, longer"] = [steps[0], run.last(dense, LONGER)[1]]
    print(table(runs, "accuracy"))
    write(
        "cycle_convnext",
        {
            "machine": machine("torchvision"),
            "seed": arguments.seed,
            "smaller": arguments.smaller,
            "clear_share": SHARE,
            "phases": {
                name: asdict(how) for name, how in (("dense", DENSE), ("cycle", CYCLE), ("last", LAST))
            },
            "runs": as_data(runs),
            "ragged": ragged(model, EXAMPLE),
            "shapes": {name: list(p.shape) for name, p in model.named_parameters()},
        },
    )
    best_dense = max(run_[-1 if name != "cycles" else 0].score for name, run_ in runs.items())
    plot("cycle_convnext", runs, "ConvNeXt-Tiny, 27.8 M parameters, digits", "accuracy", best_dense - 0.005)


if __name__ == "__main__":
    main()
