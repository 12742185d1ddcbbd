"""Sums and means over a channel axis absorb constants, other reductions keep it (theory: Lemmas R1 and R2)."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import srfx
from srfx.ir.plan import Reason
from tests.helpers import Sandwich, check, kill, randomized, relative_error

X = (torch.randn(2, 3, 5, 4),)

OVER_CHANNELS: dict[str, Callable[[Tensor], Tensor]] = {
    "mean": lambda x: x.mean(1),
    "mean of all axes": lambda x: x.mean((1, 2, 3)),
    "mean, kept axis": lambda x: torch.mean(x, dim=1, keepdim=True) * 2,
    "mean from the end": lambda x: x.mean(-3),
    "sum": lambda x: x.sum(1),
    "sum, kept axis": lambda x: torch.sum(x, 1, keepdim=True),
}


class Reduces(nn.Module):
    """Seven channels: two constants of different sizes, one that is zero, four that vary."""

    def __init__(self, reduce: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.conv, self.reduce = nn.Conv2d(3, 7, 1), reduce

    def forward(self, x: Tensor) -> Tensor:
        return self.reduce(self.conv(x)).abs()


def network(reduce: Callable[[Tensor], Tensor]) -> Reduces:
    model = randomized(Reduces(reduce))
    kill(model.conv, rows=(1, 4, 6))
    with torch.no_grad():
        model.conv.bias[4], model.conv.bias[6] = -3.0, 0.0
    return model


@pytest.mark.parametrize("name", OVER_CHANNELS)
def test_constants_leave_a_sum_over_channels(name: str) -> None:
    check(network(OVER_CHANNELS[name]), X, kept={"conv.weight": (4, 3, 1, 1)})


def test_a_sum_over_channels_and_space_keeps_a_constant_of_unknown_share() -> None:
    """Its share is the constant times the number of positions, which differs from picture to picture."""
    others = [(torch.randn(3, 3, 6, 2),)]
    model = network(lambda x: x.sum((1, 2, 3)))
    check(model, X, others=others, kept={"conv.weight": (6, 3, 1, 1)})


def test_a_mean_over_channels_and_space_does_not() -> None:
    others = [(torch.randn(3, 3, 6, 2),)]
    check(network(lambda x: x.mean((1, 2, 3))), X, others=others, kept={"conv.weight": (4, 3, 1, 1)})


@pytest.mark.parametrize("name", ["softmax", "argmax", "std"])
def test_what_does_not_absorb_keeps_its_channels(name: str) -> None:
    ops: dict[str, Callable[[Tensor], Tensor]] = {
        "softmax": lambda x: x.softmax(1),
        "argmax": lambda x: x * x.argmax(1, keepdim=True),
        "std": lambda x: x.std(1),
    }
    check(network(ops[name]), X, kept={"conv.weight": (7, 3, 1, 1)}, reasons={Reason.CHANNEL_MIXING})


WHOLE: dict[str, Callable[[Tensor], Tensor]] = {
    "amax": lambda x: x.amax(1, keepdim=True),
    "max": lambda x: x.max(1, keepdim=True)[0],
    "std": lambda x: x.std(1, keepdim=True),
    "logsumexp": lambda x: torch.logsumexp(x, 1, keepdim=True),
    "softmax": lambda x: x.softmax(1),
    "log_softmax": lambda x: F.log_softmax(x, 1),
    "cumsum": lambda x: x.cumsum(1),
    "sort": lambda x: x.sort(1)[0],
    "normalize": lambda x: F.normalize(x),
    "norm": lambda x: x.norm(dim=1, keepdim=True),
    "infinity norm": lambda x: torch.linalg.vector_norm(x, torch.inf, 1, keepdim=True),
    "local response": lambda x: F.local_response_norm(x, 3),
}


@pytest.mark.parametrize("name", WHOLE)
def test_what_mixes_constants_alone_yields_constants(name: str) -> None:
    """They are stored then; when one channel varies, so does the result."""

    class Beside(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.back = nn.Conv2d(3, 5, 1), nn.Conv2d(3, 5, 1), nn.Conv2d(5, 4, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.back(torch.sigmoid(self.b(x) + WHOLE[name](self.a(x))))

    model = randomized(Beside())
    kill(model.a, range(5))
    routes = (
        ("symbolic",) if name == "local response" else ("symbolic", "export")
    )  # torch.export takes it apart
    check(model, X, kept={"a.weight": ()}, routes=routes)
    model.a.weight.data[2, 0] = 1.0
    found = check(model, X)
    assert "a.weight" in dict(found["symbolic"].small.named_parameters())


@given(st.integers(2, 9), st.integers(0, 8), st.booleans(), st.integers(0, 99))
def test_any_share_of_constants(n: int, n_dead: int, divides: bool, seed: int) -> None:
    torch.manual_seed(seed)
    n_dead = min(n_dead, n - 1)
    model = nn.Sequential(nn.Conv2d(3, n, 1), Total(divides), nn.Conv2d(1, 2, 1))
    kill(randomized(model, seed)[0], rows=torch.randperm(n)[:n_dead].tolist())
    check(model, X, routes=("symbolic",), kept={"0.weight": (n - n_dead, 3, 1, 1)})


class Total(nn.Module):
    def __init__(self, divides: bool) -> None:
        super().__init__()
        self.divides = divides

    def forward(self, x: Tensor) -> Tensor:
        return x.mean(1, keepdim=True) if self.divides else x.sum(1, keepdim=True)


@pytest.mark.parametrize("reduce", [lambda x: x.mean(-1, keepdim=True), lambda x: x.sum(-1, keepdim=True)])
def test_a_constant_that_stays_for_the_count_is_summed_once(reduce: Callable[[Tensor], Tensor]) -> None:
    """Eight channels, three of them constants, and a multiple of eight: all stay, and none is added a second time."""
    model = randomized(nn.Sequential(nn.Linear(5, 8), nn.ReLU()))
    kill(model[0], [0, 3, 7])
    model[0].bias.data.abs_()

    class Reduced(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.front, self.back = model, randomized(nn.Linear(1, 2))

        def forward(self, x: Tensor) -> Tensor:
            return self.back(reduce(self.front(x)))

    x = torch.randn(4, 5).double()
    whole = Reduced().double()
    for multiple, n in ((8, 8), (7, 7), (1, 5)):
        small = srfx.minimize(whole, x, multiple_of=multiple)
        assert small.get_parameter("front.0.weight").shape == (n, 5)
        assert relative_error(whole(x), small(x)) < 1e-9


PICTURES = torch.randn(2, 3, 6, 8)


OTHER = (torch.randn(3, 3, 8, 10),)


CHANNELS: dict[str, Callable[[Tensor], Tensor]] = {
    "mean": lambda x: x.mean(1, keepdim=True), "sum": lambda x: x.sum(1, keepdim=True),
    "torch.mean": lambda x: torch.mean(x, 1, True), "all": lambda x: x.mean((1, 2, 3), keepdim=True),
}  # fmt: skip


@pytest.mark.parametrize("name", CHANNELS)
def test_mean_and_sum_over_channels_absorb_constants(name: str) -> None:
    model = randomized(Sandwich(nn.Conv2d(3, 8, 1), CHANNELS[name], nn.Conv2d(1, 4, 1)))
    kill(model.front, [0, 3, 7])
    check(model, (PICTURES,), others=[OTHER], kept={"front.weight": (5, 3, 1, 1)})


BARRIERS: dict[str, Callable[[Tensor], Tensor]] = {
    "softmax": lambda x: x.softmax(1), "F.softmax": lambda x: F.softmax(x, dim=1), "module": nn.Softmax(1),
    "log_softmax": lambda x: x.log_softmax(1), "normalize": lambda x: F.normalize(x, dim=1),
    "cumsum": lambda x: x.cumsum(1), "sort": lambda x: x.sort(1)[0], "var": lambda x: x - x.var(1, keepdim=True),
    "amax": lambda x: x - x.amax(1, keepdim=True), "logsumexp": lambda x: x - x.logsumexp(1, keepdim=True),
}  # fmt: skip


@pytest.mark.parametrize("name", BARRIERS)
def test_ops_that_mix_channels_keep_them(name: str) -> None:
    model = randomized(Sandwich(nn.Conv2d(3, 8, 1), BARRIERS[name], nn.Conv2d(8, 4, 1)))
    kill(model.front, [0, 3, 7])
    kept = {"front.weight": (8, 3, 1, 1)}
    reasons = [] if name == "normalize" else [Reason.CHANNEL_MIXING]
    check(model, (PICTURES,), others=[OTHER], kept=kept, reasons=reasons)


def test_softmax_over_positions_passes_channels() -> None:
    model = randomized(Sandwich(nn.Conv2d(3, 8, 1), lambda x: x * x.softmax(3), nn.Conv2d(8, 4, 1)))
    kill(model.front, [0, 3, 7], bias=True)
    check(model, (PICTURES,), others=[OTHER], kept={"front.weight": (5, 3, 1, 1)})


def test_a_constant_output_is_restored_behind_the_mean_of_copies() -> None:
    class Copies(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(3, 4)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            y = self.fc(x)[:, None].expand(-1, 5, -1)
            return y.mean(1), y.mean(2)

    model = randomized(Copies())
    kill(model.fc, rows=range(4))
    check(
        model, (torch.randn(2, 3),), idempotent=False
    )  # of a constant output only the shape is left to compute


def test_a_size_read_of_a_constant_output_stays_in_front_of_what_restores_it() -> None:
    class Sized(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(3, 4)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            y = self.fc(x)
            return y, x.sum(1).view(y.size(0), 1) / y.size(1)

    model = randomized(Sized())
    kill(model.fc, rows=range(4))
    check(model, (torch.randn(2, 3),), idempotent=False)
