"""An output layer tied to the embedding, behind the final norm of a residual stream (docs/norms.md, section 5)."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from srfx.ir.plan import Reason
from tests.helpers import check, kill, randomized

V, C, T, H = 23, 12, 5, 14
DEAD = [1, 4, 7]
IDS = torch.randint(0, V, (2, T), generator=torch.Generator().manual_seed(0))


class Block(nn.Module):
    def __init__(self, norm: type[nn.Module]) -> None:
        super().__init__()
        self.norm, self.up, self.down = norm(C), nn.Linear(C, H), nn.Linear(H, C)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(F.gelu(self.up(self.norm(x))))


class Language(nn.Module):
    """Token and position embeddings, one block, a final norm, and an output layer tied to the tokens."""

    def __init__(self, norm: type[nn.Module], has_value: bool = False) -> None:
        super().__init__()
        self.tokens, self.places = nn.Embedding(V, C), nn.Embedding(T, C)
        self.block, self.norm = Block(norm), norm(C)
        self.head = nn.Linear(C, V, bias=False)
        self.head.weight = self.tokens.weight
        self.value = nn.Linear(C, 1) if has_value else None
        self.register_buffer("at", torch.arange(T))

    def forward(self, ids: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        y = self.norm(self.block(self.tokens(ids) + self.places(self.at)))
        return self.head(y) if self.value is None else (self.head(y), self.value(y))


def with_constants(model: nn.Module, token: float, values: list[float]) -> nn.Module:
    """The stream's channels DEAD are these constants; the table's columns there are all ``token``."""
    randomized(model)
    kill(model.block.down, rows=DEAD)
    with torch.no_grad():
        model.tokens.weight[:, DEAD] = token
        model.places.weight[:, DEAD] = torch.tensor(values) - token
        model.block.down.bias[DEAD] = 0.0
    return model


def n_parameters(width: int, n_emitted: int, is_centred: bool) -> int:
    vectors = 2 if is_centred else 1  # weight, and bias of a layer norm
    block = (width + n_emitted) * H + H + width * H + width + vectors * width
    return V * width + T * width + block + vectors * width


# values of the constants, statistics that the block's reader takes behind layer norm and behind RMS norm
CONSTANTS = [([0.0, 0.0, 0.0], 1, 0), ([1.5, 1.5, 1.5], 1, 1), ([1.5, -0.75, 0.25], 2, 1)]


@pytest.mark.parametrize(("values", "n_layer", "n_rms"), CONSTANTS)
@pytest.mark.parametrize("norm", [nn.LayerNorm, nn.RMSNorm])
def test_constants_that_the_tied_layer_does_not_read_go(
    norm: type[nn.Module], values: list[float], n_layer: int, n_rms: int
) -> None:
    """Zero and nonzero ones alike, at both ends of the table, and no statistic is emitted for the tied layer."""
    is_centred = norm is nn.LayerNorm
    model = with_constants(Language(norm), 0.0, values)
    wanted = n_parameters(C - len(DEAD), n_layer if is_centred else n_rms, is_centred)
    check(model, (IDS,), parameters=wanted)


def test_constants_that_the_tied_layer_reads_stay() -> None:
    """One nonzero number in every row of the table: its column cannot become a column of statistics."""
    model = with_constants(Language(nn.LayerNorm), 0.5, [1.5, -0.75, 0.25])
    found = check(model, (IDS,), parameters=n_parameters(C, 0, True), reasons=[Reason.SHARED_WEIGHT])
    for outcome in found.values():
        refusal = next(r for r in outcome.refusals if r.reason is Reason.SHARED_WEIGHT)
        assert "norm" in refusal.node
        assert "weight used elsewhere" in refusal.detail


def test_constants_stay_where_a_private_layer_reads_beside_the_tied_one() -> None:
    model = with_constants(Language(nn.LayerNorm, has_value=True), 0.0, [1.5, -0.75, 0.25])
    kept = {"value.weight": (1, C)}
    check(model, (IDS,), kept=kept, reasons=[Reason.SHARED_WEIGHT])
    kill(model.value, columns=DEAD)
    check(model, (IDS,), kept={"value.weight": (1, C - len(DEAD))})
