"""Passes that weigh what they do: by bytes, or by the time it takes on a machine."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from srfx.passes._machine_costs import MachineCosts
from srfx.passes.base import HintedPass


class CostedPass(HintedPass):
    """A pass that sets readers free where that pays.

    Args:
        hints: one example or fake value for each placeholder; None takes metadata or probes.
        multiple_of: as for compaction.
        machine: what calls, multiplications and copies cost; None: the pass says what it goes by.

    After a run ``predicted_s`` says how many seconds its edits are predicted to save.
    """

    def __init__(
        self,
        hints: Sequence[Any] | None = None,
        multiple_of: int = 1,
        machine: MachineCosts | None = None,
    ) -> None:
        super().__init__(hints)
        self.multiple_of = multiple_of
        self.machine = machine
        self.predicted_s = 0.0
