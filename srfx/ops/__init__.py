"""Op rules: what each op does to channels, one class for each op whatever its spelling, one file for each family."""

from srfx.ops import (
    attention,
    contraction,
    elementwise,
    embedding,
    join,
    movement,
    norm,
    reduction,
    shape,
    spatial,
)  # noqa: F401
