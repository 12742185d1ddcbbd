"""Hypothesis strategies: whole models, shrunk to few and simple steps, printed as Python."""

from __future__ import annotations

import hypothesis.strategies as st

from srfx.testing.programs import Choices, Program, generate


@st.composite
def programs(draw: st.DrawFn) -> Program:
    """A model with its masks and inputs; ``program.build()`` makes it."""
    return generate(Choices(lambda n: draw(st.integers(0, n - 1))))
