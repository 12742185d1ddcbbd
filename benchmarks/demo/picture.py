"""The picture of the demo: what each layer kept."""

from collections.abc import Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # writes a file; asks for no screen

from matplotlib import pyplot as plt

from srfx.cycle import PhaseRecord

KEPT, GONE = "#1f6f8b", "#dfe6e9"

Widths = dict[str, int]


def draw_kept_channels(panels: dict[str, tuple[Widths, Widths]], path: Path) -> None:
    """Draw one bar a layer, its whole length the channels before, its dark part those that stay.

    Args:
        panels: for each network's title the widths of its layers before and after.
        path: file to write; its suffix is the format.
    """
    heights = [len(before) for before, _ in panels.values()]
    figure, all_axes = plt.subplots(
        len(panels), 1, figsize=(7, 1.2 + 0.34 * sum(heights)), height_ratios=heights, squeeze=False
    )
    for axes, (title, (before, after)) in zip(all_axes.flat, panels.items(), strict=True):
        names = list(before)
        kept = [after.get(name, 0) for name in names]
        axes.barh(names, list(before.values()), color=GONE)
        axes.barh(names, kept, color=KEPT)
        for row, name in enumerate(names):
            axes.text(before[name], row, f"  {kept[row]} of {before[name]}", va="center", fontsize=8)
        axes.set_title(title, loc="left", fontsize=10)
        axes.set_xlim(0, 1.2 * max(before.values()))
        axes.invert_yaxis()
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(labelsize=8)
    all_axes.flat[-1].set_xlabel("output channels", fontsize=9)
    figure.tight_layout()
    figure.savefig(path, dpi=150)
    plt.close(figure)


def draw_history(history: Sequence[PhaseRecord], path: Path) -> None:
    """Draw size against score, one point for each evaluated phase; open ones were not accepted.

    Args:
        history: of a `srfx.SqueezeRelease`.
        path: file to write; its suffix is the format.
    """
    found = [r for r in history if r.score is not None]
    figure, axes = plt.subplots(figsize=(7, 4))
    axes.plot([r.n_parameters for r in found], [r.score for r in found], color=GONE, zorder=1)
    for record in found:
        axes.scatter(
            record.n_parameters, record.score, s=28, zorder=2,
            facecolors=KEPT if record.accepted else "white", edgecolors=KEPT,
        )  # fmt: skip
    smallest = min((r for r in found if r.accepted), key=lambda r: r.n_parameters)
    axes.annotate(
        f"{smallest.ratio:.1f}x smaller", (smallest.n_parameters, smallest.score),
        xytext=(-10, -4), textcoords="offset points", ha="right", fontsize=9,
    )  # fmt: skip
    axes.set_xscale("log")
    axes.invert_xaxis()
    axes.set_xlabel("parameters", fontsize=9)
    axes.set_ylabel("accuracy", fontsize=9)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=150)
    plt.close(figure)
