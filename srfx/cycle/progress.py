"""The phase that runs, its optimizer steps and the best result so far, on a terminal."""

from __future__ import annotations

from types import TracebackType

from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TaskID, TextColumn, TimeElapsedColumn

from srfx.cycle.history import PhaseRecord


class CycleProgress:
    """A line that tells what goes on; nothing at all when it is off or there is no terminal.

    Args:
        is_on: whether to show it.
        n_cycles: how many cycles there are at most.
        console: where to; default standard error.
    """

    def __init__(self, is_on: bool, n_cycles: int, console: Console | None = None) -> None:
        console = console or Console(stderr=True)
        self.n_cycles = n_cycles
        self.best = ""
        self.steps = 0
        self.task: TaskID | None = None
        columns = (
            SpinnerColumn(),
            TextColumn("{task.description}"),
            TextColumn("{task.completed} steps"),
            TimeElapsedColumn(),
        )
        shown = is_on and console.is_terminal
        self.bar = Progress(*columns, console=console, transient=True) if shown else None

    def __enter__(self) -> CycleProgress:
        if self.bar is not None:
            self.bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.bar is not None:
            self.bar.stop()

    def phase(self, cycle: int, name: str) -> None:
        """A phase begins."""
        if self.bar is None:
            return
        if self.task is not None:
            self.bar.remove_task(self.task)
        self.task = self.bar.add_task(f"cycle {cycle}/{self.n_cycles} {name:<8} {self.best}", total=None)

    def step(self) -> None:
        """An optimizer step was made."""
        if self.bar is not None and self.task is not None:
            self.bar.advance(self.task)

    def done(self, record: PhaseRecord, best: PhaseRecord | None) -> None:
        """A phase ended."""
        if best is not None and best.score is not None:
            self.best = f"best so far {best.ratio:.1f}x at {best.score:.4g}"
        if self.bar is not None and record.score is not None:
            self.bar.console.print(str(record), highlight=False)
