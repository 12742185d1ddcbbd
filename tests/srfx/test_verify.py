"""The verifier: it has to notice what is wrong, pass what is right, and leave both models alone."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn.utils import prune

import srfx
from srfx.errors import VerificationError
from srfx.verify import relative_error
from tests.helpers import masked, randomized
from tests.snapshots import assert_unchanged, snapshot, trace


def network() -> nn.Sequential:
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Dropout(0.3),
        nn.Conv2d(8, 8, 3, padding=1),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, 5),
    )
    return masked(randomized(model))


X = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("route", ["symbolic", "export"])
def test_a_right_result_is_ok(dtype: torch.dtype, route: str) -> None:
    traced = trace(network().to(dtype), (X.to(dtype),), route)
    small = srfx.minimize(traced)
    for inputs in (None, X.to(dtype), (X.to(dtype),)):
        found = srfx.verify(traced, small, inputs)
        assert found.ok, str(found)
        assert found.dtype == dtype
        assert found.n_batches == (3 if inputs is None else 1)
        assert found.error <= found.error_bound
        if dtype == torch.float64:
            assert found.error_bound == 1e-9
            assert found.error < 1e-12


@pytest.mark.parametrize("size", [1e-3, 1e-2, 1.0])
@pytest.mark.parametrize("tensor", ["0.weight", "1.bias", "4.weight", "8.bias"])
def test_a_wrong_result_is_not(size: float, tensor: str) -> None:
    model = network()
    small = srfx.minimize(fx.symbolic_trace(model))
    with torch.no_grad():
        small.get_parameter(tensor).mul_(1 + size)
    found = srfx.verify(model, small, X)
    assert not found.ok
    assert found.error > found.error_bound
    assert "NOT equal" in str(found)
    assert f"{found.error:.2g}" in str(found)


def test_float64_models_are_held_to_1e_9() -> None:
    model = network().double()
    small = srfx.minimize(fx.symbolic_trace(model), X.double())
    assert srfx.verify(model, small).ok
    with torch.no_grad():
        small.get_parameter("8.bias").add_(1e-7)
    assert not srfx.verify(model, small).ok


def test_both_models_are_left_alone() -> None:
    model = network().train()
    prune.random_unstructured(model[8], "weight", 0.5)
    traced = fx.symbolic_trace(model)
    small = srfx.minimize(traced, X)
    befores = [(m, snapshot(m)) for m in (model, traced, small)]
    default, state = torch.get_default_dtype(), torch.get_rng_state()
    assert srfx.verify(model, small).ok
    assert srfx.verify(traced, small, X).ok
    for module, before in befores:
        assert_unchanged(module, before)
    assert torch.get_default_dtype() == default
    assert torch.equal(torch.get_rng_state(), state)


def test_the_default_dtype_comes_back_after_an_error() -> None:
    with pytest.raises(RuntimeError):
        srfx.verify(network(), network(), torch.randn(2, 7, 8, 8))
    assert torch.get_default_dtype() == torch.float32


class Casts(nn.Module):
    """Dtypes written down in every way: the float64 run has to see through them."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 16), nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.a(x)).float()
        x = x * torch.ones(16, dtype=torch.float32) + torch.zeros(1)
        x = (x.to(torch.float32) + x.to(dtype=torch.float32)).type(torch.float32)
        return self.b(x.softmax(-1, dtype=torch.float32))


@pytest.mark.parametrize("route", ["plain", "symbolic", "export"])
def test_dtype_literals(route: str) -> None:
    model = masked(randomized(Casts()))
    x = torch.randn(4, 6)
    given: Any = model if route == "plain" else trace(model, (x,), route)
    small = srfx.minimize(given, x)
    found = srfx.verify(given, small, x)
    assert found.ok, str(found)
    exact = copy.deepcopy(model).double()
    wide = 2 * torch.relu(exact.a(x.double()))
    truth = exact.b(wide.softmax(-1))
    assert found.native_before == pytest.approx(relative_error(truth, model(x)), rel=1e-3)


class Tokens(nn.Module):
    """Integer inputs: tokens below the table's size, a mask, a flag."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.out = nn.Embedding(11, 8), nn.Linear(8, 11)

    def forward(self, tokens: Tensor, mask: Tensor, scale: float = 2.0) -> tuple[Tensor, Tensor]:
        x = self.table(tokens) * mask.unsqueeze(-1) * scale
        logits = self.out(x)
        return logits, logits.argmax(-1)


@pytest.mark.parametrize("route", ["symbolic", "export"])
def test_generated_integers_fit_their_tables(route: str) -> None:
    model = masked(randomized(Tokens()))
    inputs = (torch.randint(0, 11, (2, 7)), torch.ones(2, 7, dtype=torch.long))
    small = srfx.minimize(trace(model, inputs, route), inputs)
    found = srfx.verify(model, small)
    assert found.ok, str(found)
    assert found.shapes == (((2, 7), (2, 7)), ((2, 7), (2, 7)), ((3, 7), (3, 7)))


def test_integer_outputs_that_differ_are_counted() -> None:
    model, other = randomized(Tokens()), randomized(Tokens())
    with torch.no_grad():
        other.out.bias[3] += 100
    found = srfx.verify(model, other, (torch.randint(0, 11, (2, 7)), torch.ones(2, 7, dtype=torch.long)))
    assert found.n_mismatches > 0
    assert not found.ok
    assert "integer" in str(found)


def test_keyword_arguments() -> None:
    model = randomized(Tokens())
    named = {"tokens": torch.randint(0, 11, (2, 7)), "mask": torch.ones(2, 7, dtype=torch.long), "scale": 0.5}
    assert srfx.verify(model, model, kwargs=named).ok


def test_a_static_export_is_compared_at_its_one_batch_size() -> None:
    class Fixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(6, 8), nn.Linear(8, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.b(torch.relu(self.a(x)).reshape(2, 2, 2, 2).reshape(2, 8))

    model = masked(randomized(Fixed()))
    small = srfx.minimize(torch.export.export(model, (torch.randn(2, 6),)))
    found = srfx.verify(model, small)
    assert found.ok
    assert found.n_batches == 2


def test_other_structure_is_an_error() -> None:
    class Pair(nn.Module):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return x, x

    class Wide(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.cat([x, x])

    with pytest.raises(VerificationError, match="1 output tensors, the other 2"):
        srfx.verify(nn.Identity(), Pair(), torch.randn(3))
    with pytest.raises(VerificationError, match=r"\[3\].*\[6\]"):
        srfx.verify(nn.Identity(), Wide(), torch.randn(3))


def test_a_model_that_takes_no_random_input_says_pass_inputs() -> None:
    class Picky(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.linalg.cholesky(x - 100 * torch.eye(8))

    traced = fx.symbolic_trace(Picky())
    small = srfx.minimize(traced, torch.eye(8) * 200)
    with pytest.raises(VerificationError, match="pass inputs"):
        srfx.verify(traced, small)
    assert srfx.verify(traced, small, torch.eye(8) * 200).ok


def test_seeds() -> None:
    model = network()
    other = copy.deepcopy(model)
    with torch.no_grad():
        other[8].bias += 0.01
    errors = [srfx.verify(fx.symbolic_trace(model), other, seed=s).error for s in (0, 0, 1)]
    assert errors[0] == errors[1] != errors[2]


@pytest.mark.parametrize(
    ("truth", "other", "error"),
    [
        ([1.0, -4.0], [1.0, -4.0], 0.0),
        ([1.0, -4.0], [1.0, -3.0], 0.25),
        ([0.0, 0.0], [0.5, 0.0], 0.5),
        ([math.nan, 2.0], [math.nan, 2.0], 0.0),
        ([math.nan, 2.0], [1.0, 2.0], math.inf),
        ([2.0, 2.0], [math.nan, 2.0], math.inf),
        ([math.inf, 2.0], [math.inf, 1.0], 0.5),
        ([math.inf, 2.0], [-math.inf, 2.0], math.inf),
        ([2.0, 2.0], [math.inf, 2.0], math.inf),
        ([], [], 0.0),
    ],
)
def test_relative_error(truth: list[float], other: list[float], error: float) -> None:
    assert relative_error(torch.tensor(truth).double(), torch.tensor(other)) == error


def test_padded_positions_are_compared_without_the_fast_path() -> None:
    class Words(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            layer = nn.TransformerEncoderLayer(8, 2, 12, batch_first=True)
            self.encoder, self.head = nn.TransformerEncoder(layer, 1), nn.Linear(8, 3)

        def forward(self, x: Tensor, padded: Tensor) -> Tensor:
            return self.head(self.encoder(x, src_key_padding_mask=padded))

    model, x = randomized(Words()).eval(), torch.randn(2, 4, 8)
    padded = torch.tensor([[False, False, True, True], [False] * 4])
    with torch.no_grad():
        model.encoder.layers[0].linear1.weight[[1, 3]] = 0
        is_filled = bool((model.encoder(x, src_key_padding_mask=padded)[0, 2:] == 0).all())
    assert is_filled  # the fast path ran: where this fails, there is nothing to test any more
    traced = fx.symbolic_trace(model)
    small = srfx.minimize(traced, (x, padded))
    assert srfx.verify(traced, small, inputs=(x, padded)).ok
    assert torch.backends.mha.get_fastpath_enabled()
