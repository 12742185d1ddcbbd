"""The picture of the demo: what each layer kept."""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # writes a file; asks for no screen

from matplotlib import pyplot as plt

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
