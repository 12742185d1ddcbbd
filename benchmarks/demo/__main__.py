"""Run the demo: `make demo`, or `python -m benchmarks.demo`."""

import argparse
import copy
import json
import time
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from torch import Tensor, nn
from torch.nn.utils import prune

import srfx
from benchmarks.demo.digits import Digits, load_digits
from benchmarks.demo.measure import compare, latency, save_weights, widths
from benchmarks.demo.networks import Perceptron, ResidualNet
from benchmarks.demo.picture import Widths, draw_kept_channels
from benchmarks.demo.squeeze import Schedule, Trained, squeeze


class Case(NamedTuple):
    """One network of the demo."""

    title: str
    file: str
    network: type[Perceptron] | type[ResidualNet]
    schedule: Schedule


class Outcome(NamedTuple):
    """What is left of a case once it has run."""

    numbers: dict[str, Any]
    before: Widths
    after: Widths


CASES = (
    Case(
        "fully connected, 784-300-100-10",
        "perceptron",
        Perceptron,
        Schedule(1.8e-4, dense_epochs=8, penalty_epochs=16, finetune_epochs=8, prune_amounts=(0.5,) * 5),
    ),
    Case(
        "residual, convolutional, batch norm",
        "residual",
        ResidualNet,
        Schedule(1.8e-3, dense_epochs=8, penalty_epochs=12, finetune_epochs=4, prune_amounts=(0.5,) * 4),
    ),
)


def main() -> None:
    """Train, prune and minimize both networks; print what came of it and write out/."""
    parser = argparse.ArgumentParser(prog="benchmarks.demo", description=main.__doc__)
    parser.add_argument("--out", type=Path, default=Path("out"), help="folder to write to")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    # Layers this small gain nothing from a second thread. What the penalty drives to zero becomes denormal
    # on its way, and arithmetic on such numbers is many times slower.
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)

    console, start, digits = Console(), time.perf_counter(), load_digits()
    outcomes = {case.title: run(case, digits, options.out, options.seed, console) for case in CASES}
    draw_kept_channels(
        {title: (outcome.before, outcome.after) for title, outcome in outcomes.items()},
        options.out / "kept_channels.png",
    )
    numbers = {case.file: outcomes[case.title].numbers for case in CASES}
    (options.out / "demo.json").write_text(json.dumps(numbers, indent=2) + "\n")
    console.print(f"\nWritten to {options.out}/ after {time.perf_counter() - start:.0f} s:")
    for path in sorted(options.out.iterdir()):
        console.print(f"  {path.name}", highlight=False)


def run(case: Case, digits: Digits, out: Path, seed: int, console: Console) -> Outcome:
    """One network from its first weights to its minimized self."""
    console.rule(case.title)
    torch.manual_seed(seed)
    net = case.network()
    trained = train(net, digits, case.schedule, console)

    traced = torch.fx.symbolic_trace(net)  # the pruning hooks are still on
    start = time.perf_counter()
    small = srfx.minimize(traced, digits.test_images[:1])
    minimize_s = time.perf_counter() - start
    print(srfx.report(small))

    images, labels = digits.test_images, digits.test_labels
    same = compare(traced, small, images, labels)
    checked = srfx.verify(traced, small, inputs=(images,))
    if not checked.ok:
        raise SystemExit(f"the minimized network computes something else: {checked}")
    baked = bake(net, images)  # what one would save and run without srfx
    exact = copy.deepcopy(baked).double()  # in float64 nothing is rounded but the arithmetic itself
    rewrite = srfx.verify(exact, srfx.minimize(exact, images.double()), inputs=(images.double(),))
    sizes = [save_weights(baked, out / f"{case.file}.safetensors")]
    sizes.append(save_weights(small, out / f"{case.file}.small.safetensors"))
    torch.save(small, out / f"{case.file}.small.pt")
    times = [latency(baked, small, images[:batch]) for batch in (1, 256)]

    table = Table("", "pruned", "minimized", "", title="what came of it")
    table.add_row("accuracy", f"{same.accuracy_before:.1%}", f"{same.accuracy_after:.1%}",
                  f"dense {trained.dense_accuracy:.1%}")  # fmt: skip
    table.add_row("equal predictions", "", f"{same.n_equal} of {same.n_images}", "")
    table.add_row("largest relative error, float64", "", f"{rewrite.error:.1e}", "")
    table.add_row("the same, float32", f"{checked.native_before:.1e}", f"{checked.native_after:.1e}", "")
    table.add_row("zeros among the weights", f"{trained.share_of_zeros:.1%}", "", "")
    table.add_row("bytes on disk", f"{sizes[0]:,}", f"{sizes[1]:,}", f"{sizes[0] / sizes[1]:.1f}x")
    for took in times:
        table.add_row(f"latency, batch {took.batch}", f"{took.before_ms:.3f} ms", f"{took.after_ms:.3f} ms",
                      f"{took.before_ms / took.after_ms:.1f}x")  # fmt: skip
    table.add_row("time to minimize", "", f"{minimize_s:.2f} s", "")
    console.print(table)

    numbers = {
        **trained._asdict(),
        **same._asdict(),
        "relative_error_float64": rewrite.error,
        "relative_error_float32": checked.native_after,
        "bytes_before": sizes[0],
        "bytes_after": sizes[1],
        "latency": [took._asdict() for took in times],
        "minimize_s": minimize_s,
    }
    return Outcome(numbers, widths(net), widths(small))


def train(net: nn.Module, digits: Digits, schedule: Schedule, console: Console) -> Trained:
    """Squeeze the network behind a progress bar."""
    columns = TextColumn("{task.description:<16}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("train", total=schedule.epochs)
        return squeeze(
            net, digits, schedule, lambda phase: progress.update(task, advance=1, description=phase)
        )


@torch.no_grad()
def bake(net: nn.Module, images: Tensor) -> nn.Module:
    """A copy of the pruned network with the zeros written into plain parameters."""
    net(images[:1])  # the hooks' masked weights lose their gradient history, which deepcopy refuses
    plain = copy.deepcopy(net)
    for module in plain.modules():
        if hasattr(module, "weight_mask"):
            prune.remove(module, "weight")
    return plain


if __name__ == "__main__":
    main()
