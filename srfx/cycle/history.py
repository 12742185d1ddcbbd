"""What each phase of a run came to."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from torch import nn


@dataclass(frozen=True)
class PhaseRecord:
    """One phase of `srfx.SqueezeRelease`.

    Attributes:
        cycle: number of the cycle, from 1; 0 for ``start``.
        phase: ``start`` (the model as given, minimized), ``train``, ``squeeze``, ``minimize``, ``release``, ``finetune``.
        n_parameters: of the model after the phase, shared ones once.
        n_zeros: exact zeros among them.
        ratio: parameters of the model as given / ``n_parameters``.
        score: what ``evaluate`` said; None for phases that are not evaluated.
        accepted: whether the score is within the tolerance; None where there is no score.
        n_steps: optimizer steps of the phase.
        seconds: how long it took.
        plan: digest of the plan of ``minimize``; equal on every rank.
    """

    cycle: int
    phase: str
    n_parameters: int
    n_zeros: int
    ratio: float
    score: float | None = None
    accepted: bool | None = None
    n_steps: int = 0
    seconds: float = 0.0
    plan: str | None = None

    def __str__(self) -> str:
        score = "" if self.score is None else f", score {self.score:.4g}"
        verdict = {None: "", True: "", False: " (not accepted)"}[self.accepted]
        return (
            f"cycle {self.cycle} {self.phase}: {self.n_parameters:,} parameters, {self.ratio:.2f}x smaller"
            f"{score}{verdict}, {self.seconds:.1f} s"
        )

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self)


def smallest_accepted(history: Sequence[PhaseRecord], is_better: Any) -> PhaseRecord | None:
    """The accepted record of fewest parameters, of equals that with the best score."""
    best: PhaseRecord | None = None
    for record in history:
        if record.accepted and (
            best is None
            or record.n_parameters < best.n_parameters
            or (record.n_parameters == best.n_parameters and is_better(record.score, best.score))
        ):
            best = record
    return best


def count(model: nn.Module) -> tuple[int, int]:
    """Parameters and exact zeros among them."""
    parameters = list(model.parameters())
    return sum(p.numel() for p in parameters), sum(int((p == 0).sum()) for p in parameters)


def fruitless_cycles(history: Sequence[PhaseRecord]) -> int:
    """Cycles since the last one that gave a smaller accepted model."""
    smallest, n = history[0].n_parameters, 0
    for record in history[1:]:
        if record.phase == "minimize":
            n += 1
            if record.accepted and record.n_parameters < smallest:
                smallest, n = record.n_parameters, 0
    return n
