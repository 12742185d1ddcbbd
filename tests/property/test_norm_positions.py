"""Between a norm and its linear reader, positions are repeated, joined, taken and padded (theory: Lemmas L3 and N3)."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from tests.helpers import check, kill, randomized

N_IN, WIDTH, N_OUT = 5, 8, 4

# what happens to [N, T, C] along T, whose positions the graph knows: they carry labels of their own then
MOVES: dict[str, Callable[[Tensor], Tensor]] = {
    "expand": lambda x: x[:, :1].expand(-1, 3, -1),
    "new axis": lambda x: x[:, None].expand(-1, 2, -1, -1).flatten(1, 2),
    "join": lambda x: torch.cat([x, x[:, :1]], 1),
    "take": lambda x: x[:, 1:],
    "flip": lambda x: x.flip(1),
    "pad": lambda x: F.pad(x, (0, 0, 1, 0)),
}


class Moved(nn.Module):
    """A norm of constants and others, moves, a linear reader, and what makes of tokens channels."""

    def __init__(self, norm: nn.Module, moves: tuple[str, ...], takes: str) -> None:
        super().__init__()
        self.write, self.norm, self.read = nn.Linear(N_IN, WIDTH), norm, nn.Linear(WIDTH, N_OUT)
        self.moves, self.takes = moves, takes

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.write(x))
        for move in self.moves:
            y = MOVES[move](y)
        y = self.read(y).relu()
        return y.amax(1) if self.takes == "most" else y[:, 0] if self.takes == "first" else y


@settings(max_examples=12)
@given(
    norm=st.sampled_from(("layer", "plain", "rms")),
    moves=st.lists(st.sampled_from(list(MOVES)), min_size=1, max_size=3),
    takes=st.sampled_from(("all", "first", "most")),
    dead=st.sets(st.integers(0, WIDTH - 1), min_size=3, max_size=5),
    unread=st.sets(st.integers(0, WIDTH - 1), max_size=2),
    route=st.sampled_from(("symbolic", "symbolic", "export")),
    seed=st.integers(0, 1000),
)
def test_statistics_arrive_at_every_position(
    norm: str, moves: list[str], takes: str, dead: set[int], unread: set[int], route: str, seed: int
) -> None:
    layer = {"layer": nn.LayerNorm(WIDTH), "rms": nn.RMSNorm(WIDTH, eps=1e-6)}.get(
        norm, nn.LayerNorm(WIDTH, elementwise_affine=False)
    )
    model = randomized(Moved(layer, tuple(moves), takes), seed)
    kill(model.write, rows=dead)
    kill(model.read, columns=unread)
    # zeros put in are not alike at all positions (Lemma L3), and a join is no movement (N6): there channels may stay
    kept = {} if {"pad", "join"} & set(moves) else {"write.weight": (WIDTH - len(dead), N_IN)}
    check(model, (torch.randn(2, 4, N_IN),), kept=kept, routes=(route,))
