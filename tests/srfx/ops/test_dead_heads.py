"""Planted structure in every kind of attention: one dead head, dead lanes of values, queries and keys all go."""

from __future__ import annotations

import pytest
from torch import nn

from tests.helpers import check, kill
from tests.srfx.ops.test_attention import D, Rotary, X, eager, expanded, lanes, sdpa, sizes


# ---------------------------------------------------------------------- rotary heads
@pytest.mark.parametrize("neighbours", [False, True], ids=["halves", "neighbours"])
@pytest.mark.parametrize("attend", [sdpa(), eager()], ids=["sdpa", "eager"])
def test_dead_head_goes_where_heads_keep_different_pairs(attend: object, neighbours: bool) -> None:
    """A half of the lanes is cut off by a slice: the rule that all heads keep equally many asks only heads that stay."""
    model = Rotary(neighbours, attend)  # type: ignore[arg-type]
    kill(model.o, columns=lanes(*range(D), heads=[0]))
    pairs = [(0, 3), (1, 4), (2, 5)] if not neighbours else [(0, 1), (2, 3), (4, 5)]
    for head, pair in zip((1, 2, 3), pairs, strict=True):
        kill(model.q, lanes(*pair, heads=[head]), bias=True)
    check(model, (X,), kept=sizes(q=12, k=12, v=18, o=18), idempotent=False)


def test_dead_rotary_head_of_a_group() -> None:
    class Grouped(Rotary):
        def __init__(self) -> None:
            super().__init__(False, sdpa())
            self.n_kv, self.repeat = 2, expanded(2)
            self.k, self.v = nn.Linear(20, 2 * D), nn.Linear(20, 2 * D)

    model = Grouped()
    kill(model.o, columns=lanes(*range(D), heads=[3]))
    kill(model.q, lanes(0, 3, heads=[0, 1]), bias=True)  # the pair of key head 0
    kill(model.q, lanes(1, 4, heads=[2]), bias=True)  # the pair of key head 1
    kept = {"q.weight": (12, 20), "k.weight": (8, 20), "v.weight": (12, 20), "o.weight": (20, 18)}
    check(model, (X,), kept=kept, idempotent=False)
