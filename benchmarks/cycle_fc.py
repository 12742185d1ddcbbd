"""How small does a fully connected network 784-300-100-10 get on handwritten digits at the accuracy of the dense one?

`srfx.SqueezeRelease` goes through its cycles: a group penalty, pruning by magnitude, minimize with ragged reads (input
pixels that nobody reads are left out), release.  The first network with at least 45 and the first with at least 75 times
fewer parameters are taken, whatever their accuracy, and trained once more, taught by the dense network's scores.  The
test images are looked at to draw the curve, and for nothing else.

With --ablation: the cycle with and without release, under a group penalty and under L1.

Run: python -m benchmarks.cycle_fc [--seeds 0 1 2] [--threads 1] [--ablation]
"""

from __future__ import annotations

import argparse
import copy
import math
import statistics
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import srfx
from benchmarks.cycle.history import Step, as_data, count, machine, plot, table, write
from benchmarks.demo.digits import load_digits

SIZES = (45.0, 75.0)  # times fewer parameters
EPOCHS = {"train": 6, "squeeze": 6}
DENSE_EPOCHS, LAST_EPOCHS = 15, 100
CYCLE_RATE, DENSE_RATE, LAST_RATE = 3e-3, 2e-3, 1e-3
N_CYCLES, N_ABLATION_CYCLES = 60, 12
AMOUNT = 0.6  # of each layer's weights, pruned in each cycle
PENALTY, L1 = 3e-4, 6e-4
GROWTH = 1.05  # of the penalty from cycle to cycle, since its groups get smaller
BATCH = 128
COLUMNS = 2.0  # factor of the penalty on input pixels: they are stored in one place, others in two
DEAD = 1e-3  # root mean square of a group that the penalty has brought to nothing
N_TRAIN = 3200  # of the 4,000 images, when tuning; the rest stands in for the test images
EXAMPLE = torch.zeros(2, 784)


class Task:
    """The digits as rows of pixels."""

    def __init__(self, *, is_tuning: bool = False) -> None:
        digits = load_digits()
        self.images, self.labels = digits.train_images.flatten(1), digits.train_labels
        self.test = digits.test_images.flatten(1), digits.test_labels
        if is_tuning:
            self.test = self.images[N_TRAIN:], self.labels[N_TRAIN:]
            self.images, self.labels = self.images[:N_TRAIN], self.labels[:N_TRAIN]

    def accuracy(self, model: nn.Module) -> float:
        """Share of the test images that are classified rightly."""
        with torch.no_grad():
            hits = model(self.test[0]).argmax(1) == self.test[1]
        return int(hits.sum()) / len(hits)

    def train(
        self, model: nn.Module, epochs: int, rate: float, last: float = 0.0, teacher: Tensor | None = None
    ) -> None:
        """AdamW under half a cosine, down to ``last`` of the rate; the random numbers are torch's own.

        Args:
            model: left in training mode.
            epochs: how long.
            rate: learning rate at the start.
            last: share of it at the end.
            teacher: scores of the dense network, [N, 10]; they make 70 % of the loss, at temperature 2.
        """
        model.train()
        optimizer = torch.optim.AdamW(model.parameters(), rate, weight_decay=0.0)
        n_steps = len(self.labels) // BATCH
        for step in range(epochs * n_steps):
            if step % n_steps == 0:
                batches = torch.randperm(len(self.labels))[: n_steps * BATCH].split(BATCH)
            falling = 0.5 * (1 + math.cos(math.pi * step / (epochs * n_steps))) * (1 - last) + last
            optimizer.param_groups[0]["lr"] = rate * falling
            batch = batches[step % n_steps]
            scores = model(self.images[batch])
            loss = F.cross_entropy(scores, self.labels[batch])
            if teacher is not None:
                wanted = (teacher[batch] / 2).softmax(1)
                taught = F.kl_div((scores / 2).log_softmax(1), wanted, reduction="batchmean")
                loss = 0.3 * loss + 0.7 * 4 * taught
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

    def train_phase(self, model: nn.Module, phase: srfx.cycle.Phase) -> None:
        """What the cycle calls."""
        for _, penalty in phase.penalties:
            if isinstance(penalty, srfx.GroupPenalty):
                n_places = torch.zeros(penalty.groups.n_groups)
                for s in penalty.groups.slices:
                    n_places[s.groups.unique()] += 1
                penalty.scale = torch.where(n_places == 1, COLUMNS, 1.0) * penalty.sizes.sqrt()
        self.train(model, EPOCHS[phase.name], CYCLE_RATE, last=0.05)

    def dense(self, seed: int) -> nn.Module:
        """The network that all is measured against."""
        torch.manual_seed(seed)
        model = nn.Sequential(
            nn.Linear(784, 300), nn.ReLU(), nn.Linear(300, 100), nn.ReLU(), nn.Linear(100, 10)
        )
        self.train(model, DENSE_EPOCHS, DENSE_RATE)
        return model.eval()

    def cycle(self, model: nn.Module, seed: int, n_cycles: int, **options: Any) -> srfx.SqueezeRelease:
        """The cycle of this benchmark; it never stops by itself, as no accuracy is refused."""
        return srfx.SqueezeRelease(
            model,
            self.train_phase,
            self.accuracy,
            EXAMPLE,
            cycles=n_cycles,
            pruner=prune_dead,
            amount=AMOUNT,
            inputs=True,
            tolerance=1.0,
            patience=n_cycles,
            finetune=False,
            seed=seed,
            minimize_options={"ragged": True},
            progress=False,
            **options,
        )


@torch.no_grad()
def prune_dead(model: nn.Module, amount: float) -> None:
    """Zero the groups that the penalty has brought to nothing; then the smallest weights of each layer."""
    penalty = srfx.GroupPenalty(model, EXAMPLE, inputs=True)
    is_dead = penalty.norms(model) < DEAD * penalty.sizes.sqrt()
    weights = {name: p for name, p in model.named_parameters() if p.dim() == 2}
    for s in penalty.groups.slices:
        if s.name in weights:
            weights[s.name].masked_fill_(is_dead[s.groups], 0.0)
    for weight in weights.values():
        n_pruned = int(amount * weight.numel())
        if n_pruned:
            weight.masked_fill_(weight.abs() <= weight.abs().flatten().kthvalue(n_pruned).values, 0.0)


def growing(strength: float) -> Any:
    """A penalty that grows from cycle to cycle."""
    return lambda cycle: strength * GROWTH ** (cycle - 1)


@dataclass(frozen=True)
class Taken:
    """One of the sizes: the network that was taken for it, and what it came to."""

    wanted: float
    n_parameters: int
    fewer: float
    fewer_with_all_inputs: float
    index_bytes: int
    accuracy_when_taken: float
    accuracy: float
    shapes: list[list[int]]


def squeeze(task: Task, seed: int) -> tuple[dict[str, list[Step]], list[Taken]]:
    """One seed: the curve, and the networks taken from it."""
    dense = task.dense(seed)
    with torch.no_grad():
        teacher = dense(task.images)
    steps, taken = [Step(0, count(dense), task.accuracy(dense), 0.0, 0.0)], []
    longer = copy.deepcopy(dense)
    task.train(longer, LAST_EPOCHS, LAST_RATE)
    started = time.monotonic()
    cycle = task.cycle(dense, seed, N_CYCLES, penalty=growing(PENALTY), noise=0.05)
    for record in cycle:
        if record.phase != "minimize":
            continue
        assert record.score is not None
        steps.append(Step(record.cycle, record.n_parameters, record.score, time.monotonic() - started, 0.0))
        for wanted in SIZES[len(taken) :]:
            if record.ratio >= wanted:
                taken.append(_take(task, cycle.model, wanted, steps, teacher))
        print(
            table({f"seed {seed}": steps[-1:]}, "accuracy").splitlines()[-1],
            f"{record.ratio:.1f}x",
            flush=True,
        )
        if len(taken) == len(SIZES):
            break
    return {
        f"seed {seed}": steps,
        f"seed {seed}, dense longer": [
            steps[0],
            Step(0, count(longer), task.accuracy(longer.eval()), 0.0, 0.0),
        ],
    }, taken


def _take(task: Task, model: nn.Module | None, wanted: float, steps: list[Step], teacher: Tensor) -> Taken:
    """Train a copy of the network once more."""
    assert model is not None
    state = torch.get_rng_state()
    small = copy.deepcopy(model)
    task.train(small, LAST_EPOCHS, LAST_RATE, teacher=teacher)
    small.eval()
    torch.set_rng_state(state)  # the cycles go on as if nothing had been taken
    weights = [p for p in small.parameters() if p.dim() == 2]
    first = next(w for w in weights if w.shape[1] == max(v.shape[1] for v in weights))
    dense, n = steps[0].n_parameters, count(small)
    return Taken(
        wanted,
        n,
        dense / n,
        dense / (n + (784 - first.shape[1]) * first.shape[0]),
        sum(b.numel() * b.element_size() for b in small.buffers()),
        task.accuracy(model.eval()),
        task.accuracy(small),
        [list(w.shape) for w in weights],
    )


def ablate(task: Task, seed: int) -> dict[str, list[Step]]:
    """The cycle with and without release, under either penalty, as it comes out."""
    runs = {}
    for penalty, options in (("group", {"penalty": growing(PENALTY)}), ("L1", {"l1": L1})):
        for release, noise in (("release", 0.05), ("no release", None)):
            dense = task.dense(seed)
            steps = [Step(0, count(dense), task.accuracy(dense), 0.0, 0.0)]
            started = time.monotonic()
            for record in task.cycle(dense, seed, N_ABLATION_CYCLES, noise=noise, **options):
                if record.phase == "minimize" and record.score is not None:
                    passed = time.monotonic() - started
                    steps.append(Step(record.cycle, record.n_parameters, record.score, passed, 0.0))
            runs[f"{penalty}, {release}"] = steps
            print(table({f"{penalty}, {release}": steps[-1:]}, "accuracy").splitlines()[-1], flush=True)
    return runs


def summary(runs: Mapping[str, list[Step]], taken: Mapping[int, list[Taken]]) -> dict[str, Any]:
    """Means over the seeds."""
    dense = statistics.mean(runs[f"seed {seed}"][0].score for seed in taken)
    longer = statistics.mean(runs[f"seed {seed}, dense longer"][1].score for seed in taken)
    found: dict[str, Any] = {"dense": dense, "dense, trained longer": longer}
    for i, wanted in enumerate(SIZES):
        some = [networks[i] for networks in taken.values() if len(networks) > i]
        found[f"{wanted:.0f}x"] = {
            "seeds": len(some),
            "accuracy": statistics.mean(t.accuracy for t in some),
            "least fewer": min(t.fewer for t in some),
            "mean fewer": statistics.mean(t.fewer for t in some),
            "mean fewer with all inputs": statistics.mean(t.fewer_with_all_inputs for t in some),
            "mean index bytes": statistics.mean(t.index_bytes for t in some),
        }
    return found


def main() -> None:
    """Run, print the table, write the JSON and the plot."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--ablation", action="store_true")
    parser.add_argument(
        "--tune", action="store_true", help="hold out training images in place of the test images"
    )
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.set_flush_denormal(True)
    task, runs, taken = Task(is_tuning=arguments.tune), {}, {}
    if arguments.ablation:
        runs = {
            f"{name}, seed {seed}": steps
            for seed in arguments.seeds
            for name, steps in ablate(task, seed).items()
        }
        print(table(runs, "accuracy"))
        write("cycle_ablation", {"machine": machine("mlxtend"), "runs": as_data(runs)})
        plot("cycle_ablation", runs, "The cycle with and without release", "accuracy")
        return
    for seed in arguments.seeds:
        found, taken[seed] = squeeze(task, seed)
        runs |= found
        for network in taken[seed]:
            print(network, flush=True)
    means = summary(runs, taken)
    print(table(runs, "accuracy"))
    print(means)
    if arguments.tune:
        return
    write(
        "cycle_fc",
        {
            "machine": machine("mlxtend"),
            "means": means,
            "taken": {seed: [vars(t) for t in networks] for seed, networks in taken.items()},
            "runs": as_data(runs),
        },
    )
    curves = {name: steps for name, steps in runs.items() if "longer" not in name}
    plot(
        "cycle_fc",
        curves,
        "784-300-100-10, digits",
        "accuracy",
        max(means["dense"], means["dense, trained longer"]) - 0.005,
    )


if __name__ == "__main__":
    main()
