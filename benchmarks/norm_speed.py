"""How fast is a compensated norm beside a native one of the kept width?

The shapes are ConvNeXt-Tiny's (batch 8, channels last), 60 % of the channels kept. Prints a table, writes
`benchmarks/results/norm_speed.json`. Run: python -m benchmarks.norm_speed [--threads 1] [--skip-compile]
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from srfx.nn import CompensatedLayerNorm, CompensatedRMSNorm, RemovedConstants

SHAPES = [(8, 56, 56, 96), (8, 28, 28, 192), (8, 14, 14, 384), (8, 7, 7, 768)]
KEPT_SHARE = 0.6
RESULT = Path(__file__).parent / "results" / "norm_speed.json"


def time_us(
    call: Callable[[], object], native: Callable[[], object], n_rounds: int = 60
) -> tuple[float, float]:
    """Lower quartiles of both, run in turns so that a busy machine slows both alike."""
    times: tuple[list[float], list[float]] = ([], [])
    for i in range(n_rounds + 5):
        for run, found in zip((call, native), times, strict=True):
            start = time.perf_counter()
            run()
            if i >= 5:
                found.append((time.perf_counter() - start) * 1e6)
    return sorted(times[0])[n_rounds // 4], sorted(times[1])[n_rounds // 4]


def forward(norm: Callable[[Tensor], Tensor], x: Tensor) -> Callable[[], object]:
    """A call without gradients."""

    def run() -> object:
        with torch.no_grad():
            return norm(x)

    return run


def training(norm: Callable[[Tensor], Tensor], x: Tensor) -> Callable[[], object]:
    """A call forward and backward."""
    leaf = x.clone().requires_grad_(True)
    grad = torch.randn_like(norm(leaf))

    def run() -> object:
        leaf.grad = None
        return norm(leaf).backward(grad)  # type: ignore[no-untyped-call]

    return run


def main() -> None:
    """Measure every combination."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--skip-compile", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    rows = []
    print(f"torch {torch.__version__}, {arguments.threads} thread(s); times in us, ratio to the native norm")
    print(f"{'norm':30} {'mode':18} {'shape':20} {'native':>9} {'ours':>9} {'ratio':>6}")
    for *rest, width in SHAPES:
        n_kept = round(KEPT_SHARE * width)
        removed = RemovedConstants.from_values(torch.randn(width - n_kept))
        x = torch.randn(*rest, n_kept)
        pairs: list[tuple[str, nn.Module, nn.Module]] = [
            ("layer_norm", CompensatedLayerNorm(n_kept, removed), nn.LayerNorm(n_kept)),
            (
                "layer_norm emits r, mu_r",
                CompensatedLayerNorm(n_kept, removed, emits=("r", "mu_r")),
                nn.LayerNorm(n_kept),
            ),
            ("rms_norm emits r", CompensatedRMSNorm(n_kept, width, removed.sum_squares), nn.RMSNorm(n_kept)),
        ]
        for name, ours, native in pairs:
            modes = [("eager forward", forward, False), ("eager training", training, False)]
            if not arguments.skip_compile:
                modes += [("compiled forward", forward, True), ("compiled training", training, True)]
            for mode, prepare, is_compiled in modes:
                torch._dynamo.reset()
                calls = [
                    prepare(torch.compile(norm, dynamic=False) if is_compiled else norm, x)
                    for norm in (ours, native)
                ]
                ours_us, native_us = time_us(calls[0], calls[1])
                shape = "x".join(map(str, (*rest, n_kept)))
                ratio = ours_us / native_us
                print(
                    f"{name:30} {mode:18} {shape:20} {native_us:9.0f} {ours_us:9.0f} {ratio:6.2f}", flush=True
                )
                rows.append(
                    {
                        "norm": name,
                        "mode": mode,
                        "shape": [*rest, n_kept],
                        "n_total": width,
                        "native_us": round(native_us, 1),
                        "ours_us": round(ours_us, 1),
                        "ratio": round(ratio, 3),
                    }
                )
    RESULT.parent.mkdir(exist_ok=True)
    RESULT.write_text(
        json.dumps({"torch": torch.__version__, "threads": arguments.threads, "rows": rows}, indent=1) + "\n"
    )
    print(f"written: {RESULT.relative_to(Path(__file__).parents[1])}")


if __name__ == "__main__":
    main()
