"""An output layer tied to the embedding, behind the final norm of a residual stream (docs/norms.md, section 5)."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

import srfx
from srfx.errors import ApplyError
from srfx.ir.plan import Reason
from srfx.minimize import minimize
from tests.helpers import check, count, kill, randomized

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


def with_constants(model: nn.Module, token: float, values: list[float], dead: list[int] = DEAD) -> nn.Module:
    """The stream's channels ``dead`` are these constants; the table's columns there are all ``token``."""
    randomized(model)
    kill(model.block.down, rows=dead)
    with torch.no_grad():
        model.tokens.weight[:, dead] = token
        model.places.weight[:, dead] = torch.tensor(values) - token
        model.block.down.bias[dead] = 0.0
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


@pytest.mark.parametrize(("values", "n_layer", "n_rms"), CONSTANTS)
@pytest.mark.parametrize("norm", [nn.LayerNorm, nn.RMSNorm])
def test_constants_that_the_tied_layer_reads_go_into_a_small_matrix(
    norm: type[nn.Module], values: list[float], n_layer: int, n_rms: int
) -> None:
    """One nonzero number in every row of the table: statistics, with a matrix of V rows for the tied layer alone."""
    is_centred = norm is nn.LayerNorm
    dead, n = [0, 1, 4, 7, 9], n_layer if is_centred else n_rms
    model = with_constants(Language(norm, has_value=True), 0.5, [*values, *values[:2]], dead)
    n_extra = V * (n + is_centred) if n else 0  # a layer norm's shift makes a bias
    wanted = n_parameters(C - len(dead), n, is_centred) + n_extra + (C - len(dead) + n + 1)
    found = check(model, (IDS,), parameters=wanted)
    shape = {"head_statistics.weight": (V, n)} if n else {}
    for outcome in found.values():
        sizes = [tuple(p.shape) for p in outcome.small.parameters()]
        assert all(size in sizes for size in shape.values())
        assert not outcome.refusals
    for ragged in check(model, (IDS,), ragged=True).values():
        assert count(ragged.small) <= wanted


def test_a_small_matrix_that_is_none_is_declined() -> None:
    """Three columns of the table are no more than those of two statistics and a bias."""
    model = with_constants(Language(nn.LayerNorm), 0.5, [1.5, -0.75, 0.25])
    found = check(model, (IDS,), parameters=n_parameters(C, 0, True), reasons=[Reason.SHARED_WEIGHT])
    for outcome in found.values():
        refusal = next(r for r in outcome.refusals if r.reason is Reason.SHARED_WEIGHT)
        assert "norm" in refusal.node
        assert "weight used elsewhere" in refusal.detail


@pytest.mark.parametrize(("values", "n_layer", "n_rms"), CONSTANTS)
@pytest.mark.parametrize("norm", [nn.LayerNorm, nn.RMSNorm])
def test_a_private_layer_beside_the_tied_one_takes_statistics(
    norm: type[nn.Module], values: list[float], n_layer: int, n_rms: int
) -> None:
    is_centred = norm is nn.LayerNorm
    n = n_layer if is_centred else n_rms
    model = with_constants(Language(norm, has_value=True), 0.0, values)
    wanted = n_parameters(C - len(DEAD), n, is_centred) + (C - len(DEAD) + n + 1)
    check(model, (IDS,), parameters=wanted, kept={"value.weight": (1, C - len(DEAD) + n)})
    for ragged in check(model, (IDS,), ragged=True).values():
        assert count(ragged.small) <= wanted


@pytest.mark.parametrize("token", [0.0, 0.5])
@pytest.mark.parametrize("norm", [nn.LayerNorm, nn.RMSNorm])
def test_minimized_trained_pruned_minimized(norm: type[nn.Module], token: float) -> None:
    """The slice in front of the tied layer is understood again: further channels go, the statistics stay."""
    dead = [0, 1, 4, 7, 9]
    small: nn.Module = with_constants(
        Language(norm, has_value=True), token, [1.5, -0.75, 0.25, 1.0, 2.0], dead
    )
    small = minimize(fx.symbolic_trace(small), (IDS,))
    width = C - len(dead)
    assert small.tokens.weight.shape == (V, width)
    optimizer = torch.optim.SGD(small.parameters(), lr=0.05)
    for _ in range(3):
        optimizer.zero_grad()
        logits, value = small(IDS)
        (logits.square().mean() + value.square().mean()).backward()
        optimizer.step()
    assert all(p.grad is not None for p in small.parameters())
    kill(small.block.down, rows=[2, 3])
    with torch.no_grad():
        small.tokens.weight[:, [2, 3]] = 0.0
        small.places.weight[:, [2, 3]] = torch.tensor([0.5, -2.0])
    names = {n for n, _ in small.named_parameters()}
    found = check(small, (IDS,), routes=("symbolic",))["symbolic"].small
    assert found.tokens.weight.shape == (V, width - 2)
    assert {n for n, _ in found.named_parameters()} == names
    assert found.value.weight.shape[1] == small.value.weight.shape[1] - 2


def test_it_exports_and_scripts_to_onnx(tmp_path: Path) -> None:
    runtime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    model = with_constants(
        Language(nn.LayerNorm, has_value=True), 0.5, [1.5, -0.75, 0.25, 1.0, 2.0], [0, 1, 4, 7, 9]
    )
    small = minimize(fx.symbolic_trace(model), (IDS,))
    torch.testing.assert_close(torch.export.export(small, (IDS,)).module()(IDS), model(IDS))
    path = tmp_path / "tied.onnx"
    torch.onnx.export(small, (IDS,), str(path), dynamo=True, verbose=False)
    session = runtime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    logits, value = session.run(None, {session.get_inputs()[0].name: IDS.numpy()})
    torch.testing.assert_close((torch.tensor(logits), torch.tensor(value)), model(IDS), rtol=1e-4, atol=1e-5)


def test_the_module_itself_cannot_take_a_layer_more() -> None:
    model = with_constants(Language(nn.LayerNorm), 0.5, [1.5, -0.75, 0.25, 1.0, 2.0], [0, 1, 4, 7, 9])
    small = minimize(model, (IDS,))
    with pytest.raises(ApplyError, match=r"head_statistics\.weight: the small model has a layer more"):
        srfx.apply_(model, small)


class Decoder(nn.Module):
    """A masked language model: the norm in front of the tied layer is that of another stream than the embedding's."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.change, self.norm = nn.Embedding(V, C), nn.Linear(C, C), nn.LayerNorm(C)
        self.head, self.value = nn.Linear(C, V), nn.Linear(C, 2)
        self.head.weight = self.tokens.weight

    def forward(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        y = self.norm(F.gelu(self.change(self.tokens(ids))))
        return self.head(y), self.value(y)


def test_a_table_of_another_stream_stays() -> None:
    model = randomized(Decoder())
    kill(model.change, rows=DEAD)
    found = check(model, (IDS,), kept={"change.weight": (C, C), "value.weight": (2, C)})
    assert all(Reason.SHARED_WEIGHT in outcome.reasons for outcome in found.values())


class Beside(nn.Module):
    """Two readers of one norm: one takes statistics, the other is linear and has a bias that is computed."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Linear(6, C), nn.LayerNorm(C)
        self.value, self.scale = nn.Linear(C, 2), nn.Linear(6, 4)
        self.weight = nn.Parameter(torch.ones(4, C))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = self.norm(self.stem(x))
        return self.value(y), F.linear(y, self.weight, self.scale(x[0]))


def test_a_reader_without_a_bias_of_its_own_is_bound() -> None:
    """It reads the norm's channels in front of the statistics, and those that are dead for it go."""
    model, x = randomized(Beside()), torch.randn(3, 6)
    kill(model.stem, rows=DEAD)
    check(model, (x,), kept={"stem.weight": (C, 6)}, reasons=[Reason.NOT_LINEAR_IN_NORM])
    with torch.no_grad():
        model.weight[:, DEAD] = 0.0
    check(model, (x,), kept={"stem.weight": (C - len(DEAD), 6), "value.weight": (2, C - len(DEAD) + 2)})


class Sliced(nn.Module):
    """A norm read by a layer, and as it is from channel 1 on."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm, self.value = nn.Linear(6, C), nn.LayerNorm(C), nn.Linear(C, 2)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = self.norm(self.stem(x))
        return self.value(y), torch.relu(y.narrow(1, 1, C - 1))


def test_a_slice_behind_the_place_of_a_statistic() -> None:
    """The statistic of channel 0 comes to stand behind all others, so the slice starts at 0; no channel count differs."""
    model, x = randomized(Sliced()), torch.randn(3, 6)
    kill(model.stem, rows=[0])
    check(model, (x,), kept={"stem.weight": (C - 1, 6), "value.weight": (2, C)})
    kill(model.stem, rows=[0, 4])  # read as it is: it stays
    kept = {"stem.weight": (C - 1, 6), "value.weight": (2, C)}
    check(model, (x,), kept=kept, reasons=[Reason.NOT_LINEAR_IN_NORM])


class Product(nn.Module):
    """A product without a place for a bias beside a layer that takes statistics."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm, self.value = nn.Linear(6, 2 * C), nn.LayerNorm(2 * C), nn.Linear(2 * C, 40)
        self.weight, self.other = nn.Parameter(torch.ones(2 * C, 30)), nn.Linear(2 * C, 3)

    def forward(self, x: Tensor) -> Tensor:
        z = self.stem(x)
        y = self.norm(z)
        total: Tensor = self.value(y).sum(-1) + (y @ self.weight).relu().sum(-1) + self.other(z).sum(-1)
        return total


def test_a_norm_with_a_bound_reader_writes_what_is_read() -> None:
    """Constants go behind the product too where it does not read them; and what nobody reads is not written."""
    model, x = randomized(Product()), torch.randn(3, 6)
    unread = list(range(10, 20))
    kill(model.value, columns=unread)
    with torch.no_grad():
        model.weight[unread] = 0.0
    width = 2 * C - len(unread)
    check(model, (x,), kept={"stem.weight": (2 * C, 6), "value.weight": (40, width), "weight": (width, 30)})
    kill(model.stem, rows=[0, 1, 2])
    with torch.no_grad():
        model.weight[[0, 1, 2]] = 0.0
    kept = {"stem.weight": (2 * C - 3, 6), "value.weight": (40, width - 1), "weight": (width - 3, 30)}
    check(model, (x,), kept=kept)
