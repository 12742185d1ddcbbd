"""Bring the result of minimize back into the user's own module, so that code around it goes on working."""

from srfx.apply.apply import apply_

__all__ = ["apply_"]
