"""Models drawn at random, as readable Python."""

from srfx.testing.programs.choices import Choices, shrink
from srfx.testing.programs.program import Program, generate, of_seed, replay

__all__ = ["Choices", "Program", "generate", "of_seed", "replay", "shrink"]
