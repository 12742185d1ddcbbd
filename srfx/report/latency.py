"""How long a run takes, of two models in turn."""

from __future__ import annotations

import statistics
import time

import torch
from torch import fx, nn
from torch.export import ExportedProgram

from srfx.ir.generate import generate
from srfx.record.record import Record
from srfx.verify import call_arguments, generated_specs

N_RUNS, MAX_SECONDS = 30, 3.0


def latency_ms(
    before: nn.Module | ExportedProgram, small: fx.GraphModule, record: Record
) -> tuple[float, float]:
    """Median milliseconds of a run of each, at the input shapes of the record, without gradients.

    The two run by turns, so that a machine that slows down slows both.
    """
    first = before.module() if isinstance(before, ExportedProgram) else before
    args, kwargs = call_arguments(
        small, generate(small, generated_specs(record), torch.Generator().manual_seed(0))
    )
    found: tuple[list[float], list[float]] = ([], [])
    begin = time.perf_counter()
    with torch.no_grad():
        for model in (first, small):
            model(*args, **kwargs)  # the first run prepares kernels
        while len(found[0]) < N_RUNS and (len(found[0]) < 3 or time.perf_counter() - begin < MAX_SECONDS):
            for model, times in zip((first, small), found, strict=True):
                _wait()
                start = time.perf_counter()
                model(*args, **kwargs)
                _wait()
                times.append(1000 * (time.perf_counter() - start))
    return statistics.median(found[0]), statistics.median(found[1])


def _wait() -> None:
    """Until a device that works on its own has finished."""
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()
