"""How small does a fully connected network 784-300-100-10 get on handwritten digits at the accuracy of the dense one?

`srfx.SqueezeRelease` goes through its cycles: a group penalty, pruning by magnitude, minimize with ragged reads (input
pixels that nobody reads are left out), release.  The first network with at least 45 and the first with at least 75 times
fewer parameters are taken, whatever their accuracy, and trained once more: on mixtures of two images each, taught by
the labels and by the scores of the dense network, which was itself trained on for long.  A second run leaves all 784
pixels in, as minimize does without ragged reads.  The test images are looked at to draw the curve, and for nothing else.

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

SIZES = {"ragged": (45.0, 75.0), "all inputs": (20.0,)}  # times fewer parameters
EPOCHS = {"train": 6, "squeeze": 6}
DENSE_EPOCHS, LONGER_EPOCHS, LAST_EPOCHS = 15, 100, 150
CYCLE_RATE, DENSE_RATE, LONGER_RATE, LAST_RATE = 3e-3, 2e-3, 1e-3, 1e-3
TEMPERATURE = 2.0  # of the scores that teach
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
        self, model: nn.Module, epochs: int, rate: float, last: float = 0.0, teacher: nn.Module | None = None
    ) -> None:
        """AdamW under half a cosine, down to ``last`` of the rate; the random numbers are torch's own.

        Args:
            model: left in training mode.
            epochs: how long.
            rate: learning rate at the start.
            last: share of it at the end.
            teacher: makes one half of the loss then, the labels the other, on mixtures of two images each.
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
            images, labels = self.images[batch], self.labels[batch]
            loss = (
                F.cross_entropy(model(images), labels)
                if teacher is None
                else self._taught(model, teacher, images, labels)
            )
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

    @staticmethod
    def _taught(model: nn.Module, teacher: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
        """Loss on mixtures of two images each: one half from both labels, one from the teacher's scores."""
        share, order = float(torch.rand(())), torch.randperm(len(labels))
        mixed = share * images + (1 - share) * images[order]
        with torch.no_grad():
            wanted = (teacher(mixed) / TEMPERATURE).softmax(1)
        scores = model(mixed)
        right = share * F.cross_entropy(scores, labels) + (1 - share) * F.cross_entropy(scores, labels[order])
        taught = F.kl_div((scores / TEMPERATURE).log_softmax(1), wanted, reduction="batchmean")
        return 0.5 * right + 0.5 * TEMPERATURE**2 * taught

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

    def cycle(
        self, model: nn.Module, seed: int, n_cycles: int, *, is_ragged: bool = True, **options: Any
    ) -> srfx.SqueezeRelease:
        """The cycle of this benchmark; it never stops by itself, as no accuracy is refused."""
        return srfx.SqueezeRelease(
            model,
            self.train_phase,
            self.accuracy,
            EXAMPLE,
            cycles=n_cycles,
            pruner=lambda net, amount: prune_dead(net, amount, is_ragged),
            amount=AMOUNT,
            inputs=is_ragged,
            tolerance=1.0,
            patience=n_cycles,
            finetune=False,
            seed=seed,
            minimize_options={"ragged": is_ragged},
            progress=False,
            **options,
        )


@torch.no_grad()
def prune_dead(model: nn.Module, amount: float, has_inputs: bool) -> None:
    """Zero the groups that the penalty has brought to nothing; then the smallest weights of each layer."""
    penalty = srfx.GroupPenalty(model, EXAMPLE, inputs=has_inputs)
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


def squeeze(task: Task, seed: int) -> tuple[dict[str, list[Step]], dict[str, list[Taken]]]:
    """One seed: the curves, and the networks taken from them."""
    dense = task.dense(seed)
    longer = copy.deepcopy(dense)
    task.train(longer, LONGER_EPOCHS, LONGER_RATE)
    taught = copy.deepcopy(longer.eval())
    task.train(taught, LAST_EPOCHS, LAST_RATE, teacher=longer)
    start = Step(0, count(dense), task.accuracy(dense), 0.0)
    runs, taken = {}, {}
    for name, other in (("dense longer", longer), ("dense taught", taught.eval())):
        runs[f"{name}, seed {seed}"] = [start, Step(0, count(other), task.accuracy(other), 0.0)]
    for form, sizes in SIZES.items():
        runs[f"{form}, seed {seed}"], taken[form] = _curve(
            task, seed, dense, longer, [start], sizes, is_ragged=form == "ragged"
        )
    return runs, taken


def _curve(
    task: Task,
    seed: int,
    dense: nn.Module,
    teacher: nn.Module,
    steps: list[Step],
    sizes: tuple[float, ...],
    *,
    is_ragged: bool,
) -> tuple[list[Step], list[Taken]]:
    """Cycles until the last of the sizes is passed."""
    taken: list[Taken] = []
    started = time.monotonic()
    cycle = task.cycle(dense, seed, N_CYCLES, is_ragged=is_ragged, penalty=growing(PENALTY), noise=0.05)
    for record in cycle:
        if record.phase != "minimize":
            continue
        assert record.score is not None
        steps.append(Step(record.cycle, record.n_parameters, record.score, time.monotonic() - started))
        for wanted in sizes[len(taken) :]:
            if record.ratio >= wanted:
                taken.append(_take(task, cycle.model, wanted, steps, teacher))
        print(table({f"seed {seed}": steps}, "accuracy").splitlines()[-1], flush=True)
        if len(taken) == len(sizes):
            break
    return steps, taken


def _take(task: Task, model: nn.Module | None, wanted: float, steps: list[Step], teacher: nn.Module) -> Taken:
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
            steps = [Step(0, count(dense), task.accuracy(dense), 0.0)]
            started = time.monotonic()
            for record in task.cycle(dense, seed, N_ABLATION_CYCLES, noise=noise, **options):
                if record.phase == "minimize" and record.score is not None:
                    passed = time.monotonic() - started
                    steps.append(Step(record.cycle, record.n_parameters, record.score, passed))
            runs[f"{penalty}, {release}"] = steps
            print(table({f"{penalty}, {release}": steps[-1:]}, "accuracy").splitlines()[-1], flush=True)
    return runs


def summary(runs: Mapping[str, list[Step]], taken: Mapping[int, Mapping[str, list[Taken]]]) -> dict[str, Any]:
    """Means over the seeds."""
    found: dict[str, Any] = {
        "dense": statistics.mean(runs[f"ragged, seed {seed}"][0].score for seed in taken)
    }
    for name in ("dense longer", "dense taught"):
        found[name] = statistics.mean(runs[f"{name}, seed {seed}"][1].score for seed in taken)
    for form, sizes in SIZES.items():
        for i, wanted in enumerate(sizes):
            some = [networks[form][i] for networks in taken.values() if len(networks[form]) > i]
            if not some:
                continue
            found[f"{form}, {wanted:.0f}x"] = {
                "seeds": len(some),
                "accuracy": statistics.mean(t.accuracy for t in some),
                "accuracy when taken": statistics.mean(t.accuracy_when_taken for t in some),
                "least fewer": min(t.fewer for t in some),
                "mean fewer": statistics.mean(t.fewer for t in some),
                "mean fewer with all inputs": statistics.mean(t.fewer_with_all_inputs for t in some),
                "mean parameters": statistics.mean(t.n_parameters for t in some),
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
        for network in (t for networks in taken[seed].values() for t in networks):
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
            "taken": {
                seed: {form: [vars(t) for t in some] for form, some in networks.items()}
                for seed, networks in taken.items()
            },
            "runs": as_data(runs),
        },
    )
    curves = {name: steps for name, steps in runs.items() if "dense" not in name}
    plot(
        "cycle_fc",
        curves,
        "784-300-100-10, digits",
        "accuracy",
        max(value for name, value in means.items() if name.startswith("dense")) - 0.005,
    )


if __name__ == "__main__":
    main()
