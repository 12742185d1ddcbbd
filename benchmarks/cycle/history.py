"""What each phase of a run came to, as a table, JSON and a plot."""

from __future__ import annotations

import json
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import matplotlib
import torch
from torch import nn

import srfx

matplotlib.use("Agg")  # writes a file; asks for no screen

from matplotlib import pyplot as plt

RESULTS = Path(__file__).parents[1] / "results"


@dataclass(frozen=True)
class Step:
    """One phase."""

    phase: int  # 0 is the dense network
    n_parameters: int
    score: float  # accuracy, or loss
    seconds: float
    difference: float | None = None  # of the outputs before and after minimize, relative to the largest


def count(model: nn.Module) -> int:
    """Parameters, shared ones once."""
    return sum(p.numel() for p in model.parameters())


def ragged(model: nn.Module, example: torch.Tensor) -> dict[str, int]:
    """What ``ragged=True`` takes beyond the aligned result: parameters before and after, and its indices.

    The indices and constants that it stores are counted in units of 4 bytes, as many as a parameter takes.
    """
    small = srfx.minimize(model, example, ragged=True)
    created = set(srfx.report(small).created)
    stored = sum(b.numel() * b.element_size() for name, b in small.named_buffers() if name in created)
    found = {"aligned": count(model), "ragged": count(small), "indices": stored // 4}
    print(f"ragged: {found['aligned']:,} parameters, {found['ragged']:,} and {found['indices']:,} of indices")
    return found


def machine(*packages: str) -> dict[str, Any]:
    """What the numbers were made on, and with which versions."""
    return {
        "processor": _processor(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        **{name: _version(name) for name in packages},
    }


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{len(names)} x {names[0]}" if names else platform.machine()


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"


def table(runs: Mapping[str, Sequence[Step]], unit: str) -> str:
    """One line a phase: parameters, how many times fewer, score, seconds."""
    lines = [f"{'run':14} {'phase':>5} {'parameters':>12} {'fewer':>8} {unit:>10} {'seconds':>8}"]
    for name, steps in runs.items():
        for step in steps:
            fewer = f"{steps[0].n_parameters / step.n_parameters:.1f}x"
            lines.append(
                f"{name:14} {step.phase:5} {step.n_parameters:12,} {fewer:>8} {step.score:10.4f} {step.seconds:8.0f}"
            )
    return "\n".join(lines)


def as_data(runs: Mapping[str, Sequence[Step]]) -> dict[str, list[dict[str, Any]]]:
    """For the JSON file."""
    return {name: [asdict(step) for step in steps] for name, steps in runs.items()}


def write(name: str, found: Mapping[str, Any]) -> Path:
    """Write the JSON file of a benchmark into its results."""
    path = RESULTS / f"{name}.json"
    path.write_text(json.dumps(found, indent=1) + "\n")
    return path


def plot(
    name: str, runs: Mapping[str, Sequence[Step]], title: str, unit: str, worst: float | None = None
) -> Path:
    """Draw score against size, one line a run, the last phase as a large dot.

    Args:
        name: of the file, without suffix.
        runs: their phases.
        title: above the picture.
        unit: what the scores are.
        worst: the score that must not be passed, a dashed line.
    """
    figure, axes = plt.subplots(figsize=(7, 4))
    for label, steps in runs.items():
        fewer = [steps[0].n_parameters / step.n_parameters for step in steps]
        scores = [step.score for step in steps]
        line = axes.plot(fewer, scores, marker=".", linewidth=1, label=label)[0]
        axes.plot(fewer[-1:], scores[-1:], marker="o", markersize=8, color=line.get_color())
    if worst is not None:
        axes.axhline(worst, linestyle="--", linewidth=1, color="#888888", label="bound")
    axes.set_xscale("log")
    axes.set_xlabel("times fewer parameters than the dense network")
    axes.set_ylabel(unit)
    axes.set_title(title, loc="left", fontsize=10)
    axes.legend(fontsize=8, frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    path = RESULTS / f"{name}.svg"
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)
    return path
