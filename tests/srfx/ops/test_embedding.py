"""Embeddings: columns are channels, rows are positions that stay."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from srfx.ir.plan import Reason
from tests.helpers import check, kill, randomized

V, C, T = 13, 10, 5
IDS = torch.randint(0, V, (2, T))


class Tokens(nn.Module):
    """back(relu(mid(embed(ids)))); ``look`` spells the embedding."""

    def __init__(self, look: Callable[[Tensor, Tensor], Tensor] | None = None) -> None:
        super().__init__()
        self.embed, self.mid, self.back = nn.Embedding(V, C), nn.Linear(C, 7), nn.Linear(7, 3)
        self.look = look
        randomized(self)

    def forward(self, ids: Tensor) -> Tensor:
        found = self.embed(ids) if self.look is None else self.look(self.embed.weight, ids)
        return self.back(F.relu(self.mid(found)))


LOOKS: dict[str, Callable[[Tensor, Tensor], Tensor] | None] = {
    "module": None,
    "functional": lambda w, i: F.embedding(i, w),
    "torch": torch.embedding,
    "indexing": lambda w, i: w[i],
}


@pytest.mark.parametrize("name", LOOKS)
def test_columns_nobody_reads_and_columns_that_are_one_number(name: str) -> None:
    model = Tokens(LOOKS[name])
    kill(model.mid, columns=[0, 4])
    with torch.no_grad():
        model.embed.weight[:, 7] = 1.5  # folded into the bias
        model.embed.weight[:, 8] = 0
    check(model, (IDS,), kept={"embed.weight": (V, 6), "mid.weight": (7, 6)})
    with torch.no_grad():
        model.embed.weight[3, 7] = 1.25  # no constant any more: row 3 may occur
    check(model, (IDS,), kept={"embed.weight": (V, 7), "mid.weight": (7, 7)})


def test_rows_stay() -> None:
    model = Tokens()
    with torch.no_grad():
        model.embed.weight[2:5] = 0
    check(model, (IDS,), kept={"embed.weight": (V, C)})


def test_an_index_that_is_one_known_number_uses_one_row() -> None:
    """Token types: no input decides them, so the row is a constant, and the table goes."""

    class Typed(Tokens):
        def __init__(self) -> None:
            super().__init__()
            self.types = nn.Embedding(2, C)
            randomized(self)

        def forward(self, ids: Tensor) -> Tensor:
            return self.back(F.relu(self.mid(self.embed(ids) + self.types(torch.zeros_like(ids)))))

    model = Typed()
    kill(model.mid, columns=[1])
    found = check(model, (IDS,), kept={"embed.weight": (V, 9), "types.weight": ()})
    assert set(found) == {"symbolic", "export"}


def test_types_that_are_an_input_stay() -> None:
    class Typed(Tokens):
        def __init__(self) -> None:
            super().__init__()
            self.types = nn.Embedding(2, C)
            randomized(self)

        def forward(self, ids: Tensor, types: Tensor) -> Tensor:
            return self.back(F.relu(self.mid(self.embed(ids) + self.types(types))))

    model = Typed()
    kill(model.mid, columns=[1])
    with torch.no_grad():
        model.embed.weight[:, 2] = 0  # the types still vary here
    kept = {"embed.weight": (V, 9), "types.weight": (2, 9)}
    check(model, (IDS, IDS % 2), kept=kept)


def test_positions_out_of_a_buffer() -> None:
    class Placed(Tokens):
        def __init__(self) -> None:
            super().__init__()
            self.places = nn.Embedding(T + 2, C)
            self.register_buffer("position_ids", torch.arange(T + 2)[None])
            randomized(self)

        def forward(self, ids: Tensor) -> Tensor:
            return self.back(F.relu(self.mid(self.embed(ids) + self.places(self.position_ids[:, :T]))))

    model = Placed()
    kill(model.mid, columns=[1, 5])
    with torch.no_grad():
        model.embed.weight[:, 2] = 0
        model.places.weight[:, 2] = 0.5
        model.embed.weight[:, 3] = 0  # the place alone decides this channel
    check(model, (IDS,), kept={"embed.weight": (V, 7), "places.weight": (T + 2, 7)})


class Tied(nn.Module):
    """One table at both ends, a hidden layer between."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.mid = nn.Embedding(V, C), nn.Linear(C, C)
        self.head = nn.Linear(C, V, bias=False)
        self.head.weight = self.embed.weight
        randomized(self)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(torch.tanh(self.mid(self.embed(ids))))


def test_tied_table_loses_columns_dead_at_both_ends() -> None:
    model = Tied()
    kill(model.mid, rows=[0, 1], columns=[1, 2], bias=True)
    # column 0 is constant at the head and 2 unread at the embedding; only 1 is neither read nor needed
    check(model, (IDS,), parameters=(C - 1) * (V + C - 1) + C - 1)


def test_tied_table_keeps_a_constant_that_only_one_end_could_absorb() -> None:
    model = Tied()
    with torch.no_grad():
        model.embed.weight[:, 3] = 0.5
    check(model, (IDS,), parameters=C * (V + C) + C)


def test_max_norm_is_a_barrier() -> None:
    model = Tokens(lambda w, i: F.embedding(i, w, max_norm=1.0))
    kill(model.mid, columns=[0])
    check(model, (IDS,), kept={"embed.weight": (V, C)}, routes=("symbolic",))


class Bags(nn.Module):
    """back(relu(mid(bags of ids)))."""

    def __init__(self, mode: str, weighted: bool, spelling: str) -> None:
        super().__init__()
        self.embed = nn.EmbeddingBag(V, C, mode=mode, padding_idx=0)
        self.mid, self.back = nn.Linear(C, 7), nn.Linear(7, 3)
        self.weighted, self.spelling = weighted, spelling
        randomized(self)

    def forward(self, ids: Tensor, weights: Tensor) -> Tensor:
        given = weights if self.weighted else None
        if self.spelling == "module":
            found = self.embed(ids, per_sample_weights=given)
        elif self.spelling == "functional":
            found = F.embedding_bag(ids, self.embed.weight, mode=self.embed.mode, per_sample_weights=given)
        else:
            offsets = torch.arange(0, ids.numel(), T)
            found = self.embed(ids.flatten(), offsets, given.flatten() if given is not None else None)
        return self.back(F.relu(self.mid(found)))


@pytest.mark.parametrize("spelling", ["module", "functional", "offsets"])
@pytest.mark.parametrize(
    ("mode", "weighted"), [("sum", False), ("sum", True), ("mean", False), ("max", False)]
)
def test_bags_lose_columns_nobody_reads_and_columns_of_zeros(
    mode: str, weighted: bool, spelling: str
) -> None:
    model = Bags(mode, weighted, spelling)
    kill(model.mid, columns=[0, 4])
    with torch.no_grad():
        model.embed.weight[:, 7] = 1.5  # an empty bag is 0 there
        model.embed.weight[:, 8] = 0
    ids = torch.randint(0, V, (2, T))
    ids[0] = 0  # nothing but padding: an empty bag
    routes = ("symbolic",) if mode == "max" else ("symbolic", "export", "decomposed")
    if spelling == "offsets":
        routes = tuple(r for r in routes if r != "symbolic")
    kept = {"embed.weight": (V, 7), "mid.weight": (7, 7)}
    if routes:
        check(model, (ids, torch.rand(2, T)), kept=kept, routes=routes)


def test_a_maximum_over_bags_in_a_decomposed_graph_is_a_barrier() -> None:
    model = Bags("max", False, "module")
    kill(model.mid, columns=[0, 4])
    kept = {"embed.weight": (V, C)}
    check(model, (IDS, torch.rand(2, T)), kept=kept, routes=("export",), reasons=[Reason.UNRECOGNISED_CALL])
