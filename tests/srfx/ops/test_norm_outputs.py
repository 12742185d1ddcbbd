"""Norms that write only the channels that are read (theory: N7)."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import srfx
import srfx.testing
from srfx.minimize import minimize
from srfx.nn import CompensatedLayerNorm, CompensatedRMSNorm
from tests.helpers import check, kill, randomized, shapes

X = torch.randn(3, 6)
UNREAD = range(4, 14)


class Stream(nn.Module):
    """A stream of 24 channels, read through a norm by ``wide`` and as it is by ``other``."""

    def __init__(self, norm: Any, rows: int = 40, after: Any = None) -> None:
        super().__init__()
        self.a, self.wide, self.other = nn.Linear(6, 24), nn.Linear(24, rows), nn.Linear(24, 5)
        self.g, self.h = nn.Parameter(torch.ones(24)), nn.Parameter(torch.ones(24))
        self.norm = norm if isinstance(norm, nn.Module) else None
        self.functions = [norm, after or (lambda y: y)]
        self.last = nn.Linear(rows, 5)
        randomized(self)

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x)
        z = self.norm(y) if self.norm is not None else self.functions[0](y, self.g, self.h)
        return self.other(y) + self.last(self.wide(self.functions[1](z)).relu())


NORMS: dict[str, Any] = {
    "layer": lambda: nn.LayerNorm(24),
    "layer without bias": lambda: nn.LayerNorm(24, bias=False),
    "layer without affine": lambda: nn.LayerNorm(24, elementwise_affine=False),
    "layer, functional": lambda: lambda y, g, h: F.layer_norm(y, (24,), g, h),
    "rms": lambda: nn.RMSNorm(24, eps=1e-5),
    "rms without weight": lambda: nn.RMSNorm(24, elementwise_affine=False),
    "rms, functional": lambda: lambda y, g, h: F.rms_norm(y, (24,), g, 1e-6),
}


@pytest.mark.parametrize("name", NORMS)
def test_channels_that_nobody_reads_are_not_written(name: str) -> None:
    """The stream keeps all of them, for the statistics and the other reader."""
    model = Stream(NORMS[name]())
    kill(model.wide, columns=UNREAD)
    found = check(model, (X,), kept={"a.weight": (24, 6), "wide.weight": (40, 14), "other.weight": (5, 24)})
    widths = {n: s for n, s in shapes(found["symbolic"].small).items() if n.startswith(("norm.w", "g"))}
    assert all(s == (14,) for s in widths.values())


@pytest.mark.parametrize("name", ["layer", "layer, functional", "rms", "rms, functional"])
def test_with_statistics(name: str) -> None:
    """Constants leave the stream as before; their statistics stand behind the channels that are written."""
    model = Stream(NORMS[name]())
    kill(model.wide, columns=UNREAD)
    kill(model.a, [0, 1, 5])
    n = 2 + (1 if name.startswith("layer") else 0)
    with torch.no_grad():
        model.a.bias[[0, 1]] = torch.tensor([1.0, -2.0])
    check(model, (X,), kept={"a.weight": (21, 6), "wide.weight": (40, 12 + n - 1), "other.weight": (5, 21)})


def test_statistics_of_zeros_under_rms_norm_need_no_place() -> None:
    model = Stream(nn.RMSNorm(24, eps=1e-5))
    kill(model.wide, columns=UNREAD)
    kill(model.a, [0, 1, 5], bias=True)
    check(model, (X,), kept={"a.weight": (21, 6), "wide.weight": (40, 12)})


def test_what_saves_little_stays_whole() -> None:
    """4 rows by 10 columns are fewer weights than the selection of 14 channels is worth."""
    model = Stream(nn.LayerNorm(24), rows=4)
    kill(model.wide, columns=UNREAD)
    small = check(model, (X,), kept={"a.weight": (24, 6), "wide.weight": (4, 24)})["symbolic"].small
    assert type(small.get_submodule("norm")) is nn.LayerNorm
    found = srfx.testing.probe(model, X)
    assert found.reasons == {"WHOLE": 10}
    assert {left.site for left in found.leftovers} == {"norm"}


def test_a_reader_that_is_not_linear() -> None:
    """Behind a rectifier the norm writes what is read; what it writes needs its own operand channel."""
    model = Stream(nn.LayerNorm(24), after=torch.relu)
    kill(model.wide, columns=UNREAD)
    check(model, (X,), kept={"a.weight": (24, 6), "wide.weight": (40, 14)})
    kill(model.a, [0, 1, 5])
    check(model, (X,), kept={"a.weight": (23, 6), "wide.weight": (40, 14)})  # 5 is not written: it may go


def test_a_stream_through_norms() -> None:
    """Post-norm: what is dead behind one norm does not hold the same channel in front of it."""

    class Post(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.f, self.g = nn.Linear(6, 24), nn.Linear(24, 24), nn.Linear(24, 24)
            self.first, self.second, self.out = nn.LayerNorm(24), nn.LayerNorm(24), nn.Linear(24, 5)

        def forward(self, x: Tensor) -> Tensor:
            y = self.a(x)
            y = self.first(y + self.f(y).relu())
            y = self.second(y + self.g(y).relu())
            z: Tensor = self.out(y)
            return z

    model = randomized(Post())
    kill(model.out, columns=range(8))
    kill(model.g, columns=range(10, 16))
    check(model, (X,), kept={"g.weight": (24, 24), "out.weight": (5, 24)})
    kill(model.g, range(10, 16), bias=True)
    with torch.no_grad():
        model.second.weight[10:16] = 0
        model.second.bias[10:16] = 0
    check(model, (X,))


def test_again_with_more_zeros() -> None:
    """What is left out later shortens the index that is there; what is left of the norm is one norm."""
    model = Stream(nn.LayerNorm(24)).double()
    kill(model.wide, columns=UNREAD)
    once = minimize(model, X.double())
    kill(once.get_submodule("wide"), columns=[0, 13])
    kill(once.get_submodule("a"), [2])
    check(once, (X,), routes=["symbolic"], kept={"wide.weight": (40, 12), "a.weight": (23, 6)})
    norm = minimize(once, X.double()).get_submodule("norm")
    assert isinstance(norm, CompensatedLayerNorm)
    assert norm.outputs is not None
    assert (norm.outputs.numel(), norm.n_kept, norm.emits) == (11, 23, ("mu_r",))


def test_multiples() -> None:
    model = Stream(nn.LayerNorm(24)).double()
    kill(model.wide, columns=UNREAD)
    small = minimize(model, X.double(), multiple_of=8)
    assert shapes(small)["wide.weight"] == (40, 16)
    assert srfx.verify(model, small, X.double()).ok


def test_a_norm_with_two_sites_writes_all() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.norm, self.b = nn.Linear(6, 24), nn.LayerNorm(24), nn.Linear(24, 40)

        def forward(self, x: Tensor) -> Tensor:
            z: Tensor = self.b(self.norm(self.norm(self.a(x))))
            return z

    model = randomized(Twice())
    kill(model.b, columns=UNREAD)
    check(model, (X,), kept={"b.weight": (40, 24)})


@pytest.mark.parametrize("name", ["layer", "rms"])
def test_the_result_is_used_like_any_other(name: str) -> None:
    """Trained, saved, copied and exported; and put back into the user's own module."""
    model = Stream(NORMS[name]()).double()
    kill(model.wide, columns=UNREAD)
    kill(model.a, [0, 1])
    small = minimize(model, X.double())
    wanted = model(X.double())
    torch.testing.assert_close(copy.deepcopy(small)(X.double()), wanted)
    exported = torch.export.export(small, (X.double(),)).module()
    torch.testing.assert_close(exported(X.double()), wanted)
    own = srfx.apply_(copy.deepcopy(model), small)
    torch.testing.assert_close(own(X.double()), wanted)
    assert isinstance(own.norm, (CompensatedLayerNorm, CompensatedRMSNorm))
    small.train()
    small(X.double()).sum().backward()
    norm = small.get_submodule("norm")
    kept = torch.tensor([c for c in range(2, 24) if c not in UNREAD])
    model(X.double()).sum().backward()
    torch.testing.assert_close(norm.weight.grad, model.norm.weight.grad[kept])
