"""Run passes one after the other, each to its fixpoint, and keep what they did and what they refused."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from torch import fx

from srfx.ir.plan import Edit, Refusal
from srfx.passes.base import Pass, PassResult, get_pass


@dataclass
class PipelineResult:
    """The graph module after all passes; edits and refusals with the name of their pass, in order."""

    graph_module: fx.GraphModule
    edits: list[tuple[str, Edit]] = field(default_factory=list)
    refusals: list[tuple[str, Refusal]] = field(default_factory=list)

    @property
    def modified(self) -> bool:
        """Whether any pass changed anything."""
        return bool(self.edits)


class Pipeline:
    """A fixed order of passes; callable, so it also runs inside torch.fx's PassManager.

    Args:
        passes: instances, or names of registered passes.
        max_rounds: how often one pass may run before it is called divergent.
        on_change: called after every round that changed the graph.

    Example:
        >>> from torch import fx, nn
        >>> Pipeline([])(fx.symbolic_trace(nn.ReLU())).modified
        False
    """

    def __init__(
        self,
        passes: Sequence[Pass | str],
        max_rounds: int = 100,
        on_change: Callable[[], None] | None = None,
    ) -> None:
        self.passes = [get_pass(p) if isinstance(p, str) else p for p in passes]
        self.max_rounds = max_rounds
        self.on_change = on_change

    def __call__(self, gm: fx.GraphModule) -> PipelineResult:
        """Run every pass to its fixpoint on a graph module that the caller owns.

        Returns:
            What was done; the refusals are those of each pass's last round, when all else is settled.

        Raises:
            AssertionError: when a pass still plans edits after ``max_rounds`` rounds.
        """
        result = PipelineResult(gm)
        for step in self.passes:
            last = self._settle(step, gm, result)
            result.refusals += [(step.name, refusal) for refusal in last.refusals]
        if result.modified:
            gm.recompile()
        return result

    def settle(self, gm: fx.GraphModule) -> PipelineResult:
        """Run the whole order again until it finds nothing: what a late pass makes, an early one may read.

        Returns:
            All that was done; the refusals are those of the last run.

        Raises:
            AssertionError: when there are still edits after ``max_rounds`` runs.
        """
        result = self(gm)
        last = result
        for _ in range(self.max_rounds):
            if not last.modified:
                return result
            last = self(gm)
            result.edits += last.edits
            result.refusals = last.refusals
        raise AssertionError(f"the passes still plan edits after {self.max_rounds} runs of all of them")

    def _settle(self, step: Pass, gm: fx.GraphModule, result: PipelineResult) -> PassResult:
        recompiled, step.recompiles = step.recompiles, False  # once, at the end, is enough
        try:
            for _ in range(self.max_rounds):
                done = step(gm)
                result.edits += [(step.name, edit) for edit in done.edits]
                if not done.modified:
                    return done
                if self.on_change is not None:
                    self.on_change()
        finally:
            step.recompiles = recompiled
        name = step.name or type(step).__name__
        raise AssertionError(f"pass {name!r} still plans edits after {self.max_rounds} rounds")
