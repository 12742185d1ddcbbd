"""Op rules: what each op does to channels.  One class for each op whatever its spelling, one file a family."""

from srfx.ops import (
    attention,
    contraction,
    conv,
    elementwise,
    embedding,
    join,
    linear,
    movement,
    norm,
    reduction,
    shape,
    spatial,
)

__all__ = [
    "attention",
    "contraction",
    "conv",
    "elementwise",
    "embedding",
    "join",
    "linear",
    "movement",
    "norm",
    "reduction",
    "shape",
    "spatial",
]
